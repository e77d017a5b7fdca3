"""Writers of one SQLite file wait in line, across threads and event loops.

SQLite lets one connection write at a time and makes the others poll, without any order: under
load some starve until their time-out. Here they wait in the order they came, cost nothing
while waiting, and an async waiter does not block its loop.
"""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections import deque
from collections.abc import Callable
from queue import Empty, SimpleQueue


class Ticket:
    """One writer's place in the line; released once, and never by anybody else."""

    __slots__ = ("__weakref__", "_queue", "called", "holder", "ready")

    def __init__(self, queue: WriteQueue, holder: object, ready: Callable[[Ticket], None]) -> None:
        self._queue: WriteQueue | None = queue
        self.holder = holder
        self.ready = ready
        self.called = False  # whether it is its turn

    def release(self) -> None:
        """Leave the line, or let the next one write. Does nothing the second time."""
        queue, self._queue = self._queue, None
        if queue is not None:
            queue._leave(self)


class WriteQueue:
    """The line of writers of one database file.

    Fair: first come, first served. Not reentrant: a second write transaction on the same file
    inside the first could never commit.
    """

    def __init__(self) -> None:
        # Reentrant, because the garbage collector releases tickets too, at any allocation.
        self._mutex = threading.RLock()
        self._line: deque[Ticket] = deque()  # the first of the line is the one that writes

    def holder(self) -> object | None:
        """What holds the place of the writer now, as it was named to `acquire`."""
        with self._mutex:
            return self._line[0].holder if self._line else None

    def acquire(self, holder: object, limit: float) -> Ticket:
        """Wait in this thread until it is this writer's turn.

        Args:
            holder: who writes, for messages and for finding a scope that waits for itself.
            limit: seconds to wait at most.

        Raises:
            TimeoutError: the writers before this one did not finish in time.
        """
        turn: SimpleQueue[Ticket] = SimpleQueue()  # reentrant, which an Event is not
        ticket = self._enter(holder, turn.put)
        if not ticket.called:
            try:
                turn.get(timeout=limit)
            except Empty:
                ticket.release()
                raise TimeoutError from None
            except BaseException:  # KeyboardInterrupt
                ticket.release()
                raise
        return ticket

    async def acquire_async(self, holder: object, limit: float) -> Ticket:
        """Wait on this event loop until it is this writer's turn; see `acquire`."""
        loop = asyncio.get_running_loop()
        turn: asyncio.Future[None] = loop.create_future()

        def wake() -> None:
            if not turn.done():
                turn.set_result(None)

        def ready(ticket: Ticket) -> None:
            try:
                loop.call_soon_threadsafe(wake)
            except RuntimeError:
                # That loop was closed while its task stood in line: nobody is left to write.
                ticket.release()

        ticket = self._enter(holder, ready)
        if not ticket.called:
            try:
                async with asyncio.timeout(limit):
                    await turn
            except BaseException:
                ticket.release()
                raise
        return ticket

    def _enter(self, holder: object, ready: Callable[[Ticket], None]) -> Ticket:
        ticket = Ticket(self, holder, ready)
        with self._mutex:
            self._line.append(ticket)
            if self._line[0] is ticket:
                ticket.called = True
        return ticket

    def _leave(self, ticket: Ticket) -> None:
        with self._mutex:
            self._line.remove(ticket)
            first = self._line[0] if self._line else None
            if first is None or first.called:
                return
            first.called = True
        first.ready(first)


_queues: weakref.WeakValueDictionary[str, WriteQueue] = weakref.WeakValueDictionary()
_queues_mutex = threading.Lock()


def write_queue(file: str) -> WriteQueue:
    """The line of the writers of `file`: one for the process, however many engines there are.

    Args:
        file: the absolute path, or the unique name of a memory database.
    """
    with _queues_mutex:
        queue = _queues.get(file)
        if queue is None:
            queue = _queues[file] = WriteQueue()
        return queue
