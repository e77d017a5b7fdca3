"""How code at any depth finds the unit of work it runs in."""

from __future__ import annotations

import copy
import logging
from typing import Any, overload

from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from repom.callbacks import Callback
from repom.context import Surroundings, surroundings
from repom.database import AsyncSessionT, Database, SessionT
from repom.deferred import raise_failure
from repom.errors import NoScopeError
from repom.gate import scope_closed
from repom.observer import Observer
from repom.registry import CONFIGURED, DEFAULT, Databases
from repom.scope import SessionScope

logger = logging.getLogger("repom")


class Outside:
    """A place where the databases are known, but nothing begins or ends a transaction.

    Args:
        databases: for the scopes that are opened here.
        place: where this is, for the error: "a WebSocket connection".
        advice: what to write there.
        is_connection: whether it lasts for as long as a client likes.
    """

    parent: Surroundings | None = None
    observer: Observer | None = None
    in_transaction = False

    def __init__(
        self, databases: Databases, *, place: str, advice: str, is_connection: bool = False
    ) -> None:
        self.databases = databases
        self.place = place
        self.advice = advice
        self.is_connection = is_connection
        self.has_warned = False

    def having(self, databases: Databases) -> Outside:
        """The same place, where other databases are known."""
        other = copy.copy(self)
        other.databases = databases
        return other


@overload
def current_session(database: str = DEFAULT) -> AsyncSession: ...
@overload
def current_session(database: Database[AsyncSessionT, Any]) -> AsyncSessionT: ...
def current_session(database: str | Database = DEFAULT) -> AsyncSession:
    """The `AsyncSession` of the unit of work this code runs in. No IO, nothing to await.

    The first statement takes a connection from the pool and begins the transaction; the owner
    of the unit of work (the middleware, `session_scope()`) ends it.

    Args:
        database: a name, or the `Database`.

    Raises:
        NoScopeError: no unit of work is open here.
        ScopeClosedError: it has ended; this code outlives it.
        WrongThreadError: in a worker thread; use `current_sync_session()`.
        WrongEventLoopError: on another event loop than the unit of work.
        MixedSessionsError: it already uses the sync session of this database.
        UnknownDatabaseError: no database has this name.
    """
    here = surroundings.get()
    if type(here) is SessionScope:
        return here.session(database)
    raise no_scope("current_session", here)


@overload
def current_sync_session(database: str = DEFAULT) -> Session: ...
@overload
def current_sync_session(database: Database[Any, SessionT]) -> SessionT: ...
def current_sync_session(database: str | Database = DEFAULT) -> Session:
    """The `Session` of the unit of work this code runs in: for `def` endpoints and threads.

    Args:
        database: a name, or the `Database`.

    Raises:
        NoScopeError: no unit of work is open here.
        ScopeClosedError: it has ended; this code outlives it.
        MixedSessionsError: it already uses the async session of this database.
        UnknownDatabaseError: no database has this name.
    """
    here = surroundings.get()
    if type(here) is SessionScope:
        return here.sync_session(database)
    raise no_scope("current_sync_session", here)


def current_scope() -> SessionScope:
    """The unit of work this code runs in.

    Raises:
        NoScopeError: no unit of work is open here.
    """
    return _scope_for("current_scope")


def on_commit(callback: Callback, database: str | Database = DEFAULT) -> None:
    """Call `callback` once the transaction has been committed, before the response leaves.

    Dropped if the transaction, or the savepoint it was registered in, is rolled back. A
    callback that raises is logged and changes nothing: the work is committed. It may use
    `current_session()`; what it begins is committed after it.

    Args:
        callback: without parameters; a function, or one that returns an awaitable.
        database: the one whose innermost savepoint it belongs to.

    Raises:
        NoScopeError: no unit of work is open here.
        ScopeClosedError: it has ended.
    """
    _scope_for("on_commit").on_commit(callback, database)


def on_rollback(callback: Callback, database: str | Database = DEFAULT) -> None:
    """Call `callback` once the transaction has been rolled back, or its savepoint.

    After a savepoint, it is called at the end of the whole transaction. Arguments, errors and
    what the callback may do are those of `on_commit`.
    """
    _scope_for("on_rollback").on_rollback(callback, database)


def open_scope_here() -> SessionScope | None:
    """The unit of work this code runs in, if there is one.

    Raises:
        ScopeClosedError: it has ended. What opens one of its own where there is none must not do
            so here: the client may have been told that nothing of this request has happened.
    """
    here = surroundings.get()
    if type(here) is not SessionScope:
        return None
    if not here.is_open:
        raise scope_closed()
    return here


def databases_here() -> Databases:
    """The databases known at this place: those of the middleware, else the configured ones."""
    here = surroundings.get()
    return here.databases if isinstance(here, (SessionScope, Outside)) else CONFIGURED


def warn_of_held_session(function: str) -> None:
    """Say once that a dependency holds one transaction for a whole connection, if it does."""
    here = surroundings.get()
    if isinstance(here, Outside) and here.is_connection and not here.has_warned:
        here.has_warned = True
        logger.warning(
            "%s() is a dependency in %s: what answers have told of is not committed before "
            "the end, and rolled back if that is an exception.\n%s",
            function,
            here.place,
            here.advice,
        )


def _scope_for(function: str) -> SessionScope:
    here = surroundings.get()
    if type(here) is SessionScope:
        return here
    raise no_scope(function, here)


def no_scope(function: str, here: object) -> NoScopeError:
    """The error for a session that was asked for outside a unit of work."""
    raise_failure()
    if isinstance(here, Outside):
        return NoScopeError(f"{function}() was called in {here.place}.\n{here.advice}")
    return NoScopeError(
        f"{function}() was called outside a unit of work: no DatabaseSessionMiddleware is "
        "serving a request here, and no session_scope() is open.\n"
        "Add the middleware to the application (`app.add_middleware("
        "DatabaseSessionMiddleware)`), or in scripts and jobs write "
        "`async with session_scope() as session:` (or `with sync_session_scope()`)."
    )
