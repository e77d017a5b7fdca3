"""What lies beneath a session: its connection, its savepoints, and the rows of a stream.

Code that has got hold of one of them may use it beside the session, and may still have it after
the end, when the connection serves somebody else. So all of them pass the session's gate.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from types import TracebackType
from typing import Any, TypeVar

from sqlalchemy import Connection, CursorResult, Engine, NestedTransaction, TextClause
from sqlalchemy.engine.cursor import BufferedRowCursorFetchStrategy
from sqlalchemy.orm import Session, SessionTransaction
from sqlalchemy.util import await_only
from sqlalchemy.util.concurrency import in_greenlet

from repom import deferred
from repom.blocks import Block
from repom.context import surroundings
from repom.cursors import Cursors
from repom.dialects.read_only import makes_writable
from repom.errors import InnerCommitError, ReadOnlyError
from repom.gate import Gate, scope_closed
from repom.lost_changes import doom, unwatch_clean, watch_clean
from repom.observer import committing_apart

T = TypeVar("T")


def through_the_gate(method: Callable[..., Any]) -> Callable[..., Any]:
    """An operation of a session as one that waits for the caller's turn to use it."""

    @functools.wraps(method)
    def operation(self: Any, *args: Any, **kwargs: Any) -> Any:
        entered = _enter(self)
        try:
            return method(self, *args, **kwargs)
        finally:
            if entered:
                _leave(self)

    return operation


