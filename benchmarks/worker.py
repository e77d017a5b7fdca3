"""The process in which contenders of one environment run: `python -m benchmarks.worker`.

It is told what to do by lines of JSON on its standard input, and answers each with one.
"""

from __future__ import annotations

import asyncio
import gc
import json
import sys
import time
from contextlib import AsyncExitStack
from typing import Any

from benchmarks.client import run_requests, started
from benchmarks.contenders import find
from benchmarks.hosts import ASGIApp


class Worker:
    """Does what the runner asks for, one thing after the other."""

    def __init__(self, stack: AsyncExitStack) -> None:
        self._stack = stack
        self._apps: dict[str, tuple[ASGIApp, dict[str, Any]]] = {}

    async def load(self, app: str, contender: str, url: str, engine_kwargs: dict[str, Any]) -> None:
        """Build the contender's application and start it; it is `app` from now on."""
        built = find(contender).app(url, engine_kwargs)
        self._apps[app] = built, await self._stack.enter_async_context(started(built))

    async def run(
        self, app: str, endpoint: str, count: int, concurrency: int = 1
    ) -> dict[str, float]:
        """Run requests; tell the seconds of all threads' CPU time, and of the clock."""
        application, state = self._apps[app]
        gc.collect()  # what others have left is not to be paid here
        wall, cpu = time.perf_counter(), time.process_time()
        await run_requests(application, endpoint, count, concurrency, state)
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        return {"cpu": cpu / count, "wall": wall / count}


async def main() -> None:
    """Until the standard input ends."""
    loop = asyncio.get_running_loop()
    async with AsyncExitStack() as stack:
        worker = Worker(stack)
        while line := await loop.run_in_executor(None, sys.stdin.readline):
            order = json.loads(line)
            answer = await getattr(worker, order.pop("do"))(**order)
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    asyncio.run(main())
