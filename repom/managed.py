"""The `Session` class of the sessions that a scope hands out.

It is the application's own class (`Database(session_class=...)`) with three things added:
operations pass the gate, `commit()`, `begin()` and `close()` by code that does not own the
transaction mean what `inner_commits` says, and `end()` is the owner's way to really end it.
"""

from __future__ import annotations

import asyncio
import functools
import re
from collections.abc import Callable
from typing import Any, Literal

from sqlalchemy import Connection, TextClause, event
from sqlalchemy.exc import PendingRollbackError
from sqlalchemy.orm import Session, SessionTransaction
from sqlalchemy.util import await_only
from sqlalchemy.util.concurrency import in_greenlet

from repom import deferred
from repom.callbacks import Callbacks
from repom.context import surroundings
from repom.cursors import Cursors
from repom.dialects.base import CLOSED_BY_COMMIT, aborted
from repom.errors import ConcurrentSessionUse, InnerCommitError, TransactionError
from repom.gate import Gate, scope_closed

InnerCommits = Literal["defer", "allow", "forbid"]

#: Methods of Session that may talk to the database.
_OPERATIONS = (
    "bulk_insert_mappings",
    "bulk_save_objects",
    "bulk_update_mappings",
    "connection",
    "delete",
    "delete_all",
    "execute",
    "flush",
    "get",
    "get_one",
    "invalidate",
    "merge",
    "merge_all",
    "prepare",
    "refresh",
    "rollback",
    "scalar",
    "scalars",
)

#: The same of Connection, and those of them that send a statement.
_CONNECTION_OPERATIONS = ("begin_nested", "commit", "rollback", "scalars")
_EXECUTIONS = ("exec_driver_sql", "execute", "scalar")


class Managed:
    """The part of a managed session that does not depend on the application's class.

    Attributes:
        repom_gate: set by the scope.
        repom_inner_commits: what `commit()` by others means.
        repom_callbacks: told of the ends that the owner has not asked for: of savepoints, and
            of the transaction by `rollback()` and inner commits.
        repom_cursors: the results that may still be read from the database.
        repom_committed: the transaction or savepoint that is about to end, if by a commit.
        repom_abandoned: whether the end could not wait any longer for the task that is inside.
    """

    repom_gate: Gate
    repom_inner_commits: InnerCommits
    repom_callbacks: Callbacks
    repom_cursors: Cursors
    repom_committed: SessionTransaction | None = None
    repom_abandoned = False

    def end(self, how: Literal["flush", "commit", "rollback", "close"]) -> None:
        """End the transaction for real. Only the owner of the scope calls this.

        Raises:
            TransactionError: another task did not leave the session within the time limit.
        """
        raise NotImplementedError  # pragma: no cover - made by managed_class


_managed: dict[type[Session], type[Session]] = {}


def managed_class(base: type[Session]) -> type[Session]:
    """A subclass of `base` whose instances a scope can manage. One for each `base`."""
    found = _managed.get(base)
    return found if found is not None else _managed.setdefault(base, _make(base))


