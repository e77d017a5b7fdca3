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
from contextlib import suppress
from contextvars import Context
from typing import Any
from weakref import WeakSet

from sqlalchemy import Engine, event
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.pool import ConnectionPoolEntry

from repom.shield import run_to_end

logger = logging.getLogger("repom")

#: Seconds in which the pooled connections of a loop are to be closed; then they are terminated.
CLOSE_TIMEOUT = 10.0


class LoopEngine:
    """The engine of one loop, and what hangs on it.

    Attributes:
        guard: disposes of it when closed.
    """

    guard: AsyncGenerator[None, None]

    def __init__(self, engine: AsyncEngine) -> None:
        self.engine = engine
        #: The same engine with execution options, by these options.
        self.variants: dict[Any, AsyncEngine] = {}
        self._records: WeakSet[ConnectionPoolEntry] = WeakSet()
        event.listen(engine.sync_engine, "connect", self._connected)

    def _connected(self, dbapi_connection: Any, record: ConnectionPoolEntry) -> None:
        self._records.add(record)

    async def dispose(self) -> None:
        """Close the connections: those in the pool now, the others when they come back."""
        close_returned(self.engine.sync_engine)
        await self.engine.dispose()

    def driver_connections(self) -> list[Any]:
        """The connections that are open, in the pool or out of it."""
        return [record.driver_connection for record in self._open_records()]

    def give_up_pooled(self) -> list[Any]:
        """The open connections that are in the pool; from now on the caller's alone."""
        records = [record for record in self._open_records() if not record.in_use]
        self._records.difference_update(records)
        return [record.driver_connection for record in records]

    def _open_records(self) -> list[ConnectionPoolEntry]:
        return [record for record in self._records if record.driver_connection is not None]


class LoopEngines:
    """The engines of one database, by event loop.

    Args:
        create: makes an engine.
        abandon: closes a driver's connection without its loop.
        name: the database's URL without its password, for messages.
    """

    def __init__(
        self, create: Callable[[], AsyncEngine], abandon: Callable[[Any], None], name: str
    ) -> None:
        self._create = create
        self._abandon = abandon
        self._name = name
        self._engines: dict[asyncio.AbstractEventLoop, LoopEngine] = {}
        # Disposed of when connections were in use, which are closed when they come back.
        self._in_use: list[tuple[asyncio.AbstractEventLoop, LoopEngine]] = []
        # What `retire` has begun.
        self._retiring: set[asyncio.Task[None]] = set()
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
            found = LoopEngine(self._create())
            found.guard = self._guard(loop, found)
            with self._mutex:
                self._engines[loop] = found
            _start(found.guard)
        return found

    @property
    def are_in_use(self) -> bool:
        """Whether one of their connections is out of its pool."""
        return any(is_in_use(found.engine.sync_engine) for found in list(self._engines.values()))

    async def dispose(self) -> None:
        """Dispose of the running loop's engine; the next use makes a new one."""
        loop = asyncio.get_running_loop()
        found = self._engines.get(loop)
        if found is not None:
            await found.guard.aclose()
        retiring = [task for task in self._retiring if task.get_loop() is loop]
        if retiring:
            await asyncio.wait(retiring)

    def retire(self, *others: LoopEngines) -> None:
        """Dispose of the engine of every loop, on that loop, unless one of its connections is out.

        Waits for nothing: a loop closes its connections when it comes to it.

        Args:
            others: whose engines are in use, or not, together with these.
        """
        group = (self, *others)
        for engines in group:
            engines._bury_closed_loops()
        here = asyncio._get_running_loop()
        for loop in dict.fromkeys(loop for engines in group for loop in list(engines._engines)):
            if loop is here:
                _retire_on(loop, group)
            else:
                with suppress(RuntimeError):  # closed meanwhile, by which it has done the same
                    loop.call_soon_threadsafe(_retire_on, loop, group)

    def _retire(self, loop: asyncio.AbstractEventLoop, engine: LoopEngine) -> None:
        self._forget(loop, engine)  # before anybody can take a connection of it
        # In no context: the one here is of whoever happens to use another database.
        task = Context().run(loop.create_task, _close_guard(engine))
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)

    def _forget(self, loop: asyncio.AbstractEventLoop, engine: LoopEngine) -> None:
        with self._mutex:
            if self._engines.get(loop) is engine:
                del self._engines[loop]

    async def _guard(
        self, loop: asyncio.AbstractEventLoop, engine: LoopEngine
    ) -> AsyncGenerator[None, None]:
        """Dispose of the engine of `loop` when closed, at the latest by the loop itself."""
        try:
            yield
        finally:
            self._forget(loop, engine)
            # Nobody could find the connections that a cancelled disposal had left open.
            await run_to_end(self._dispose(loop, engine), limit=CLOSE_TIMEOUT)

    async def _dispose(self, loop: asyncio.AbstractEventLoop, engine: LoopEngine) -> None:
        try:
            await engine.dispose()
        except asyncio.CancelledError:  # by the time limit, for nobody else can
            connections = engine.give_up_pooled()
            for connection in connections:
                self._abandon(connection)
            if connections:
                logger.warning(
                    "%d connection(s) to %s did not close within %g s. They were terminated.",
                    len(connections),
                    self._name,
                    CLOSE_TIMEOUT,
                )
        finally:
            if engine.driver_connections():
                with self._mutex:
                    self._in_use.append((loop, engine))

    def _bury_closed_loops(self) -> None:
        with self._mutex:
            known = [*self._engines.items(), *self._in_use]
            dead = [pair for pair in known if pair[0].is_closed()]
            for loop, _ in dead:
                self._engines.pop(loop, None)
            self._in_use = [
                pair for pair in self._in_use if pair not in dead and pair[1].driver_connections()
            ]
        for loop, engine in dead:
            _let_transports_close(loop)
            connections = engine.driver_connections()
            for connection in connections:
                try:
                    self._abandon(connection)
                except RuntimeError:  # of uvloop, which has closed the socket with the loop
                    logger.debug("a connection of a closed loop is closed", exc_info=True)
            if connections:
                logger.warning(
                    "%d connection(s) to %s were still open when their event loop was closed. "
                    "They were terminated. Close every session, and run the loop with "
                    "asyncio.run() or `await database.dispose()` before closing it.",
                    len(connections),
                    self._name,
                )


