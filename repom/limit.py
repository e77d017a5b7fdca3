"""Time limits of what is hardly ever late.

`loop.call_later()` for each COMMIT would be a tenth of what repom adds to a request, and is taken
back every time. So all limits of an event loop share a timer, which is set again only when it
rings, or for who is due earlier.
"""

from __future__ import annotations

import asyncio
import math
import threading
import weakref
from collections.abc import Callable
from contextvars import Context

#: Seconds between two attempts to cancel what is past its limit.
_INSIST_EVERY = 1.0

# A timer keeps the context in which it was set, and with that, by default, a unit of work.
_NOTHING = Context()


class _Here(threading.local):
    timer: _Timer | None = None


_here = _Here()


class Limit:
    """Calls `cancel` when the time is over, and again until it is lifted.

    Args:
        seconds: from now on.
    """

    __slots__ = ("_cancel", "_timer", "is_over", "when")

    def __init__(self, seconds: float, cancel: Callable[[], object]) -> None:
        loop = asyncio.get_running_loop()
        timer = _here.timer
        if timer is None or timer.loop() is not loop:
            timer = _here.timer = _Timer(loop)
        self.is_over = False
        self.when = loop.time() + seconds
        self._cancel: Callable[[], object] | None = cancel
        self._timer = timer
        timer.limits.add(self)
        if self.when < timer.rings_at:
            timer.ring_at(self.when, loop)

    def lift(self) -> None:
        self._timer.limits.discard(self)
        self._cancel = None  # whose object may lead back here

    def expire(self, now: float) -> None:
        """Cancel, and insist later."""
        self.is_over = True
        self.when = now + _INSIST_EVERY
        if self._cancel is not None:
            self._cancel()


class _Timer:
    """Rings for the limits of one event loop, which it does not keep alive.

    Attributes:
        rings_at: when it rings next.
    """

    __slots__ = ("limits", "loop", "rings_at")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = weakref.ref(loop)
        self.limits: set[Limit] = set()
        self.rings_at = math.inf

    def ring_at(self, when: float, loop: asyncio.AbstractEventLoop) -> None:
        """Ring then, and not when it was to ring before."""
        self.rings_at = when
        # Its handle, to cancel it by, would keep the loop alive.
        loop.call_at(when, self._ring, when, context=_NOTHING)

    def _ring(self, when: float) -> None:
        if when != self.rings_at:
            return
        loop = asyncio.get_running_loop()
        self.rings_at = math.inf
        now = loop.time()
        for limit in [limit for limit in self.limits if limit.when <= now]:
            limit.expire(now)
        if self.limits:
            self.ring_at(min(limit.when for limit in self.limits), loop)
