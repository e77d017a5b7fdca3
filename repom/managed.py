"""The `Session` class of the sessions that a scope hands out.

It is the application's own class (`Database(session_class=...)`) with three things added:
operations pass the gate, `commit()`, `begin()` and `close()` by code that does not own the
transaction mean what `inner_commits` says, and `end()` is the owner's way to really end it.
"""

from __future__ import annotations

import asyncio
import functools
import weakref
from collections.abc import Callable
from typing import Any, Literal

from sqlalchemy import event
from sqlalchemy.orm import Session, SessionTransaction
from sqlalchemy.util import await_only

from repom import deferred
from repom.callbacks import Callbacks, after_soft_rollback
from repom.context import surroundings
from repom.errors import InnerCommitError
from repom.gate import Gate

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


class Managed:
    """The part of a managed session that does not depend on the application's class.

    Attributes:
        repom_gate: set by the scope.
        repom_inner_commits: what `commit()` by others means.
        repom_callbacks: told of savepoints that were rolled back, and of inner commits.
        repom_cursors: the results of `session.stream()` that may still be read.
    """

    repom_gate: Gate
    repom_inner_commits: InnerCommits
    repom_callbacks: Callbacks
    repom_cursors: list[weakref.ref[Any]]

    def end(self, how: Literal["flush", "commit", "rollback", "close"]) -> None:
        """End the transaction for real. Only the owner of the scope calls this."""
        raise NotImplementedError  # pragma: no cover - made by managed_class


_managed: dict[type[Session], type[Session]] = {}


def managed_class(base: type[Session]) -> type[Session]:
    """A subclass of `base` whose instances a scope can manage. One for each `base`."""
    found = _managed.get(base)
    return found if found is not None else _managed.setdefault(base, _make(base))


def _make(base: type[Session]) -> type[Session]:
    def end(self: Any, how: Literal["flush", "commit", "rollback", "close"]) -> None:
        def rollback(session: Session) -> None:
            # Detached first, the objects keep what they have loaded. Rolled back with them,
            # the session would expire every one, and an error page that shows a name would
            # have to ask the database again.
            session.expunge_all()
            base.rollback(session)

        methods = {"flush": base.flush, "commit": base.commit, "close": base.close}
        _inside(self.repom_gate, methods.get(how, rollback), self, ending=True)

    def begin(self: Any, nested: bool = False) -> SessionTransaction:
        policy = self.repom_inner_commits
        if not nested and policy == "forbid":
            raise commit_forbidden("begin")
        # The block of a plain begin() commits when left. As a savepoint it means the same,
        # but for the owner having the last word.
        nested = nested or policy == "defer"
        transaction: SessionTransaction = _inside(self.repom_gate, base.begin, self, nested)
        return transaction

    def commit(self: Any) -> None:
        policy = self.repom_inner_commits
        if policy == "forbid":
            raise commit_forbidden("commit")
        if policy == "allow":
            _inside(self.repom_gate, base.commit, self)
            self.repom_callbacks.committed()
        else:
            _inside(self.repom_gate, base.flush, self)

    def close(self: Any) -> None:
        # Deferred commits must outlive a `close()` that follows them, as one does at the end
        # of every `async with session:` block. The owner closes.
        if self.repom_inner_commits == "allow":
            _inside(self.repom_gate, base.close, self)

    namespace: dict[str, Any] = {
        name: _through_the_gate(getattr(base, name)) for name in _OPERATIONS if hasattr(base, name)
    }
    namespace["execute"] = _watching_cursors(namespace["execute"])
    namespace |= {"end": end, "begin": begin, "commit": commit, "close": close, "reset": close}
    managed = type(f"Managed{base.__name__}", (base, Managed), namespace)
    event.listen(managed, "after_soft_rollback", after_soft_rollback)
    return managed


def _inside(gate: Gate, method: Callable[..., Any], *args: Any, ending: bool = False) -> Any:
    entered = gate.enter(ending=ending)
    try:
        return method(*args)
    finally:
        if entered:
            gate.leave()


def _through_the_gate(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def operation(self: Any, *args: Any, **kwargs: Any) -> Any:
        gate: Gate = self.repom_gate
        if not gate.enter():
            return method(self, *args, **kwargs)
        try:
            if deferred.pending and not self.in_transaction():
                _wait_for_deferred()
            return method(self, *args, **kwargs)
        finally:
            gate.leave()

    return operation


def _watching_cursors(execute: Callable[..., Any]) -> Callable[..., Any]:
    """`Session.execute` that remembers the results that are read from the server bit by bit."""

    @functools.wraps(execute)
    def operation(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = execute(self, *args, **kwargs)
        options = kwargs.get("execution_options")
        if options and options.get("stream_results"):
            self.repom_cursors.append(weakref.ref(result))
        return result

    return operation


def has_open_cursor(session: Any) -> bool:
    """Whether somebody may still read from the server a result of `session.stream()`."""
    for reference in session.repom_cursors:
        result = reference()
        # Soft-closed is SQLAlchemy's word for read to its end.
        if result is not None and not (result.closed or result._soft_closed):
            return True
    session.repom_cursors.clear()
    return False


def _wait_for_deferred() -> None:
    """Begin a transaction only after the commits that this loop still owes.

    Not while an enclosing scope holds a transaction: an ending may be waiting for that one.
    """
    if asyncio._get_running_loop() is None:
        return
    here = surroundings.get()
    outer = here.parent if here is not None else None
    while outer is not None:
        if outer.in_transaction:
            return
        outer = outer.parent
    await_only(deferred.settled())


def commit_forbidden(method: str) -> InnerCommitError:
    """The error for `commit()` by code that does not own the transaction."""
    return InnerCommitError(
        f'`{method}()` was called on the session of a unit of work with inner_commits="forbid".\n'
        "Its owner commits. Remove the call, write `await session.flush()` if ids are needed, "
        "or commit on purpose with `await current_scope().commit()`."
    )
