"""A connection that comes back is not closed while somebody waits for one.

SQLAlchemy's pool for asyncio puts it into a queue, from which one who has waited takes it in the
next turn of the event loop. Those that come back in the same turn find the queue full and, beyond
`pool_size`, are closed. So the others who wait get a new connection, which costs more than most
transactions do.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from sqlalchemy.pool import AsyncAdaptedQueuePool, ConnectionPoolEntry
from sqlalchemy.util import memoized_property
from sqlalchemy.util.queue import AsyncAdaptedQueue, Full


class _Queue(asyncio.Queue[ConnectionPoolEntry]):
    """A queue that has room for `maxsize`, and for everyone who waits."""

    _waiting = 0

    @property
    def is_awaited(self) -> bool:
        """Whether more wait than there are to take."""
        return self._waiting > self.qsize()

    @property
    def surplus(self) -> int:
        """How many are beyond `maxsize`, and nobody waits for them."""
        return self.qsize() - self._waiting - self.maxsize if self.maxsize > 0 else 0

    def full(self) -> bool:
        return 0 < self.maxsize <= self.qsize() - self._waiting

    async def get(self) -> ConnectionPoolEntry:
        self._waiting += 1
        try:
            return await super().get()
        finally:
            self._waiting -= 1


class _LifoQueue(_Queue, asyncio.LifoQueue[ConnectionPoolEntry]):
    """The same, last in, first out."""


class _AdaptedQueue(AsyncAdaptedQueue[ConnectionPoolEntry]):
    @memoized_property
    def _queue(self) -> _Queue:
        return (_LifoQueue if self.use_lifo else _Queue)(maxsize=self.maxsize)


class AwaitedQueuePool(AsyncAdaptedQueuePool):
    """SQLAlchemy's `AsyncAdaptedQueuePool`, which keeps what somebody waits for."""

    _queue_class = _AdaptedQueue
    _sqla_logger_namespace = "sqlalchemy.pool.impl.AsyncAdaptedQueuePool"  # where users look for it

    @property
    def _queue(self) -> _Queue:
        """The queue of asyncio's in the one that SQLAlchemy has adapted to its pools."""
        pool: Any = self._pool
        queue: _Queue = pool._queue
        return queue

    def _do_get(self) -> ConnectionPoolEntry:
        try:
            return super()._do_get()
        except BaseException:
            # What has come back for somebody who has just been cancelled, or has waited too long.
            while self._queue.surplus > 0:
                record = self._pool.get(False)
                self._end(record, record.invalidate)  # which does not wait long
            raise

    def _do_return_conn(self, record: ConnectionPoolEntry) -> None:
        try:
            self._pool.put(record, False)
        except Full:
            self._end(record, record.close)

    def _end(self, record: ConnectionPoolEntry, close: Callable[[], None]) -> None:
        """Close the connection of `record`. Who has begun to wait meanwhile opens another one."""
        try:
            close()
        finally:
            if self._queue.is_awaited:
                self._pool.put(record, False)
            else:
                self._dec_overflow()