def _make(base: type[Session]) -> type[Session]:
    def rollback(session: Session) -> None:
        # Detached first, the objects keep what they have loaded. Rolled back with them,
        # the session would expire every one, and an error page that shows a name would
        # have to ask the database again.
        session.expunge_all()
        base.rollback(session)

    endings = {
        "flush": base.flush,
        "commit": base.commit,
        "rollback": rollback,
        "close": base.close,
    }

    def end(self: Any, how: Literal["flush", "commit", "rollback", "close"]) -> None:
        if self.repom_abandoned:
            return
        gate: Gate = self.repom_gate
        try:
            entered = gate.enter(ending=True)
        except asyncio.CancelledError as error:  # by the time limit, for nobody else can
            _abandon(self)
            raise TransactionError(
                f"{how} had to wait for a statement of another task, which did not end within "
                "the time limit; its connection was closed."
            ) from error
        # The owner tells the callbacks itself, once it knows how all its databases ended.
        callbacks, self.repom_callbacks = self.repom_callbacks, Callbacks()
        try:
            if deferred.pending and how in ("flush", "commit"):
                _wait_for_deferred(self)
            # Also before the flush, for which MySQL could not send the rows any more.
            self.repom_cursors.close()
            endings[how](self)
        except PendingRollbackError as error:
            # A flush failed, its error was swallowed, and SQLAlchemy has rolled back.
            raise aborted() from error
        finally:
            self.repom_callbacks = callbacks
            if entered:
                gate.leave()

    def begin(self: Any, nested: bool = False) -> SessionTransaction:
        policy = self.repom_inner_commits
        if not nested and policy == "forbid":
            raise commit_forbidden("begin")
        # The block of a plain begin() commits when left. As a savepoint it means the same,
        # but for the owner having the last word.
        nested = nested or policy == "defer"
        transaction: SessionTransaction = _inside(self, begin_inside, self, nested)
        return transaction

    def begin_inside(self: Any, nested: bool) -> SessionTransaction:
        transaction = base.begin(self, nested)
        if nested:
            self.repom_gate.begin_block(transaction)
        return transaction

    def commit(self: Any) -> None:
        policy = self.repom_inner_commits
        if policy == "forbid":
            raise commit_forbidden("commit")
        _inside(self, base.commit if policy == "allow" else base.flush, self)

    def close(self: Any) -> None:
        # Deferred commits must outlive a `close()` that follows them, as one does at the end
        # of every `async with session:` block. The owner closes.
        if self.repom_inner_commits == "allow":
            _inside(self, base.close, self)

    namespace: dict[str, Any] = {
        name: _through_the_gate(getattr(base, name)) for name in _OPERATIONS if hasattr(base, name)
    }
    namespace |= {"end": end, "begin": begin, "commit": commit, "close": close, "reset": close}
    namespace["repom_close"] = base.close
    namespace["_warn_on_events"] = property(_is_own_flush, _set_flushing)
    managed = type(f"Managed{base.__name__}", (base, Managed), namespace)
    event.listen(managed, "after_begin", _after_begin)
    event.listen(managed, "before_attach", _before_attach)
    event.listen(managed, "after_flush", _after_flush)
    event.listen(managed, "after_commit", _after_commit)
    event.listen(managed, "after_transaction_end", _after_transaction_end)
    return managed


