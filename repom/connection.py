"""The connection of a session, and the rows that a result still gets from it.

Code that has got hold of one of them may use it beside the session, and may still have it after
the end, when the connection serves somebody else. So both pass the session's gate.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

from sqlalchemy import Connection, CursorResult, Engine, NestedTransaction, TextClause
from sqlalchemy.engine.cursor import BufferedRowCursorFetchStrategy

from repom.cursors import Cursors
from repom.dialects.read_only import makes_writable
from repom.errors import InnerCommitError, ReadOnlyError
from repom.observer import committing_apart
from repom.operations import enter, inside, leave
from repom.savepoints import begin_block

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
        entered = not session.repom_gate.is_nested and enter(session)
        try:
            return method(self, *args, **kwargs)
        finally:
            if entered:
                leave(session)

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
        entered = not session.repom_gate.is_nested and enter(session)
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
                leave(session)

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
