"""Waiting until something has changed, in a thread or on an event loop."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue

from sqlalchemy.util import await_only


class Changes:
    """Tells those who wait that something has changed; they look for themselves what."""

    def __init__(self) -> None:
        # Reentrant, because the garbage collector notifies too, at any allocation.
        self._mutex = threading.RLock()
        self._wakes: list[Callable[[], None]] = []

    def notify(self) -> None:
        """Wake all who wait."""
        with self._mutex:
            wakes, self._wakes = self._wakes, []
        for wake in wakes:
            wake()

    def next(self, *, awaits: bool) -> Callable[[float], None]:
        """What waits for a change from now on, but no longer than so many seconds.

        To be asked for before looking, so that no change is missed in between.

        Args:
            awaits: by awaiting, as code in a greenlet of SQLAlchemy can, and not by blocking.
        """
        if not awaits:
            changed: SimpleQueue[None] = SimpleQueue()  # reentrant, which an Event is not
            self._add(functools.partial(changed.put, None))
            return functools.partial(_wait_in_thread, changed)
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        self._add(functools.partial(_wake_in_loop, loop, future))
        return lambda seconds: await_only(_wait_in_loop(future, seconds))

    def _add(self, wake: Callable[[], None]) -> None:
        with self._mutex:
            self._wakes.append(wake)


def _wake_in_loop(loop: asyncio.AbstractEventLoop, changed: asyncio.Future[None]) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(_set, changed)


def _set(changed: asyncio.Future[None]) -> None:
    if not changed.done():
        changed.set_result(None)


async def _wait_in_loop(changed: asyncio.Future[None], seconds: float) -> None:
    await asyncio.wait((changed,), timeout=seconds)


def _wait_in_thread(changed: SimpleQueue[None], seconds: float) -> None:
    with contextlib.suppress(Empty):
        changed.get(timeout=seconds)
