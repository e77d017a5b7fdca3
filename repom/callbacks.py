"""What is to be called once a transaction has ended one way or the other."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

from sqlalchemy.orm import SessionTransaction

Callback = Callable[[], Any]


class Due(NamedTuple):
    """A callback to run now.

    Attributes:
        in_thread: it was registered in a thread without an event loop, as code of `def`
            endpoints is, and may block.
    """

    callback: Callback
    in_thread: bool


class _Registered(NamedTuple):
    due: Due
    savepoint: SessionTransaction | None  # the innermost one, when it was registered


class Capture(NamedTuple):
    """Where a test collects the `on_commit` callbacks that become due.

    Attributes:
        callbacks: these, in order.
        execute: whether they are run all the same.
    """

    callbacks: list[Callback]
    execute: bool


#: Those under way; empty outside of tests.
captures: list[Capture] = []


class Callbacks:
    """The `on_commit` and `on_rollback` callbacks of one scope, in order.

    They become due when the transaction they were registered in ends. Those of a savepoint
    that is rolled back are decided then: its `on_commit` is dropped, its `on_rollback` due.
    Due callbacks run when no transaction is open, so at the end of the whole transaction.
    """

    __slots__ = ("_due", "_on_commit", "_on_rollback")

    def __init__(self) -> None:
        self._on_commit: list[_Registered] = []
        self._on_rollback: list[_Registered] = []
        self._due: deque[Due] | None = None  # most requests have none

    def on_commit(self, callback: Callback, savepoint: SessionTransaction | None) -> None:
        self._on_commit.append(_register(callback, savepoint))

    def on_rollback(self, callback: Callback, savepoint: SessionTransaction | None) -> None:
        self._on_rollback.append(_register(callback, savepoint))

    def committed(self) -> None:
        """The transaction has been committed."""
        if self._on_commit or self._on_rollback:
            committed = [registered.due for registered in self._on_commit]
            for capture in captures:
                capture.callbacks.extend(due.callback for due in committed)
            if all(capture.execute for capture in captures):
                self._now_due(committed)
            self._clear()

    def rolled_back(self) -> None:
        """The transaction has been rolled back."""
        if self._on_commit or self._on_rollback:
            self._now_due([registered.due for registered in self._on_rollback])
            self._clear()

    def savepoint_rolled_back(self, savepoint: SessionTransaction) -> None:
        """The work since this savepoint has been undone, with that of savepoints inside it."""
        self._on_commit = [r for r in self._on_commit if not _inside(r.savepoint, savepoint)]
        registered, self._on_rollback = self._on_rollback, []
        for each in registered:
            if _inside(each.savepoint, savepoint):
                self._now_due([each.due])
            else:
                self._on_rollback.append(each)

    def next_due(self) -> Due | None:
        """The next callback to run now; each is given out once."""
        return self._due.popleft() if self._due else None

    def forget(self) -> int:
        """Forget those of a transaction whose outcome is not known; how many there were."""
        count = len(self._on_commit) + len(self._on_rollback)
        self._clear()
        return count

    def drop(self) -> int:
        """Forget all of them, those that are due too; how many there were."""
        if self.is_empty:
            return 0
        due, self._due = self._due, None
        return self.forget() + len(due or ())

    def _now_due(self, more: list[Due]) -> None:
        if self._due is None:
            self._due = deque()
        self._due += more

    def _clear(self) -> None:
        self._on_commit = []
        self._on_rollback = []

    @property
    def has_due(self) -> bool:
        """Whether there is one to run now."""
        return bool(self._due)

    @property
    def is_empty(self) -> bool:
        """Whether nothing is registered or due."""
        return not (self._due or self._on_commit or self._on_rollback)


#: Of a scope that nobody has asked for anything.
NONE_REGISTERED = Callbacks()


class _ToldByTheOwner(Callbacks):
    """None: of a session that its owner is ending, who knows more than the session does."""

    __slots__ = ()

    def committed(self) -> None:
        pass

    def rolled_back(self) -> None:
        pass

    def savepoint_rolled_back(self, savepoint: SessionTransaction) -> None:
        pass


TOLD_BY_THE_OWNER = _ToldByTheOwner()


def _register(callback: Callback, savepoint: SessionTransaction | None) -> _Registered:
    return _Registered(Due(callback, asyncio._get_running_loop() is None), savepoint)


def _inside(savepoint: SessionTransaction | None, outer: SessionTransaction) -> bool:
    while savepoint is not None:
        if savepoint is outer:
            return True
        savepoint = savepoint.parent
    return False
