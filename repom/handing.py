"""A connection that comes back is not closed while somebody waits for one.

SQLAlchemy's pool for asyncio puts it into a queue, from which the one who has waited takes it in
the next turn of the event loop. Those that come back in the same turn find the queue full and,
beyond `pool_size`, are closed. So the others who wait get a new connection, which costs more than
most transactions do.
"""

from __future__ import annotations

import asyncio

from sqlalchemy.pool import AsyncAdaptedQueuePool, ConnectionPoolEntry
from sqlalchemy.util import memoized_property
from sqlalchemy.util.queue import AsyncAdaptedQueue, Full


class _Queue(AsyncAdaptedQueue[ConnectionPoolEntry]):
    """A queue whose size does not count what somebody waits for."""

    _waiting = 0

    @memoized_property
    def _queue(self) -> asyncio.Queue[ConnectionPoolEntry]:
        return asyncio.LifoQueue() if self.use_lifo else asyncio.Queue()  # full is what we say

    def full(self) -> bool:
        return 0 < self.maxsize <= self._queue.qsize() - self._waiting

    def put_nowait(self, item: ConnectionPoolEntry) -> None:
        if self.full():
            raise Full
        super().put_nowait(item)

    def get(self, block: bool = True, timeout: float | None = None) -> ConnectionPoolEntry:
        if not (block and self.empty()):
            return self.get_nowait()
        self._waiting += 1
        try:
            return super().get(block, timeout)
        finally:
            self._waiting -= 1


class HandingQueuePool(AsyncAdaptedQueuePool):
    """SQLAlchemy's `AsyncAdaptedQueuePool`, which hands a connection to who waits for it."""

    _queue_class = _Queue
    _sqla_logger_namespace = "sqlalchemy.pool.impl.AsyncAdaptedQueuePool"  # where users look for it
