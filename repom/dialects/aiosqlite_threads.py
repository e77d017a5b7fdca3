"""aiosqlite: the threads of connections whose end nobody awaits.

What such a thread was doing when its task was cancelled, it still tells to the event loop. If that
is closed by then, an exception ends the thread, and Python prints it.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from collections import deque
from functools import partial
from typing import Any

from sqlalchemy import Engine
from sqlalchemy.util import await_only
from sqlalchemy.util.concurrency import in_greenlet

#: Seconds that an engine which is disposed of waits for them, at most.
LIMIT = 5.0

#: So many are waited for: the last ones.
MOST = 100

#: Seconds between two looks at them.
_LOOK_EVERY = 0.01


class AbandonedThreads:
    """The threads of an engine's connections that were closed without waiting for them."""

    def __init__(self) -> None:
        self._threads: deque[threading.Thread] = deque(maxlen=MOST)

    def wait_on_dispose(self, engine: Engine) -> None:
        """Let `dispose()` of `engine` wait for them: repom calls it before a loop is closed."""
        dispose = engine.dispose

        def dispose_and_wait(close: bool = True) -> None:
            dispose(close)
            if close and in_greenlet() and self._are_alive():
                await_only(self._ended())

        # No "engine_disposed": a single listener makes SQLAlchemy prepare for all of the engine's
        # events at every statement.
        engine.dispose = dispose_and_wait  # type: ignore[method-assign]

    def stop(self, driver_connection: Any) -> None:
        """Close the connection as soon as its thread comes to it, and go on.

        aiosqlite's `stop()` does the same, and makes a future of the running loop, which may be
        closed before the thread comes to tell it. The garbage collector calls this, too, in any
        thread and at any moment: so it takes no lock.
        """
        self._threads.append(driver_connection._thread)
        driver_connection._running = False
        driver_connection._tx.put_nowait((None, partial(_close, driver_connection)))

    def _are_alive(self) -> bool:
        return any(thread.is_alive() for thread in tuple(self._threads))

    async def _ended(self) -> None:
        # No thread that waits for them: the pool of threads may be busy, or shut down.
        loop = asyncio.get_running_loop()
        end = loop.time() + LIMIT
        while self._are_alive() and loop.time() < end:  # noqa: ASYNC110 - a thread sets no event
            await asyncio.sleep(_LOOK_EVERY)


def _close(driver_connection: Any) -> object:
    """Close it in its thread, which ends with what this returns."""
    aiosqlite: Any = sys.modules[type(driver_connection).__module__]
    sqlite = driver_connection._connection
    if sqlite is not None:
        sqlite.close()
        driver_connection._connection = None
    return aiosqlite._STOP_RUNNING_SENTINEL
