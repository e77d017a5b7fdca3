"""aiosqlite: the threads of connections whose end nobody awaits.

What such a thread was doing when its task was cancelled, it still tells to the event loop. If that
is closed by then, an exception ends the thread, and Python prints it.
"""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any
from weakref import WeakSet

from sqlalchemy import Engine
from sqlalchemy.util import await_only
from sqlalchemy.util.concurrency import in_greenlet

#: Seconds that an engine which is disposed of waits for them, at most.
LIMIT = 5.0


class AbandonedThreads:
    """The threads of an engine's connections that were closed without waiting for them."""

    def __init__(self) -> None:
        self._threads: WeakSet[threading.Thread] = WeakSet()

    def watch(self, engine: Engine) -> None:
        """Let `engine` wait for them when it is disposed of, as its event loop does in the end."""
        dispose = engine.dispose

        def dispose_and_wait(close: bool = True) -> None:
            dispose(close)
            if in_greenlet() and any(thread.is_alive() for thread in self._threads):
                await_only(asyncio.to_thread(self._join))

        # No "engine_disposed": a single listener makes SQLAlchemy prepare for all of the engine's
        # events at every statement.
        engine.dispose = dispose_and_wait  # type: ignore[method-assign]

    def stop(self, driver_connection: Any) -> None:
        """Close the connection as soon as its thread comes to it, and go on."""
        self._threads.add(driver_connection._thread)
        # From a thread without a loop: else it makes a future of the running one, which may be
        # closed before aiosqlite's thread comes to tell it.
        thread = threading.Thread(target=driver_connection.stop)
        thread.start()
        thread.join()

    def _join(self) -> None:
        end = time.monotonic() + LIMIT
        for thread in list(self._threads):
            thread.join(max(0, end - time.monotonic()))