def is_in_use(engine: Engine) -> bool:
    """Whether a connection of `engine` is out of its pool; of a pool that keeps none, False."""
    checked_out: Callable[[], int] | None = getattr(engine.pool, "checkedout", None)
    return checked_out is not None and checked_out() > 0


def _retire_on(loop: asyncio.AbstractEventLoop, group: tuple[LoopEngines, ...]) -> None:
    found = [(each, each._engines[loop]) for each in group if loop in each._engines]
    if not any(is_in_use(engine.engine.sync_engine) for _, engine in found):
        for each, engine in found:
            each._retire(loop, engine)


async def _close_guard(engine: LoopEngine) -> None:
    await engine.guard.aclose()


def close_returned(engine: Engine) -> None:
    """Close every connection that comes back to the pool of an engine that is disposed of.

    SQLAlchemy would keep it in that pool, which nobody will ever ask again.
    """
    event.listen(engine.pool, "checkin", _close)


def _close(dbapi_connection: Any, record: ConnectionPoolEntry) -> None:
    record.invalidate()


def _let_transports_close(loop: asyncio.AbstractEventLoop) -> None:
    """Let a transport of the closed `loop` take its last step, which closes its socket.

    It asks the loop for that, and asyncio's refuses once it is closed.
    """

    def call_soon(callback: Any, *args: Any, context: Any = None) -> asyncio.Handle:
        # Nothing else: tasks that were waiting for the connection stay as the loop left them.
        if isinstance(getattr(callback, "__self__", None), asyncio.BaseTransport):
            callback(*args)
        return asyncio.Handle(callback, args, loop)

    loop.call_soon = call_soon  # type: ignore[assignment,method-assign]


def _start(generator: AsyncGenerator[None, None]) -> None:
    """Run `generator` to its first yield, so that the running loop knows of it.

    It awaits nothing before that, so this takes no event loop turn.
    """
    try:
        generator.__anext__().send(None)
    except StopIteration:
        return
    raise AssertionError("the guard must not await")  # pragma: no cover - it has no await
