"""The savepoints of a session and of its connection: blocks that others wait for.

See `repom.blocks`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import TracebackType
from typing import Any, TypeVar

from sqlalchemy import NestedTransaction
from sqlalchemy.orm import SessionTransaction

from repom.blocks import Block
from repom.gate import Gate
from repom.lost_changes import doom, unwatch_clean, watch_clean
from repom.operations import leave

T = TypeVar("T")


def begin_block(session: Any, begin: Callable[[], T]) -> T:
    """Begin a savepoint, which is for the running task and those it starts; see `repom.blocks`."""
    blocks = session.repom_gate.blocks
    # Before it is begun: what others add during the flush at its beginning is a part of it.
    block = session.repom_gate.begin_block()
    watch_clean(session)
    try:
        savepoint: Any = begin()
    except BaseException:
        unwatch_clean(session)
        blocks.end(block, undone=False)
        raise
    savepoint.__class__ = _MANAGED_SAVEPOINTS[type(savepoint)]
    block.savepoint = savepoint
    return savepoint  # type: ignore[no-any-return]


def block_ended(session: Any, savepoint: object, *, undone: bool) -> None:
    """The savepoint has been released, or rolled back."""
    block = session.repom_gate.blocks.of(savepoint)
    if block is not None:
        _end_block(session, block, undone=undone)


def blocks_ended(session: Any, *, undone: bool) -> None:
    """The transaction has ended, and with it what savepoints of the connection are still open."""
    for block in reversed(session.repom_gate.blocks.open):
        _end_block(session, block, undone=undone)


def _end_block(session: Any, block: Block, *, undone: bool) -> None:
    unwatch_clean(session)
    if session.repom_gate.blocks.end(block, undone=undone):
        doom(
            session,
            "an atomic(), begin_nested() or begin() block was rolled back, and while it was open "
            "another task had changed objects of the same session: these changes are lost with it.",
        )


def _leaving(method: Callable[..., Any], *, undoing: bool) -> Callable[..., Any]:
    """A method that ends a savepoint, as one that passes the gate."""

    @functools.wraps(method)
    def operation(self: Any, *args: Any, **kwargs: Any) -> Any:
        session = self.repom_session
        gate: Gate = session.repom_gate
        try:
            if not gate.enter(ending=undoing, committing=not undoing):
                return method(self, *args, **kwargs)
            try:
                return method(self, *args, **kwargs)
            finally:
                leave(session)
        except BaseException:
            if undoing and self.is_active:
                doom(
                    session,
                    "an atomic(), begin_nested() or begin() block that failed was not rolled back: "
                    "its task was cancelled while it waited for its turn to do so.",
                )
            raise

    return operation


class _Savepoint:
    """What savepoints of the session and of its connection have in common."""

    __slots__ = ()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        savepoint: Any = self
        was_active = savepoint.is_active
        super().__exit__(kind, error, tb)  # type: ignore[misc]
        if kind is None and not was_active:
            # SQLAlchemy takes it for ended by hand. If the owner has ended the transaction, then
            # whoever thinks that the block has succeeded is wrong.
            savepoint.repom_session.repom_gate.refuse_if_over()


class _SessionSavepoint(_Savepoint, SessionTransaction):
    """What `Session.begin_nested()` gives; its end is an event of the session."""

    commit = _leaving(SessionTransaction.commit, undoing=False)
    rollback = _leaving(SessionTransaction.rollback, undoing=True)
    close = _leaving(SessionTransaction.close, undoing=True)

    @property
    def repom_session(self) -> Any:
        return self.session


class _ConnectionSavepoint(_Savepoint, NestedTransaction):
    """What `Connection.begin_nested()` gives."""

    __slots__ = ()

    @property
    def repom_session(self) -> Any:
        connection: Any = self.connection
        return connection.repom_session

    def commit(self) -> None:
        self._end(NestedTransaction.commit, undoing=False)

    def rollback(self) -> None:
        self._end(NestedTransaction.rollback, undoing=True)

    def close(self) -> None:
        self._end(NestedTransaction.close, undoing=True)

    def _end(self, method: Callable[..., Any], *, undoing: bool) -> None:
        try:
            _leaving(method, undoing=undoing)(self)
        finally:
            if not self.is_active:
                block_ended(self.repom_session, self, undone=undoing)


_MANAGED_SAVEPOINTS: dict[type, type] = {
    SessionTransaction: _SessionSavepoint,
    NestedTransaction: _ConnectionSavepoint,
}