def inside(session: Any, method: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Call `method` when it is the caller's turn to use the session."""
    entered = _enter(session)
    try:
        return method(*args, **kwargs)
    finally:
        if entered:
            _leave(session)


def _enter(session: Any) -> bool:
    """Wait until it is the caller's turn; False if it is inside already, and is not to leave."""
    gate: Gate = session.repom_gate
    if not gate.enter():
        return False
    if deferred.pending:
        try:
            wait_for_deferred(session)
            gate.refuse_if_over()  # the scope may have ended meanwhile
        except BaseException:
            _leave(session)
            raise
    return True


def _leave(session: Any) -> None:
    gate: Gate = session.repom_gate
    if not session.repom_abandoned:
        gate.leave()
        return
    try:
        session._for_real("close")
        raise scope_closed()
    finally:
        gate.leave()


def wait_for_deferred(session: Session) -> None:
    """Take a connection only after the commits that this loop still owes.

    Not who has one already, here or in an enclosing scope: an ending may be waiting for that.
    """
    transaction = session.get_transaction()
    if not in_greenlet() or (transaction is not None and transaction._connections):
        return
    here = surroundings.get()
    outer = here.parent if here is not None else None
    while outer is not None:
        if outer.in_transaction:
            return
        outer = outer.parent
    await_only(deferred.settled())


# --- the connection

#: Methods of Connection that talk to the database, and those of them that send a statement.
_OPERATIONS = ("rollback", "scalars")
_EXECUTIONS = ("execute", "scalar")

# What ends the transaction unseen by SQLAlchemy: asyncpg and SQLite would commit each of the
# statements that follow by itself.
_ENDS_BY_HAND = re.compile(
    r"\s*(?:COMMIT|END|ABORT|BEGIN|START\s+TRANSACTION"
    r"|ROLLBACK(?!\s+(?:(?:WORK|TRANSACTION)\s+)?TO\b))\b",
    re.IGNORECASE,
)


def manage_connections(engine: Engine) -> None:
    """Let the connections of `engine` be such that a session can manage them.

    They can be made so later. But Python finds the attributes of an object faster that has been
    of one class all the time.
    """
    known: Any = engine
    known._connection_cls = _managed(known._connection_cls)


def manage_connection(connection: Any, session: Any) -> None:
    """Let what is done with `connection` pass the gate of `session`, which has begun on it."""
    if not hasattr(
        connection, "repom_is_managed"
    ):  # of a two-phase or a test's engine, or not ours
        connection.__class__ = _managed(connection.__class__)
    connection.repom_session = session


def _operation(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def operation(self: Any, *args: Any, **kwargs: Any) -> Any:
        session = self.repom_session
        if session is None:
            return method(self, *args, **kwargs)
        # Nearly always it is called by an operation of the session, which is inside.
        entered = not session.repom_gate.is_nested and _enter(session)
        try:
            return method(self, *args, **kwargs)
        finally:
            if entered:
                _leave(session)

    return operation


def _execution(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def execution(
        self: Any, statement: Any, parameters: Any = None, *, execution_options: Any = None
    ) -> Any:
        session = self.repom_session
        if session is None:
            return method(self, statement, parameters, execution_options=execution_options)
        _refuse_by_hand(session, statement)
        entered = not session.repom_gate.is_nested and _enter(session)
        try:
            cursors: Cursors = session.repom_cursors
            cursors.make_way(statement, self.dialect)
            result = method(self, statement, parameters, execution_options=execution_options)
            if isinstance(result, CursorResult) and not result._soft_closed:
                cursors.watch(result)
                strategy = result.cursor_strategy
                if type(strategy) is BufferedRowCursorFetchStrategy:
                    strategy.__class__ = _Rows
            return result
        finally:
            if entered:
                _leave(session)

    return execution


_driver_sql = _execution(Connection.exec_driver_sql)


def _exec_driver_sql(
    self: Any, statement: str, parameters: Any = None, execution_options: Any = None
) -> Any:
    return _driver_sql(self, statement, parameters, execution_options=execution_options)


def _end_of_transaction(method: Callable[[Any], None]) -> Callable[[Any], None]:
    @functools.wraps(method)
    def end(self: Any) -> None:
        session = self.repom_session
        if session is not None:
            session.repom_cursors.close()
        method(self)

    return end


def _commit(self: Any) -> None:
    """What `commit()` of the session means, which may have done more on the connection."""
    session = self.repom_session
    if session is None:
        Connection.commit(self)
        return
    policy = session.repom_inner_commits
    if policy == "forbid":
        raise commit_forbidden("commit")
    if policy == "allow":
        with committing_apart():
            Connection.commit(self)


def commit_forbidden(method: str) -> InnerCommitError:
    """The error for `commit()` by code that does not own the transaction."""
    return InnerCommitError(
        f'`{method}()` was called in a unit of work with inner_commits="forbid".\n'
        "Its owner commits. Remove the call, write `await session.flush()` if ids are needed, "
        "or commit on purpose with `await current_scope().commit()`."
    )


def _begin_nested(self: Any) -> NestedTransaction:
    session = self.repom_session
    if session is None:
        return Connection.begin_nested(self)
    begin = functools.partial(Connection.begin_nested, self)
    # The session's own savepoint is a block already.
    return begin() if session.repom_gate.is_mine else inside(session, begin_block, session, begin)


_MANAGED: dict[str, Any] = {
    "repom_is_managed": True,
    "repom_session": None,  # the one that has begun on it
    **{name: _operation(getattr(Connection, name)) for name in _OPERATIONS},
    **{name: _execution(getattr(Connection, name)) for name in _EXECUTIONS},
    "exec_driver_sql": _exec_driver_sql,
    "begin_nested": _begin_nested,
    "commit": _operation(_commit),
    # Whoever ends it: the owner, `session.rollback()`, a `commit()` that is allowed.
    "_commit_impl": _end_of_transaction(Connection._commit_impl),
    "_rollback_impl": _end_of_transaction(Connection._rollback_impl),
}


@functools.cache
def _managed(base: Any) -> Any:
    """The class of connections that a session can manage: some engines have one of their own."""
    if hasattr(base, "repom_is_managed"):
        return base
    return type(f"Managed{base.__name__}", (base,), _MANAGED)


def ends_by_hand(sql: str) -> bool:
    """Whether `sql` begins or ends a transaction."""
    return _ENDS_BY_HAND.match(sql) is not None


def _refuse_by_hand(session: Any, statement: Any) -> None:
    sql = statement.text if isinstance(statement, TextClause) else statement
    if not isinstance(sql, str):
        return
    if session.repom_reads_only and makes_writable(sql):
        raise ReadOnlyError(
            f"{session.repom_label} only reads (`read_only`), and {sql.strip()!r} "
            "would let its connection write, and that of whoever gets it next.\n"
            "Write in a unit of work of its own: `async with session_scope() as session:`."
        )
    if ends_by_hand(sql):
        raise InnerCommitError(
            f"{sql.strip()!r} was executed, which would end the transaction behind the back of "
            "its owner.\nWrite `await session.rollback()`, `await current_scope().commit()`, or "
            "`async with atomic():` for a savepoint."
        )


# --- savepoints


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
                _leave(session)
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


# --- rows


def _fetching(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def operation(self: Any, result: Any, *args: Any, **kwargs: Any) -> Any:
        return inside(result.connection.repom_session, method, self, result, *args, **kwargs)

    return operation


class _Rows(BufferedRowCursorFetchStrategy):
    """How a result gets its rows from the server, bit by bit."""

    __slots__ = ()

    fetchone = _fetching(BufferedRowCursorFetchStrategy.fetchone)
    fetchmany = _fetching(BufferedRowCursorFetchStrategy.fetchmany)
    fetchall = _fetching(BufferedRowCursorFetchStrategy.fetchall)
    soft_close = _fetching(BufferedRowCursorFetchStrategy.soft_close)
    hard_close = _fetching(BufferedRowCursorFetchStrategy.hard_close)
