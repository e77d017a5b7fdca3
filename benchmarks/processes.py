"""Worker processes, seen from the runner."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from benchmarks.environments import ROOT

#: An answer is a line, and the versions of an environment make a long one.
_LONGEST_LINE = 1 << 20


class WorkerError(Exception):
    """What a worker was asked to do raised there."""


class Remote:
    """A worker process."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def ask(self, do: str, **order: Any) -> Any:
        """Have the worker do it, and return its answer.

        Raises:
            WorkerError: it failed, or the worker died of it.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"do": do, **order}).encode() + b"\n")
        line = await self._process.stdout.readline()
        answer = json.loads(line) if line else {"error": f"the worker died while asked to {do}"}
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer["answer"]


@asynccontextmanager
async def worker(python: Path, hash_seed: int = 0) -> AsyncIterator[Remote]:
    """A worker process with the interpreter `python`; it ends with the block.

    Args:
        hash_seed: of Python's strings, on which depends where in memory much comes to lie.
    """
    process = await asyncio.create_subprocess_exec(
        python,
        *("-m", "benchmarks.worker"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=_LONGEST_LINE,
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": str(hash_seed)},
    )
    assert process.stdin is not None
    try:
        yield Remote(process)
    finally:
        process.stdin.close()
        await process.wait()
