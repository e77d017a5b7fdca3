"""A thread that waits for another request must not keep that one from running.

Frameworks run `def` endpoints and dependencies in a limited number of threads. When all of
them wait for connections, the requests that hold those connections cannot go on: their next
step needs a thread, too. So a thread that has to wait lends its place to another one.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from contextlib import contextmanager

import anyio.from_thread
import anyio.to_thread
from anyio import CapacityLimiter
from sqlalchemy.pool import ConnectionPoolEntry, QueuePool


@contextmanager
def place_lent() -> Iterator[None]:
    """Let anyio run one thread more while the block waits.

    In a thread that is not of anyio's, nothing is done: nobody knows what it is one of.
    """
    try:
        loop, limiter = anyio.from_thread.run_sync(_one_more)
    except RuntimeError:
        yield
        return
    try:
        yield
    finally:
        with contextlib.suppress(RuntimeError):  # the loop is closed, and its limiter gone
            loop.call_soon_threadsafe(_one_less, limiter)


def _one_more() -> tuple[asyncio.AbstractEventLoop, CapacityLimiter]:
    limiter = anyio.to_thread.current_default_thread_limiter()
    limiter.total_tokens += 1
    return asyncio.get_running_loop(), limiter


def _one_less(limiter: CapacityLimiter) -> None:
    limiter.total_tokens -= 1


class LendingQueuePool(QueuePool):
    """SQLAlchemy's `QueuePool`, whose waiting threads lend their places."""

    _sqla_logger_namespace = "sqlalchemy.pool.impl.QueuePool"  # where users look for it

    def _do_get(self) -> ConnectionPoolEntry:
        exhausted = self._overflow >= self._max_overflow > -1
        if not (exhausted and self._pool.empty()):
            return super()._do_get()
        with place_lent():
            return super()._do_get()
