"""Doing a piece of work again and again, cancelled one await later each time.

A piece of work is a coroutine together with the tasks that it starts, also those in which repom
ends transactions. Each time that one of them is suspended is a place at which to cancel it.

Example:
    for number in itertools.count(1):
        interruption = Interruption(number, "cancel")
        task = asyncio.create_task(interruption.run(work()))
        ...
        if not interruption.happened:
            break
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any, Literal

import anyio

from repom.database import Database
from repom.deferred import EndingTask

#: By `Task.cancel()`; by two of them; by one that comes when what the task has waited for is
#: there already, and is lost with it; by a scope of anyio, which cancels every await from then
#: on; by the time-out of asyncio.
Cancelling = Literal["cancel", "cancel twice", "cancel late", "cancel scope", "timeout"]
CANCELLING: tuple[Cancelling, ...] = (
    "cancel",
    "cancel twice",
    "cancel late",
    "cancel scope",
    "timeout",
)

#: Called with what a task waits for, a future or None, when it is suspended.
Suspended = Callable[[Any], object]


class Moment:
    """The moment at which a piece of work is suspended for the `number`-th time.

    Attributes:
        happened: whether it has come.
    """

    def __init__(self, number: float) -> None:
        self.happened = False
        self._number = number
        self._count = 0

    async def act(self, work: Awaitable[Any], action: Suspended) -> None:
        """Do `work`, and `action` at that moment."""
        over = False

        def suspended(awaited: Any) -> None:
            self._count += 1
            if self._count == self._number and not over:
                self.happened = True
                action(awaited)

        try:
            with _watching_tasks(suspended):
                await _Watched(_waiting_for(work), suspended)
        finally:
            over = True


class Interruption(Moment):
    """A moment at which the task that does the work is cancelled."""

    def __init__(self, number: float, how: Cancelling) -> None:
        super().__init__(number)
        self._how = how
        self._cancel: Suspended

    def cancel(self) -> None:
        """Cancel it now."""
        self._cancel(None)

    async def run(self, work: Awaitable[Any]) -> bool:
        """Do `work`, and cancel it.

        Returns:
            Whether it was cancelled, by a scope or a time-out that ends here.

        Raises:
            asyncio.CancelledError: the task was cancelled.
        """
        loop = asyncio.get_running_loop()
        if self._how == "cancel scope":
            with anyio.CancelScope() as scope:
                self._cancel = lambda _: loop.call_soon(scope.cancel)
                await self.act(work, self._cancel)
            return scope.cancelled_caught
        if self._how == "timeout":
            try:
                async with asyncio.timeout(None) as timeout:
                    self._cancel = lambda _: timeout.reschedule(loop.time())
                    await self.act(work, self._cancel)
            except TimeoutError:
                return True
            return False
        self._cancel = self._cancels(asyncio.current_task())
        await self.act(work, self._cancel)
        return False

    def _cancels(self, task: asyncio.Task[Any] | None) -> Suspended:
        assert task is not None
        loop = task.get_loop()

        def cancel(awaited: Any) -> None:
            if self._how == "cancel late" and awaited is not None:
                # Before the task's own callback, which is not added yet. An ending stands between
                # the task and what that waits for.
                awaited = getattr(awaited, "_future", awaited)
                awaited.add_done_callback(lambda _: task.cancel())
                return
            loop.call_soon(task.cancel)
            if self._how == "cancel twice":
                loop.call_soon(lambda: loop.call_soon(task.cancel))

        return cancel


async def _waiting_for(work: Awaitable[Any]) -> Any:
    return await work


async def cancelled_at(number: int, how: Cancelling, work: Awaitable[Any]) -> bool:
    """Do `work` in a task and cancel it when it is suspended for the `number`-th time.

    Returns:
        Whether it was cancelled; False if it ended before that.
    """
    task = asyncio.create_task(Interruption(number, how).run(work))
    await asyncio.wait((task,))
    return task.cancelled() or task.result()


class _Watched(Coroutine[Any, Any, Any]):
    """A coroutine that tells of each time that it is suspended."""

    def __init__(self, coro: Coroutine[Any, Any, Any], suspended: Suspended) -> None:
        self._coro = coro
        self._suspended = suspended

    def __await__(self) -> "_Watched":
        return self

    def __iter__(self) -> "_Watched":
        return self

    def __next__(self) -> Any:
        return self.send(None)

    def send(self, value: Any) -> Any:
        awaited = self._coro.send(value)
        self._suspended(awaited)
        return awaited

    def throw(self, *error: Any) -> Any:
        awaited = self._coro.throw(*error)
        self._suspended(awaited)
        return awaited

    def close(self) -> None:
        self._coro.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._coro, name)  # asyncio and anyio look at `cr_frame` and its like


#: Whom the tasks that are started here tell of their suspensions.
_listener: ContextVar[Suspended | None] = ContextVar("listener", default=None)


@contextmanager
def _watching_tasks(suspended: Suspended) -> Iterator[None]:
    """Let the tasks that are started from here tell of their suspensions."""
    loop = asyncio.get_running_loop()
    factory, init = loop.get_task_factory(), EndingTask.__init__

    def watched(coro: Any) -> Any:
        listener = _listener.get()
        return coro if listener is None else _Watched(coro, listener)

    def make_task(loop: Any, coro: Any, **kwargs: Any) -> Any:
        return asyncio.Task(watched(coro), loop=loop, **kwargs)

    def init_ending(self: Any, coro: Any, **kwargs: Any) -> None:
        init(self, watched(coro), **kwargs)

    token = _listener.set(suspended)
    loop.set_task_factory(make_task)
    EndingTask.__init__ = init_ending  # type: ignore[method-assign]
    try:
        yield
    finally:
        EndingTask.__init__ = init  # type: ignore[method-assign]
        loop.set_task_factory(factory)
        _listener.reset(token)


# --- what happens meanwhile -----------------------------------------------------------------------


@contextmanager
def answered_commits(*databases: Database) -> Iterator[list[Database]]:
    """The databases that have answered a COMMIT meanwhile, by either of their engines."""
    answered: list[Database] = []
    with ExitStack() as stack:
        for database in databases:
            for engine in (database.async_engine.sync_engine, database.engine):
                stack.enter_context(_telling_of_commits(engine, database, answered))
        yield answered


@contextmanager
def _telling_of_commits(
    engine: Any, database: Database, answered: list[Database]
) -> Iterator[None]:
    do_commit = engine.dialect.do_commit

    def telling(connection: Any) -> None:
        do_commit(connection)
        answered.append(database)

    engine.dialect.do_commit = telling
    yield
    engine.dialect.do_commit = do_commit


@contextmanager
def counted_turns() -> Iterator[list[int]]:
    """Count how often the running loop looks for events meanwhile; uvloop's cannot be counted."""
    selector: Any = getattr(asyncio.get_running_loop(), "_selector", None)
    turns = [0]
    if selector is None:
        yield turns
        return
    select = selector.select

    def counting(timeout: float | None = None) -> Any:
        turns[0] += 1
        return select(timeout)

    selector.select = counting
    yield turns
    selector.select = select
