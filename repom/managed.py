"""The `Session` class of the sessions that a scope hands out.

It is the application's own class (`Database(session_class=...)`) with three things added:
operations pass the gate, `commit()`, `begin()` and `close()` by code that does not own the
transaction mean what `inner_commits` says, and `end()` is the owner's way to really end it.

They are added below that class, next to SQLAlchemy's: its methods may have any name, as SQLModel's
`exec()`, and call `super().execute()` or `super().commit()`.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Iterable
from typing import Any, Literal

from sqlalchemy import event
from sqlalchemy.exc import PendingRollbackError
from sqlalchemy.orm import Session, SessionTransaction

from repom import deferred
from repom.blocks import Visitor
from repom.callbacks import TOLD_BY_THE_OWNER, Callbacks
from repom.connection import commit_forbidden, manage_connection
from repom.cursors import Cursors
from repom.dialects.base import CLOSED_BY_COMMIT, aborted, info_of
from repom.ending import Action
from repom.errors import TransactionError
from repom.gate import Gate, block_not_left
from repom.lost_changes import Watching, doomed, flush_began, flush_ended, refreshing
from repom.observer import committing_apart
from repom.operations import inside, through_the_gate, wait_for_deferred
from repom.savepoints import begin_block, block_ended, blocks_ended

InnerCommits = Literal["defer", "allow", "forbid"]

#: Methods of Session that may talk to the database, and mean for us what they mean.
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
    "rollback",
    "scalar",
    "scalars",
)


class ManagedSession(Watching, Session):
    """A session that a scope can manage.

    Attributes:
        repom_gate: set by the scope.
        repom_inner_commits: what `commit()` by others means.
        repom_callbacks: told of the ends that the owner has not asked for: of savepoints, and
            of the transaction by `rollback()` and inner commits.
        repom_cursors: the results that may still be read from the database.
        repom_label: what the unit of work is, for messages.
        repom_reads_only: whether the database holds its connection read-only.
        repom_committed: the transaction or savepoint that is about to end, if by a commit.
        repom_abandoned: whether the end could not wait any longer for the task that is inside.
        repom_class: the class of the application.
    """

    repom_gate: Gate
    repom_inner_commits: InnerCommits
    repom_callbacks: Callbacks
    repom_cursors: Cursors
    repom_label: object
    repom_reads_only = False
    repom_committed: SessionTransaction | None = None
    repom_abandoned = False
    repom_class: type[Session] = Session
    repom_flushing = False
    _repom_ends = False  # so that `commit()` and `close()` mean what they say

    def end(self, how: Action) -> None:
        """End the transaction for real. Only the owner of the scope calls this.

        Raises:
            TransactionError: another task did not leave the session, or a block of it, within
                the time limit.
            ConcurrentSessionUse: it must not be committed, see `repom.lost_changes`.
        """
        if self.repom_abandoned:
            return
        commits = how in ("flush", "prepare", "commit")
        try:
            entered = self.repom_gate.enter(ending=not commits, committing=commits)
        except asyncio.CancelledError as error:  # by the time limit, for nobody else can
            raise _waited_in_vain(self, how) from error
        # The owner tells the callbacks itself, once it knows how all its databases ended.
        callbacks, self.repom_callbacks = self.repom_callbacks, TOLD_BY_THE_OWNER
        try:
            if commits and deferred.pending:
                wait_for_deferred(self)
            # Also before the flush, for which MySQL could not send the rows any more.
            self.repom_cursors.close()
            self._for_real(how)
        except PendingRollbackError as error:
            # A flush failed, its error was swallowed, and SQLAlchemy has rolled back.
            transaction = self.get_transaction()
            first = transaction._rollback_exception if transaction is not None else None
            raise aborted() from first or error
        finally:
            self.repom_callbacks = callbacks
            if entered:
                self.repom_gate.leave()

    def _for_real(self, how: Action) -> None:
        if self.repom_doom is not None and how in ("flush", "prepare", "commit"):
            raise doomed(self)
        if how == "rollback":
            # Detached first, the objects keep what they have loaded. Rolled back with them,
            # the session would expire every one, and an error page that shows a name would
            # have to ask the database again.
            self.expunge_all()
        self._repom_ends = True
        twophase = self.twophase
        if twophase and how == "commit":
            self.twophase = False  # or it would be prepared; where it is to be, it has been
        try:
            getattr(self.repom_class, how)(self)
        finally:
            self._repom_ends = False
            self.twophase = twophase

    def begin(self, nested: bool = False) -> SessionTransaction:
        policy = self.repom_inner_commits
        if not nested and policy == "forbid":
            raise commit_forbidden("begin")
        # The block of a plain begin() commits when left. As a savepoint it means the same,
        # but for the owner having the last word.
        if nested or policy == "defer":
            begin = functools.partial(Session.begin, self, nested=True)
            transaction: SessionTransaction = inside(self, begin_block, self, begin)
            return transaction
        return inside(self, Session.begin, self)

    def commit(self) -> None:
        policy = self.repom_inner_commits
        if self._repom_ends and self.repom_gate.is_mine:
            Session.commit(self)
        elif policy == "forbid":
            raise commit_forbidden("commit")
        elif policy == "allow":
            with committing_apart():
                inside(self, self._for_real, "commit")
        else:
            self.flush()

    def close(self) -> None:
        # Deferred commits must outlive a `close()` that follows them, as one does at the end
        # of every `async with session:` block. The owner closes.
        if self._repom_ends and self.repom_gate.is_mine:
            Session.close(self)
        elif self.repom_inner_commits == "allow":
            inside(self, self._for_real, "close")

    def reset(self) -> None:
        self.close()

    def refresh(
        self,
        instance: object,
        attribute_names: Iterable[str] | None = None,
        with_for_update: Any = None,
    ) -> None:
        names = None if attribute_names is None else tuple(attribute_names)
        inside(self, self._refresh, instance, names, with_for_update)

    def _refresh(
        self, instance: object, names: tuple[str, ...] | None, with_for_update: Any
    ) -> None:
        with refreshing(self, instance, names):
            Session.refresh(self, instance, names, with_for_update)

    def _flush(self, objects: Any = None) -> None:
        try:
            Session._flush(self, objects)
        finally:
            flush_ended(self)

    @property
    def _warn_on_events(self) -> bool:
        # SQLAlchemy warns of `add()` while it flushes: it takes the caller for a listener to
        # that flush. A sibling's flush does not know the object, and leaves it to the next one.
        return self.repom_flushing and self.repom_gate.is_mine

    @_warn_on_events.setter
    def _warn_on_events(  # pyright: ignore[reportIncompatibleVariableOverride]
        self, flushing: bool
    ) -> None:
        self.repom_flushing = flushing
        if flushing:
            flush_began(self)


for _name in _OPERATIONS:
    if hasattr(Session, _name):
        setattr(ManagedSession, _name, through_the_gate(getattr(Session, _name)))

_managed: dict[type[Session], type[ManagedSession]] = {}


def managed_class(base: type[Session]) -> type[ManagedSession]:
    """A subclass of `base` whose instances a scope can manage. One for each `base`."""
    found = _managed.get(base)
    return found if found is not None else _managed.setdefault(base, _make(base))


def _make(base: type[Session]) -> type[ManagedSession]:
    # Also above the class of the application: what that has to do when it commits, it does when
    # the owner commits.
    above = {name: vars(ManagedSession)[name] for name in ("begin", "commit", "close", "reset")}
    bases = (ManagedSession,) if base is Session else (base, ManagedSession)
    return type(f"Managed{base.__name__}", bases, above | {"repom_class": base})


def _waited_in_vain(session: Any, how: str) -> TransactionError:
    """Another task has not left the session, or its block, within the time limit of the end."""
    gate: Gate = session.repom_gate
    if gate.is_free and (block := gate.blocks.against(Visitor())) is not None:
        return block_not_left(block, "for the whole time limit of the end")
    if not gate.is_free:
        _abandon(session)
    return TransactionError(
        f"{how} had to wait for a statement of another task, which did not end within the time "
        "limit; its connection was closed."
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


def _after_begin(session: Any, transaction: SessionTransaction, connection: Any) -> None:
    manage_connection(connection, session)
    info_of(connection.connection)[CLOSED_BY_COMMIT] = True


def _before_attach(session: Any, state: object) -> None:
    # `add()` asks no database, so nobody else would say that this comes too late.
    gate: Gate = session.repom_gate
    blocks = gate.blocks
    if (gate.closed or blocks.open or blocks.has_undone) and not gate.is_mine:
        gate.refuse_if_over()
        blocks.disturb()


def _after_commit(session: Any) -> None:
    session.repom_committed = session.get_nested_transaction() or session.get_transaction()


def _after_transaction_end(session: Any, transaction: SessionTransaction) -> None:
    committed = session.repom_committed is transaction
    session.repom_committed = None
    callbacks: Callbacks = session.repom_callbacks
    if transaction.nested:
        block_ended(session, transaction, undone=not committed)
        if not committed:
            callbacks.savepoint_rolled_back(transaction)
    elif transaction.parent is None:
        blocks_ended(session, undone=not committed)
        if session.repom_doom is not None:
            session.repom_doom = None
        if committed:
            callbacks.committed()
        else:
            callbacks.rolled_back()


event.listen(ManagedSession, "after_begin", _after_begin)
event.listen(ManagedSession, "before_attach", _before_attach, raw=True)  # costs less
event.listen(ManagedSession, "after_commit", _after_commit)
event.listen(ManagedSession, "after_transaction_end", _after_transaction_end)
