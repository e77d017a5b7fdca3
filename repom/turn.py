"""One at a time, in the order in which they came."""

from __future__ import annotations

import asyncio
from collections import deque


class Turn:
    """What `asyncio.Lock` does, at no price while nobody else wants it.

    Every response and every end of a unit of work takes its turn, and hardly ever is there
    anybody to wait for; the lock would be a twentieth of what repom adds to a request.

    Attributes:
        is_taken: whether somebody has it.

    Example:
        >>> async def speak(turn: Turn) -> None:
        ...     if not turn.take_if_free():
        ...         await turn.take()
        ...     try:
        ...         ...
        ...     finally:
        ...         turn.leave()
    """

    __slots__ = ("_waiting", "is_taken")

    def __init__(self) -> None:
        self.is_taken = False
        self._waiting: deque[asyncio.Future[None]] | None = None  # made for the first who waits

    def take_if_free(self) -> bool:
        """Take it if nobody has it; whether it was so. Costs less than to await `take()`."""
        if self.is_taken:
            return False
        self.is_taken = True
        return True

    async def take(self) -> None:
        """Wait until nobody has it who came before."""
        if self.take_if_free():
            return
        if self._waiting is None:
            self._waiting = deque()
        waiting = self._waiting
        mine: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiting.append(mine)
        try:
            await mine
        except asyncio.CancelledError:
            if mine.done() and not mine.cancelled():  # it was given in the same moment
                self.leave()
            else:
                waiting.remove(mine)
            raise

    def leave(self) -> None:
        """Give it to the next one."""
        # Handed over, not released: a newcomer must not overtake those who wait.
        while self._waiting:
            next_one = self._waiting.popleft()
            if not next_one.done():
                next_one.set_result(None)
                return
        self.is_taken = False
