"""Rounds in random order: every contender runs the same requests, one after the other."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from benchmarks.contenders import Contender

#: The hand-written code is there twice, as two applications with an engine each.
NULL = "hand-written, again"


class Remote:
    """A worker process, seen from the runner."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def ask(self, do: str, **order: Any) -> Any:
        """Have the worker do it, and return its answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"do": do, **order}).encode() + b"\n")
        line = await self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a worker ended while it was asked to {do} {order}")
        return json.loads(line)


@asynccontextmanager
async def worker(python: str) -> AsyncIterator[Remote]:
    """A worker process with the interpreter `python`; it ends with the block."""
    process = await asyncio.create_subprocess_exec(
        python,
        *("-m", "benchmarks.worker"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdin is not None
    try:
        yield Remote(process)
    finally:
        process.stdin.close()
        await process.wait()


@dataclass
class Entrant:
    """One application in the comparison, and what was measured of it: seconds a request."""

    name: str
    remote: Remote
    app: str
    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)

    async def run(self, endpoint: str, count: int, concurrency: int) -> dict[str, float]:
        """Have it answer `count` requests."""
        found: dict[str, float] = await self.remote.ask(
            "run", app=self.app, endpoint=endpoint, count=count, concurrency=concurrency
        )
        return found


async def rounds(
    entrants: list[Entrant],
    endpoint: str,
    *,
    rounds: int,
    seconds: float,
    concurrency: int,
    random_: random.Random,
) -> None:
    """Let all entrants run in random order, again and again.

    Args:
        seconds: how long the first entrant takes for its part of a round; the others get as
            many requests.
    """
    for entrant in entrants:
        await entrant.run(endpoint, max(30, concurrency), concurrency)
    first = await entrants[0].run(endpoint, max(30, concurrency), concurrency)
    count = max(concurrency, round(seconds / first["wall"]))
    for _ in range(rounds):
        for entrant in random_.sample(entrants, len(entrants)):
            found = await entrant.run(endpoint, count, concurrency)
            entrant.cpu.append(found["cpu"])
            entrant.wall.append(found["wall"])
