"""Where the connection of the tests lives: a thread with an event loop of its own.

A driver's async connection belongs to one event loop, and tests have many: one for each test or
one for all, that of a `TestClient` in another thread, none in sync tests. So the connection
stays on a loop that outlives them, and whoever needs it has its work done there.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any, Protocol, TypeVar

from sqlalchemy.util import await_only, greenlet_spawn
from sqlalchemy.util.concurrency import in_greenlet

T = TypeVar("T")


# Seconds that a call may block an event loop without anybody noticing.
_LONG = 0.01


class Cancellation:
    """Whether a call may be cut off now; only its loop's thread looks at it.

    What has been sent to the database must not be left half-done where others go on with it.
    """

    def __init__(self) -> None:
        self.allowed = False
        self.task: asyncio.Task[Any] | None = None

    def cancel(self) -> None:
        if self.allowed and self.task is not None:
            self.task.cancel()


class Portal(Protocol):
    """Calls functions where the connection lives."""

    def call(
        self, function: Callable[..., T], *args: Any, cancellation: Cancellation | None = None
    ) -> T:
        """Call `function` there, and wait for its result.

        Args:
            function: may use SQLAlchemy's async drivers, as code in `run_sync` does.
            args: its arguments.
            cancellation: by which a caller that is cancelled cuts it off. Without one it runs
                to its end, which the caller does not wait for.
        """
        ...

    def pause(self) -> None:
        """Let others of the event loop run, where `call` does not."""

    def post(self, function: Callable[[], object]) -> None:
        """Call `function` there, some time; the garbage collector cannot wait."""

    def bound(self, driver_connection: Any) -> Any:
        """The driver's connection, for code that uses it directly."""
        ...

    def close(self) -> None:
        """Nothing is called any more."""


class DirectPortal:
    """For connections that any thread can use, one after the other."""

    def pause(self) -> None:
        if in_greenlet():
            # As every statement of an async driver would. SQLAlchemy insists on it.
            await_only(asyncio.sleep(0))

    def call(
        self, function: Callable[..., T], *args: Any, cancellation: Cancellation | None = None
    ) -> T:
        start = time.monotonic()
        result = function(*args)
        if time.monotonic() - start > _LONG and in_greenlet():
            for _ in range(2):  # for timers to come due, and for what they cancel to notice
                await_only(asyncio.sleep(0))
        return result

    def post(self, function: Callable[[], object]) -> None:
        function()

    def bound(self, driver_connection: Any) -> Any:
        return driver_connection

    def close(self) -> None:
        pass


class LoopPortal:
    """For async drivers: an event loop in a thread.

    Sync code waits for it by blocking its thread, and async code by awaiting.
    """

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._closed = self._loop.create_future()
        self._thread = threading.Thread(target=self._run, name="repom.testing", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._until_closed())

    async def _until_closed(self) -> None:
        await self._closed
        while posted := asyncio.all_tasks() - {asyncio.current_task()}:
            await asyncio.wait(posted)

    def call(
        self, function: Callable[..., T], *args: Any, cancellation: Cancellation | None = None
    ) -> T:
        async def run() -> T:
            if cancellation is not None:
                cancellation.task = asyncio.current_task()
            return await greenlet_spawn(function, *args)

        if in_greenlet():
            result: T = await_only(self.awaited(run(), cancellation))
            return result
        return asyncio.run_coroutine_threadsafe(run(), self._loop).result()

    async def awaited(self, work: Any, cancellation: Cancellation | None = None) -> Any:
        """Await `work`, a coroutine, on the loop of the connection."""
        done = asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._loop))
        try:
            return await asyncio.shield(done)
        except asyncio.CancelledError:
            if cancellation is not None:
                self._loop.call_soon_threadsafe(cancellation.cancel)
            raise

    def pause(self) -> None:
        pass

    def post(self, function: Callable[[], object]) -> None:
        asyncio.run_coroutine_threadsafe(greenlet_spawn(function), self._loop)

    def bound(self, driver_connection: Any) -> Any:
        return LoopBound(driver_connection, self)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._closed.set_result, None)
        self._thread.join()


class LoopBound:
    """An object of an async driver, whose awaitables can be awaited on any loop.

    What it returns is wrapped likewise where it can be awaited in its turn: transactions,
    cursors, prepared statements.
    """

    def __init__(self, target: Any, portal: LoopPortal) -> None:
        object.__setattr__(self, "_target", target)
        object.__setattr__(self, "_portal", portal)

    def __repr__(self) -> str:
        return repr(self._target)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return type(self._target)  # for isinstance()

    def __getattr__(self, name: str) -> Any:
        return self._wrapped(getattr(self._target, name))

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._target, name, value)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._wrapped(self._target(*args, **kwargs))

    def __await__(self) -> Any:
        return self._there(self._target).__await__()

    async def __aenter__(self) -> Any:
        return await self._there(self._target.__aenter__())

    async def __aexit__(self, *exc_info: Any) -> Any:
        return await self._there(self._target.__aexit__(*exc_info))

    def __aiter__(self) -> Any:
        return LoopBound(self._target.__aiter__(), self._portal)

    async def __anext__(self) -> Any:
        return await self._there(self._target.__anext__())

    async def _there(self, awaitable: Awaitable[Any]) -> Any:
        async def work() -> tuple[StopAsyncIteration | None, Any]:
            try:
                return None, await awaitable
            except StopAsyncIteration as end:  # which a future does not carry
                return end, None

        end, result = await self._portal.awaited(work())
        if end is not None:
            raise end
        return self._wrapped(result)

    def _wrapped(self, value: Any) -> Any:
        return LoopBound(value, self._portal) if _is_async(value) else value


def _is_async(value: Any) -> bool:
    return inspect.isroutine(value) or _is_async_type(type(value))  # type: ignore[arg-type]


@functools.cache
def _is_async_type(kind: type[object]) -> bool:
    if any(hasattr(kind, name) for name in ("__await__", "__aenter__", "__aiter__", "__anext__")):
        return True
    return any(inspect.iscoroutinefunction(getattr(kind, name, None)) for name in dir(kind))