def _inside(session: Any, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    gate: Gate = session.repom_gate
    if not gate.enter():
        return method(*args, **kwargs)
    try:
        if deferred.pending:
            _wait_for_deferred(session)
        return method(*args, **kwargs)
    finally:
        try:
            if session.repom_abandoned:
                session.repom_close()
                raise scope_closed()
        finally:
            gate.leave()


def _through_the_gate(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def operation(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _inside(self, method, self, *args, **kwargs)

    return operation


def _connection_operation(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def operation(self: Any, *args: Any, **kwargs: Any) -> Any:
        if args:
            _refuse_ending_by_hand(args[0])
        return _inside(self.repom_session, method, self, *args, **kwargs)

    return operation


def _execution(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def execute(self: Any, *args: Any, **kwargs: Any) -> Any:
        cursors: Cursors = self.repom_session.repom_cursors
        cursors.make_way(args[0] if args else None, self.dialect)
        result = method(self, *args, **kwargs)
        cursors.watch(result)
        return result

    return execute


def _end_of_transaction(method: Callable[[Any], None]) -> Callable[[Any], None]:
    @functools.wraps(method)
    def end(self: Any) -> None:
        self.repom_session.repom_cursors.close()
        method(self)

    return end


#: The `Connection` of a managed session. Code that has asked for it may keep it, and what it
#: executes during the end would be part of nothing, or of the next unit of work.
_ManagedConnection = type(
    "ManagedConnection",
    (Connection,),
    {
        **{
            name: _connection_operation(getattr(Connection, name))
            for name in _CONNECTION_OPERATIONS
        },
        **{
            name: _connection_operation(_execution(getattr(Connection, name)))
            for name in _EXECUTIONS
        },
        # Whoever ends it: the owner, `session.rollback()`, a `commit()` that is allowed.
        "_commit_impl": _end_of_transaction(Connection._commit_impl),
        "_rollback_impl": _end_of_transaction(Connection._rollback_impl),
    },
)


def _abandon(session: Any) -> None:
    """Leave the session to the task that is inside, which closes it when it gets out.

    Its connection is closed under it, if it has one already.
    """
    session.repom_abandoned = True
    transaction: SessionTransaction | None = session.get_transaction()
    if transaction is not None:
        for connection, *_ in set(transaction._connections.values()):
            connection.invalidate()


# --- what SQLAlchemy tells of a managed session


def _is_own_flush(session: Any) -> bool:
    # SQLAlchemy warns of `add()` while it flushes: it takes the caller for a listener to that
    # flush. A sibling's flush does not know the object, and leaves it to the next one.
    return bool(session.repom_flushing and session.repom_gate.is_mine)


def _set_flushing(session: Any, flushing: bool) -> None:
    session.repom_flushing = flushing


def _after_begin(session: Any, transaction: SessionTransaction, connection: Any) -> None:
    # Not by the engine, which makes connections for others, too.
    connection.__class__ = _ManagedConnection
    connection.repom_session = session
    connection.info[CLOSED_BY_COMMIT] = True


def _before_attach(session: Any, instance: object) -> None:
    # `add()` asks no database, so nobody else would say that this comes too late.
    gate: Gate = session.repom_gate
    if gate.closed and not gate.is_mine:
        raise scope_closed()


def _after_flush(session: Any, flush: Any) -> None:
    """Raise for changes that SQLAlchemy is about to lose, with no more than a warning."""
    gate: Gate = session.repom_gate
    if gate.is_contended and not session.identity_map._modified.issubset(flush.states):
        raise ConcurrentSessionUse(
            "objects were changed while a flush of the same session was under way, and another "
            "task uses that session: these changes would be lost.\n"
            "Give tasks that write at the same time a transaction each: "
            "`async with session_scope() as session:`."
        )


def _after_commit(session: Any) -> None:
    session.repom_committed = session.get_nested_transaction() or session.get_transaction()


def _after_transaction_end(session: Any, transaction: SessionTransaction) -> None:
    committed = session.repom_committed is transaction
    session.repom_committed = None
    callbacks: Callbacks = session.repom_callbacks
    if transaction.nested:
        session.repom_gate.end_block(transaction)
        if not committed:
            callbacks.savepoint_rolled_back(transaction)
    elif transaction.parent is None:
        if committed:
            callbacks.committed()
        else:
            callbacks.rolled_back()


# --- other people's commits

# What ends the transaction unseen by SQLAlchemy: asyncpg and SQLite would commit each of the
# statements that follow by itself.
_ENDS_BY_HAND = re.compile(
    r"\s*(?:COMMIT|END|ABORT|BEGIN|START\s+TRANSACTION"
    r"|ROLLBACK(?!\s+(?:(?:WORK|TRANSACTION)\s+)?TO\b))\b",
    re.IGNORECASE,
)


def _wait_for_deferred(session: Session) -> None:
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


def ends_by_hand(sql: str) -> bool:
    """Whether `sql` begins or ends a transaction."""
    return _ENDS_BY_HAND.match(sql) is not None


def _refuse_ending_by_hand(statement: Any) -> None:
    sql = statement.text if isinstance(statement, TextClause) else statement
    if isinstance(sql, str) and ends_by_hand(sql):
        raise InnerCommitError(
            f"{sql.strip()!r} was executed, which would end the transaction behind the back of "
            "its owner.\nWrite `await session.rollback()`, `await current_scope().commit()`, or "
            "`async with atomic():` for a savepoint."
        )


def commit_forbidden(method: str) -> InnerCommitError:
    """The error for `commit()` by code that does not own the transaction."""
    return InnerCommitError(
        f'`{method}()` was called on the session of a unit of work with inner_commits="forbid".\n'
        "Its owner commits. Remove the call, write `await session.flush()` if ids are needed, "
        "or commit on purpose with `await current_scope().commit()`."
    )
