"""One session, several tasks: statements queue, and after the end they are refused.

A SQLAlchemy session serves one caller at a time
(https://docs.sqlalchemy.org/en/21/orm/session_basics.html#is-the-session-thread-safe-is-asyncsession-safe-to-share-in-concurrent-tasks).
The tasks of one request share theirs, so every operation passes a gate first. The gate stands
in the sync `Session` class, below `awaitable_attrs`, `run_sync`, lazy loads and every subclass
of `AsyncSession`.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from typing import Any, Protocol

from sqlalchemy.util import await_only

from repom.errors import ScopeClosedError


class Gate(Protocol):
    """Lets one caller in at a time."""

    closed: bool

    @property
    def is_free(self) -> bool:
        """Whether nobody is inside."""

    def enter(self, *, ending: bool = False) -> bool:
        """Wait until it is the caller's turn.

        Args:
            ending: the caller ends the transaction, which a closed gate allows.

        Returns:
            False if the caller is inside already, and must not `leave` now.

        Raises:
            ScopeClosedError: the scope has ended.
        """

    def leave(self) -> None:
        """Let the next one in."""


class TaskGate:
    """The gate of an async session: tasks of one event loop, first come, first served."""

    __slots__ = ("_owner", "_waiters", "closed")

    def __init__(self) -> None:
        self.closed = False
        self._owner: asyncio.Task[Any] | None = None
        self._waiters: deque[tuple[asyncio.Future[None], asyncio.Task[Any] | None]] = deque()

    @property
    def is_free(self) -> bool:
        return self._owner is None

    def enter(self, *, ending: bool = False) -> bool:
        me = asyncio.current_task()
        if self._owner is not None:
            if self._owner is me:
                return False
            self._wait(me)
        self._owner = me
        if self.closed and not ending:
            self.leave()
            raise scope_closed()
        return True

    def leave(self) -> None:
        # Handed over, not released: a newcomer must not overtake those who wait.
        while self._waiters:
            turn, task = self._waiters.popleft()
            if not turn.done():
                self._owner = task
                turn.set_result(None)
                return
        self._owner = None

    def _wait(self, me: asyncio.Task[Any] | None) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append((turn, me))
        try:
            await_only(turn)
        except BaseException:
            if self._owner is me:  # cancelled when it was already our turn
                self.leave()
            turn.cancel()
            raise


class ThreadGate:
    """The gate of a sync session: threads."""

    __slots__ = ("_lock", "_owner", "closed")

    def __init__(self) -> None:
        self.closed = False
        self._lock = threading.Lock()
        self._owner: int | None = None

    @property
    def is_free(self) -> bool:
        return not self._lock.locked()

    def enter(self, *, ending: bool = False) -> bool:
        me = threading.get_ident()
        if self._owner == me:
            return False
        self._lock.acquire()
        self._owner = me
        if self.closed and not ending:
            self.leave()
            raise scope_closed()
        return True

    def leave(self) -> None:
        self._owner = None
        self._lock.release()


def scope_closed() -> ScopeClosedError:
    """The error for work that comes after the end."""
    return ScopeClosedError(
        "this session's unit of work has ended: the response was sent, or its block was left.\n"
        "Work that outlives it needs a transaction of its own: "
        "`async with session_scope() as session:` (or `with sync_session_scope()`)."
    )
