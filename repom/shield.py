"""Run the end of a unit of work to its end, whatever happens to the task that waits for it.

A COMMIT that is cancelled half-way has an outcome nobody knows, and a ROLLBACK that is
cancelled leaves a connection out of its pool. So both run in a task of their own that cannot
be cancelled from outside, only by its time limit.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextvars import Context
from typing import Any, TypeVar

import anyio

from repom.errors import TransactionError

T = TypeVar("T")

#: Seconds between two attempts to cancel a task that is past its limit.
_INSIST_EVERY = 1.0

# The loop keeps a cancelled timer until its time has come, and with it what its context holds:
# by default the unit of work.
_NOTHING = Context()


class EndingTask(asyncio.Task[T]):
    """A task that only its own time limit can cancel, because nobody else can find it.

    `asyncio.run()` and servers that stop cancel `asyncio.all_tasks()`, and this is none of
    those. It could refuse `cancel()` instead, but that is also how the time-outs of pools and
    drivers end what they wait for, inside of it.

    Args:
        coro: the work.
        loop: the running loop.
        limit: seconds after which the task is cancelled. Cancelled inside a database call,
            SQLAlchemy invalidates the connection, which is what the limit is for.
    """

    def __init__(
        self, coro: Coroutine[Any, Any, T], *, loop: asyncio.AbstractEventLoop, limit: float
    ) -> None:
        super().__init__(coro, loop=loop)
        asyncio._unregister_task(self)
        self.expired = False
        #: The task on whose behalf it works, if that waits for it.
        self.caller: asyncio.Task[Any] | None = None
        self._timer = loop.call_later(limit, self._expire, context=_NOTHING)
        self.add_done_callback(_let_go)

    def _expire(self) -> None:
        self.expired = True
        self.cancel()
        self._timer = self.get_loop().call_later(_INSIST_EVERY, self._expire, context=_NOTHING)


def _let_go(task: Any) -> None:
    task._timer.cancel()
    task.caller = None  # whose cancellation may lead back here


class Guard(asyncio.Task[None]):
    """Keeps the loop running until `task` is done, also in `asyncio.run()` that is over.

    That cancels every task it finds and then waits for them. This one declines.
    """

    def __init__(self, task: EndingTask[Any], *, name: str) -> None:
        super().__init__(_done(task), loop=task.get_loop(), name=name)

    def cancel(self, msg: Any = None) -> bool:
        return False


async def _done(task: EndingTask[Any]) -> None:
    await asyncio.wait((task,))


def acting_task() -> asyncio.Task[Any] | None:
    """The running task, or the one that waits for it if this is the end of its work."""
    task = asyncio.current_task()
    return task.caller or task if isinstance(task, EndingTask) else task


async def run_to_end(coro: Coroutine[Any, Any, T], *, limit: float) -> T:
    """Await `coro` to its end, and only then let a cancellation of the caller through.

    Args:
        coro: the end of a unit of work.
        limit: seconds it may take.

    Returns:
        What `coro` returns.

    Raises:
        TransactionError: `coro` did not finish in time, and did not say so itself.
        asyncio.CancelledError: the caller was cancelled meanwhile; `coro` has ended all the
            same. What `coro` raised is then the `__cause__`.
    """
    loop = asyncio.get_running_loop()
    task = EndingTask(coro, loop=loop, limit=limit)
    task.caller = asyncio.current_task()
    # Not `await task`: who is cancelled passes that on to what it awaits.
    waiter = loop.create_future()
    task.add_done_callback(lambda _: None if waiter.done() else waiter.set_result(None))
    try:
        await waiter
    except asyncio.CancelledError as cancelled:
        with anyio.CancelScope(shield=True):
            await _finished(task)
        if not task.cancelled():
            # The same exception object goes on: anyio recognises its own by the message.
            cancelled.__cause__ = task.exception()
        raise
    try:
        if task.cancelled():  # by its limit, and not the caller
            raise TransactionError(
                f"the end of a unit of work did not finish within its time limit of {limit:g} s."
            )
        return task.result()
    finally:
        # Or what it raised would keep itself alive: its traceback has this frame.
        del task


async def _finished(task: EndingTask[Any]) -> None:
    """Wait until `task` is done, through any number of further calls of `Task.cancel()`."""
    while not task.done():
        try:
            await asyncio.wait((task,))
        except asyncio.CancelledError:
            # The caller is about to raise the first CancelledError; a second says no more.
            continue
