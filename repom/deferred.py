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
from typing import Any

from repom.shield import EndingTask

logger = logging.getLogger("repom")

#: Endings under way, by the loop they run on. Empty nearly always.
pending: dict[asyncio.AbstractEventLoop, set[EndingTask[None]]] = {}

_failures: ContextVar[list[BaseException] | None] = ContextVar("repom_failures", default=None)


def end_later(ending: Coroutine[Any, Any, None], *, limit: float, label: str) -> None:
    """Run `ending` on the running loop without anybody waiting for it."""
    loop = asyncio.get_running_loop()
    failures = _failures_here()
    task = EndingTask(ending, loop=loop, limit=limit)
    tasks = pending.setdefault(loop, set())
    tasks.add(task)

    def done(task: Any) -> None:
        tasks.discard(task)
        if not tasks:
            pending.pop(loop, None)
        error = asyncio.CancelledError() if task.cancelled() else task.exception()
        if error is not None:
            failures.append(error)
            log_failure(label, error)
            loop.call_exception_handler(
                {"message": f"repom: COMMIT of {label} failed", "exception": error, "task": task}
            )

    task.add_done_callback(done)


async def settled() -> None:
    """Wait for the endings under way on the running loop; their failures are not raised here."""
    tasks = pending.get(asyncio.get_running_loop())
    if tasks:
        await asyncio.wait(tuple(tasks))


def failed(label: str, error: BaseException) -> None:
    """Keep the failure of an ending that had no caller to raise it to."""
    _failures_here().append(error)
    log_failure(label, error)


def raise_failure() -> None:
    """Raise, once, what an ending of this context has failed with."""
    failures = _failures.get()
    if failures:
        raise failures.pop(0)


def log_failure(label: str, error: BaseException) -> None:
    logger.error(
        "COMMIT after leaving the loop of %s failed, when the function had returned already. "
        "Write `async with get_async_db_session() as session:`, which raises it in place.",
        label,
        exc_info=error,
    )


def _failures_here() -> list[BaseException]:
    failures = _failures.get()
    if failures is None:
        failures = []
        _failures.set(failures)
    return failures
