"""Entry points for sync code: scripts, `def` endpoints, threads.

with get_db_session() as session:
    session.add(user)                       # committed here; an exception rolls back
"""

from __future__ import annotations

from typing import Any

from sqlalchemy.orm import Session

from repom import deferred, finish
from repom.current import databases_here, open_scope_here, warn_of_held_session
from repom.database import Database, SessionT
from repom.forms import Forms, as_generator_function
from repom.registry import DEFAULT
from repom.scope import SessionScope
from repom.transaction import new_scope

__all__ = ["get_db_session", "get_db_transaction", "get_session"]


def get_session(database: str | Database[Any, SessionT] | None = None) -> SessionT:
    """A new `Session`, ready to execute. The caller commits and closes it.

    Args:
        database: a name, or the `Database`; the default one if left out.
    """
    deferred.raise_failure()
    return databases_here()[database].sync_sessionmaker()  # type: ignore[return-value]


@as_generator_function
def get_db_session(
    database: str | Database[Any, SessionT] | None = None,
) -> Forms[SessionT]:
    """The sync session of the unit of work this code runs in; without one, a unit of its own.

    The sync twin of `repom.async_session.get_async_db_session`, in `with`, `for` and
    `Depends`. In a `def` endpoint that the middleware serves it yields the request's session.

    Args:
        database: a name, or the `Database`; the default one if left out.
    """
    return Forms(
        lambda: _Unit(database),  # type: ignore[arg-type,return-value]
        when_driven=lambda: warn_of_held_session("get_db_session"),
    )


@as_generator_function
def get_db_transaction(
    database: str | Database[Any, SessionT] | None = None,
) -> Forms[SessionT]:
    """`get_db_session` under the name that says what it is: every use is one transaction."""
    return get_db_session(database)


class _Unit:
    """One use of `get_db_session`: see `repom.forms.Work`."""

    def __init__(self, database: str | Database | None) -> None:
        self._database = database
        self._owned: SessionScope | None = None

    @property
    def owns(self) -> bool:
        return self._owned is not None

    def begin(self) -> Session:
        scope = open_scope_here()
        if scope is not None:
            return scope.sync_session(DEFAULT if self._database is None else self._database)
        scope = new_scope(self._database, label="get_db_session()", is_sync=True)
        session = scope.sync_session()
        scope.enter()  # last, so that nothing is left open by what may fail
        self._owned = scope
        return session

    def end(self, error: BaseException | None, /) -> None:
        scope = self._owned
        if scope is not None:
            try:
                finish.finish_sync(scope, commit=error is None and not scope.is_rollback_only)
            finally:
                scope.leave()

    def leave(self, *, commit: bool) -> None:
        # Called where an exception would only be printed, so a failure is kept for the next
        # use of repom.
        try:
            self.end(None if commit else GeneratorExit())
        except BaseException as error:
            deferred.failed("get_db_session()", error)
