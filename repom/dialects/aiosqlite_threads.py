"""aiosqlite: the threads of connections whose end nobody awaits.

What such a thread was doing when its task was cancelled, it still tells to the event loop. If that
is closed by then, an exception ends the thread, and Python prints it.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from typing import Any

from sqlalchemy import Engine
from sqlalchemy.util import await_only
from sqlalchemy.util.concurrency import in_greenlet

#: Seconds that an engine which is disposed of waits for them, at most.
LIMIT = 5.0

#: Seconds between two looks at them.
_LOOK_EVERY = 0.01


class AbandonedThreads:
    """The threads of an engine's connections that were closed without waiting for them."""

    def __init__(self) -> None:
        # Replaced and never changed: the garbage collector stops connections, too, in any thread
        # and at any moment.
        self._threads: list[threading.Thread] = []

    def wait_on_dispose(self, engine: Engine) -> None:
        """Let `dispose()` of `engine` wait for them: repom calls it before a loop is closed."""
        dispose = engine.dispose

        def dispose_and_wait(close: bool = True) -> None:
            dispose(close)
            if close and in_greenlet() and self._alive():
                await_only(self._ended())

        # No "engine_disposed": a single listener makes SQLAlchemy prepare for all of the engine's
        # events at every statement.
        engine.dispose = dispose_and_wait  # type: ignore[method-assign]

    def stop(self, driver_connection: Any) -> None:
        """Close the connection as soon as its thread comes to it, and go on."""
        if sys.is_finalizing():
            return  # no thread starts any more, and this would wait for ever
        # From a thread without a loop: else it makes a future of the running one, which may be
        # closed before aiosqlite's thread comes to tell it.
        thread = threading.Thread(target=driver_connection.stop)
        thread.start()
        thread.join()
        self._threads = [*self._alive(), driver_connection._thread]

    def _alive(self) -> list[threading.Thread]:
        return [thread for thread in self._threads if thread.is_alive()]

    async def _ended(self) -> None:
        # No thread that waits for them: the pool of threads may be busy, or shut down.
        loop = asyncio.get_running_loop()
        end = loop.time() + LIMIT
        while self._alive() and loop.time() < end:  # noqa: ASYNC110 - a thread sets no event
            await asyncio.sleep(_LOOK_EVERY)
