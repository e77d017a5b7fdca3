"""The operations of a session, each of which waits for the caller's turn to use it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from sqlalchemy.orm import Session
from sqlalchemy.util import await_only
from sqlalchemy.util.concurrency import in_greenlet

from repom import deferred
from repom.context import surroundings
from repom.gate import Gate, scope_closed

T = TypeVar("T")


def through_the_gate(method: Callable[..., Any]) -> Callable[..., Any]:
    """An operation of a session as one that waits for the caller's turn to use it."""

    @functools.wraps(method)
    def operation(self: Any, *args: Any, **kwargs: Any) -> Any:
        entered = enter(self)
        try:
            return method(self, *args, **kwargs)
        finally:
            if entered:
                leave(self)

    return operation


def inside(session: Any, method: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Call `method` when it is the caller's turn to use the session."""
    entered = enter(session)
    try:
        return method(*args, **kwargs)
    finally:
        if entered:
            leave(session)


def enter(session: Any) -> bool:
    """Wait until it is the caller's turn; False if it is inside already, and is not to leave."""
    gate: Gate = session.repom_gate
    if not gate.enter():
        return False
    if deferred.pending:
        try:
            wait_for_deferred(session)
            gate.refuse_if_over()  # the scope may have ended meanwhile
        except BaseException:
            leave(session)
            raise
    return True


def leave(session: Any) -> None:
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
