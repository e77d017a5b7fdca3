"""One async engine for each event loop.

A pooled connection belongs to the loop it was opened on, and a pool shared by two loops hands
it out on the other one. So each loop gets an engine, and the loop itself is asked to dispose
of it: by an async generator, which asyncio finalises when the loop shuts down. Weak
references cannot do it: engine -> connection -> loop keeps the key alive.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncGenerator, Callable
from typing import Any
from weakref import WeakSet

from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncEngine

logger = logging.getLogger("repom")


class LoopEngine:
    """The engine of one loop, and what hangs on it."""

    def __init__(self, engine: AsyncEngine, guard: AsyncGenerator[None, None]) -> None:
        self.engine = engine
        self.guard = guard
        #: The same engine with execution options, by these options.
        self.variants: dict[Any, AsyncEngine] = {}
        self._records: WeakSet[Any] = WeakSet()
        event.listen(engine.sync_engine, "connect", self._connected)

    def _connected(self, dbapi_connection: Any, record: Any) -> None:
        self._records.add(record)

    def terminate(self) -> int:
        """Drop the connections of a loop that is closed, without asking their servers.

        Returns:
            How many there were.
        """
        connections = [record.dbapi_connection for record in self._records]
        connections = [connection for connection in connections if connection is not None]
        self.engine.sync_engine.pool = self.engine.sync_engine.pool.recreate()
        for connection in connections:
            try:
                connection.terminate()
            except RuntimeError:  # "Event loop is closed": the transport has nowhere to report
                logger.debug("terminating a connection of a closed loop", exc_info=True)
        return len(connections)


class LoopEngines:
    """The engines of one database, by event loop.

    Args:
        create: makes an engine.
        name: the database's URL without its password, for messages.
    """

    def __init__(self, create: Callable[[], AsyncEngine], name: str) -> None:
        self._create = create
        self._name = name
        self._engines: dict[asyncio.AbstractEventLoop, LoopEngine] = {}
        self._mutex = threading.Lock()

    def here(self) -> LoopEngine:
        """The engine of the running loop, made on first use.

        Raises:
            RuntimeError: no loop runs in this thread.
        """
        loop = asyncio.get_running_loop()
        found = self._engines.get(loop)
        if found is None:
            self._bury_closed_loops()
            found = LoopEngine(self._create(), self._guard(loop))
            with self._mutex:
                self._engines[loop] = found
            _start(found.guard)
        return found

    async def dispose(self) -> None:
        """Dispose of the running loop's engine; the next use makes a new one."""
        found = self._engines.get(asyncio.get_running_loop())
        if found is not None:
            await found.guard.aclose()

    async def _guard(self, loop: asyncio.AbstractEventLoop) -> AsyncGenerator[None, None]:
        """Dispose of the engine of `loop` when closed, at the latest by the loop itself."""
        try:
            yield
        finally:
            with self._mutex:
                found = self._engines.pop(loop)
            await found.engine.dispose()

    def _bury_closed_loops(self) -> None:
        with self._mutex:
            closed = [loop for loop in self._engines if loop.is_closed()]
            dead = [self._engines.pop(loop) for loop in closed]
        for engine in dead:
            count = engine.terminate()
            if count:
                logger.warning(
                    "%d connection(s) to %s were left open by an event loop that was closed "
                    "without shutting down its async generators. They were terminated. Run the "
                    "loop with asyncio.run(), or `await database.dispose()` before closing it.",
                    count,
                    self._name,
                )


def _start(generator: AsyncGenerator[None, None]) -> None:
    """Run `generator` to its first yield, so that the running loop knows of it.

    It awaits nothing before that, so this takes no event loop turn.
    """
    try:
        generator.__anext__().send(None)
    except StopIteration:
        return
    raise AssertionError("the guard must not await before its yield")
