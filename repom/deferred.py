"""Endings that nobody awaits: the COMMIT after `return` inside `async for session in ...`.

It runs when the function has returned already. So the next session of its loop waits for it,
and its failure is logged, given to the loop, and raised at the next call of repom in the
context it came from.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from contextvars import ContextVar
from typing import Any, TypeVar

from repom.errors import TransactionError
from repom.limit import Limit

logger = logging.getLogger("repom")

T = TypeVar("T")


class EndingTask(asyncio.Task[T]):
    """A task that only its own time limit can cancel, because nobody else can find it.

    `asyncio.run()` and servers that stop cancel `asyncio.all_tasks()`, and this is none of
    those. It could refuse `cancel()` instead, but that is also how time-outs end what they wait
    for, inside of it.

    Args:
        coro: the work.
        loop: the running loop.
        limit: seconds after which the task is cancelled.
    """

    def __init__(
        self, coro: Coroutine[Any, Any, T], *, loop: asyncio.AbstractEventLoop, limit: float
    ) -> None:
        super().__init__(coro, loop=loop)
        asyncio._unregister_task(self)
        self._limit = Limit(limit, self.cancel)
        self.add_done_callback(_lift_limit)


def _lift_limit(task: Any) -> None:
    task._limit.lift()


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


#: Endings under way, by the loop they run on. Empty nearly always.
pending: dict[asyncio.AbstractEventLoop, set[EndingTask[None]]] = {}

_failures: ContextVar[list[BaseException] | None] = ContextVar("repom_failures", default=None)

#: Whether this code is part of such an ending: a callback, which must not wait for itself.
_in_ending: ContextVar[bool] = ContextVar("repom_in_deferred_ending", default=False)


def end_later(ending: Coroutine[Any, Any, None], *, limit: float, label: str) -> None:
    """Run `ending` on the running loop without anybody waiting for it.

    Args:
        ending: ends one unit of work.
        limit: seconds it may take.
        label: what the unit of work is, for logs.
    """
    loop = asyncio._get_running_loop()
    if loop is None:
        ending.close()
        logger.error(
            "%s was not ended: it was left when its event loop was running no more. Its work "
            "is rolled back with its connection. Let tasks end before the loop does, as "
            "asyncio.run() does.",
            label,
        )
        return
    failures = _failures_here()
    task = EndingTask(_end(ending), loop=loop, limit=limit)
    Guard(task, name=f"repom: end of {label}")
    tasks = pending.setdefault(loop, set())
    tasks.add(task)

    def done(task: EndingTask[None]) -> None:
        tasks.discard(task)
        if not tasks:
            pending.pop(loop, None)
        error = _error_of(task)
        if error is not None:
            failures.append(error)
            _log_failure(label, f"async with {label}", error)
            loop.call_exception_handler(
                {"message": f"repom: COMMIT of {label} failed", "exception": error, "task": task}
            )

    task.add_done_callback(done)


async def _end(ending: Coroutine[Any, Any, None]) -> None:
    _in_ending.set(True)
    await ending


def _error_of(task: EndingTask[None]) -> BaseException | None:
    try:
        return task.exception()
    except asyncio.CancelledError as cancelled:
        # By its time limit. Nobody is to be cancelled for that later on.
        return cancelled.__cause__ or TransactionError(
            "the end of a unit of work, or a callback of it, did not finish within its time limit."
        )


async def settled() -> None:
    """Wait for the endings under way on the running loop; their failures are not raised here."""
    tasks = pending.get(asyncio.get_running_loop())
    if tasks and not _in_ending.get():
        await asyncio.wait(tuple(tasks))


def failed(label: str, error: BaseException) -> None:
    """Keep the failure of a sync ending that had no caller to raise it to."""
    _failures_here().append(error)
    _log_failure(label, f"with {label}", error)


def raise_failure() -> None:
    """Raise, once, what an ending of this context has failed with."""
    failures = _failures.get()
    if failures:
        raise failures.pop(0)


def _log_failure(label: str, better: str, error: BaseException) -> None:
    logger.error(
        "COMMIT after leaving the loop of %s failed, when the function had returned already. "
        "Write `%s as session:`, which raises it in place.",
        label,
        better,
        exc_info=error,
    )


def _failures_here() -> list[BaseException]:
    failures = _failures.get()
    if failures is None:
        failures = []
        _failures.set(failures)
    return failures
