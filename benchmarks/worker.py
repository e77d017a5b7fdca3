"""The process in which a contender runs: `python -m benchmarks.worker`.

It is told what to do by lines of JSON on its standard input, and answers each with one. A load
on a server comes from another such process.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import resource
import sys
import time
import tracemalloc
from contextlib import AsyncExitStack
from importlib.metadata import distributions
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.client import Recorded, run_requests, started
from benchmarks.contenders import Contender
from benchmarks.databases import count_items
from benchmarks.hosts import ASGIApp, Endpoints
from benchmarks.load import fire


class Worker:
    """Does what the runner asks for, one thing after the other."""

    def __init__(self, stack: AsyncExitStack) -> None:
        self._stack = stack
        self._apps: dict[str, tuple[ASGIApp, dict[str, Any]]] = {}

    async def versions(self) -> dict[str, str]:
        """Of Python, and of what is installed."""
        found = {d.metadata["Name"].lower(): d.version for d in distributions()}
        return {"python": sys.version.split()[0], **found}

    async def load(
        self, app: str, contender: list[str], url: str, engine_kwargs: dict[str, Any]
    ) -> None:
        """Build the contender's application and start it; it is called `app` from now on."""
        built = Contender(*contender).app(url, engine_kwargs)
        self._apps[app] = built, await self._stack.enter_async_context(started(built))

    async def answers(self, app: str, url: str) -> list[Any]:
        """What the application answers in each case, and the rows that its INSERT has added.

        Those are counted twice: when it starts to answer, and when it has returned.
        """
        application, state = self._apps[app]
        found, counts = {}, []

        async def count() -> None:
            counts.append(await count_items(url))

        for endpoint in Endpoints._fields:
            request = Recorded(endpoint, state, count)
            counts.clear()
            await count()
            await request.run(application)
            found[endpoint] = json.loads(request.body)
            if endpoint == "insert":
                await count()
                before, at_start, after = counts
        return [found, at_start - before, after - before]

    async def run(
        self, app: str, endpoint: str, count: int, concurrency: int = 1, before: int = 0
    ) -> dict[str, float]:
        """Run requests; the seconds of each, of all threads' CPU time and of the clock.

        Args:
            before: so many are run first, in the same way, and do not count.
        """
        application, state = self._apps[app]
        await run_requests(application, endpoint, before, concurrency, state)
        wall, cpu = time.perf_counter(), time.process_time()
        await run_requests(application, endpoint, count, concurrency, state)
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        return {"cpu": cpu / count, "wall": wall / count}

    async def instructions(self, url: str) -> dict[str, dict[str, dict[str, float]]]:
        """Python's own instructions for a request; see `cost`."""
        from benchmarks import cost

        return {
            case: {
                contender: {"instructions": found.instructions, "turns": found.turns}
                for contender, found in by.items()
            }
            for case, by in (await cost.costs(url)).items()
        }

    async def serve(self, app: str) -> int:
        """Serve the application by uvicorn, until this process ends; the port."""
        import uvicorn

        # It takes the port itself: on a socket made by `socket.create_server` asyncio sets no
        # TCP_NODELAY, and every answer in two parts would take 40 ms.
        config = uvicorn.Config(
            self._apps[app][0],
            host="127.0.0.1",
            port=0,
            lifespan="off",
            log_level="warning",
            access_log=False,
        )
        server = uvicorn.Server(config)
        serving = asyncio.create_task(server.serve())
        while not server.started and not serving.done():  # noqa: ASYNC110 - has no event
            await asyncio.sleep(0.01)

        async def stop() -> None:
            server.should_exit = True
            await serving

        self._stack.push_async_callback(stop)
        port: int = server.servers[0].sockets[0].getsockname()[1]
        return port

    async def cpu(self) -> float:
        """The CPU seconds of this process until now."""
        return time.process_time()

    async def fire(self, port: int, endpoint: str, count: int, connections: int) -> dict[str, Any]:
        """Send requests to a server of this machine; see `load.fire`."""
        return await fire(port, endpoint, count, connections)

    async def memory(self, app: str, endpoint: str, count: int) -> dict[str, float]:
        """Bytes: the most that one request has at a time, and what each leaves behind."""
        application, state = self._apps[app]
        await run_requests(application, endpoint, count, 1, state)
        tracemalloc.start()
        try:
            await run_requests(application, endpoint, count, 1, state)
            gc.collect()
            before = tracemalloc.get_traced_memory()[0]
            await run_requests(application, endpoint, count, 1, state)
            gc.collect()
            left = tracemalloc.get_traced_memory()[0] - before
            peaks = []
            for _ in range(count // 4):
                tracemalloc.reset_peak()
                now = tracemalloc.get_traced_memory()[0]
                await run_requests(application, endpoint, 1, 1, state)
                peaks.append(tracemalloc.get_traced_memory()[1] - now)
        finally:
            tracemalloc.stop()
        return {"peak": median(peaks), "left": left / count}

    async def resident(self) -> int:
        """Bytes of this process in memory."""
        gc.collect()
        return _resident()


def _resident() -> int:
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # the most it ever had


async def main() -> None:
    """Until the standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a contender prints is no answer
    orders = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(orders), sys.stdin)
    async with AsyncExitStack() as stack:
        worker = Worker(stack)
        while line := await orders.readline():
            order = json.loads(line)
            try:
                answer = {"answer": await getattr(worker, order.pop("do"))(**order)}
            except Exception as error:
                while isinstance(error, ExceptionGroup):  # of the clients' TaskGroup
                    error = error.exceptions[0]
                answer = {"error": f"{type(error).__name__}: {error}"}
            print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    asyncio.run(main())
