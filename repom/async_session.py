"""Entry points for async code that does not use the middleware, or not only.

async with get_async_db_session() as session:
    session.add(user)                       # committed here; an exception rolls back
"""

from __future__ import annotations

from typing import Any

from sqlalchemy.ext.asyncio import AsyncSession

from repom import deferred, finish
from repom.current import databases_here, open_scope_here, warn_of_held_session
from repom.database import AsyncSessionT, Database
from repom.forms import AsyncForms, as_async_generator_function
from repom.registry import DEFAULT
from repom.scope import SessionScope
from repom.transaction import new_scope
from repom.urls import convert_to_async_uri

__all__ = ["convert_to_async_uri", "get_async_db_session", "get_async_session"]


async def get_async_session(
    database: str | Database[AsyncSessionT, Any] | None = None,
) -> AsyncSessionT:
    """A new `AsyncSession`, ready to execute. The caller commits and closes it.

    It is separate from the session of a request, inside one too.

    Args:
        database: a name, or the `Database`; the default one if left out.

    Example:
        >>> async def find(user_id: int) -> User | None:
        ...     session = await get_async_session()
        ...     try:
        ...         return await session.get(User, user_id)
        ...     finally:
        ...         await session.close()
    """
    deferred.raise_failure()
    await deferred.settled()
    return databases_here()[database].sessionmaker()  # type: ignore[return-value]


@as_async_generator_function
def get_async_db_session(
    database: str | Database[AsyncSessionT, Any] | None = None,
) -> AsyncForms[AsyncSessionT]:
    """The session of the unit of work this code runs in; without one, a unit of its own.

    Inside a request that the middleware serves, or a `session_scope()`, it leaves the ending
    to the owner. On its own it commits when left, rolls back when an exception leaves it, and
    closes always; `current_session()` works inside.

    * `async with get_async_db_session() as session:` is the form to prefer.
    * `session: AsyncSession = Depends(get_async_db_session)` in FastAPI. Without the middleware
      write `Depends(get_async_db_session, scope="function")`, which ends before the response
      is sent; by default FastAPI ends dependencies after it.
    * `async for session in get_async_db_session():` commits however the loop is left, but by
      an exception. After `return` and `break` the COMMIT happens when the function has gone
      on already: its failure can only be logged, and raised at the next use of repom.

    Args:
        database: a name, or the `Database`; the default one if left out.
    """
    return AsyncForms(
        lambda: _AsyncUnit(database),  # type: ignore[arg-type,return-value]
        when_driven=lambda: warn_of_held_session("get_async_db_session"),
    )


class _AsyncUnit:
    """One use of `get_async_db_session`: see `repom.forms.AsyncWork`."""

    def __init__(self, database: str | Database | None) -> None:
        self._database = database
        self._owned: SessionScope | None = None

    @property
    def owns(self) -> bool:
        return self._owned is not None

    async def begin(self) -> AsyncSession:
        scope = open_scope_here()
        if scope is not None:
            return scope.session(DEFAULT if self._database is None else self._database)
        scope = new_scope(self._database, label="get_async_db_session()")
        session = scope.session()
        scope.enter()  # last, so that nothing is left open by what may fail
        self._owned = scope
        return session

    async def end(self, error: BaseException | None, /) -> None:
        scope = self._owned
        if scope is not None:
            try:
                await finish.finish(scope, commit=error is None and not scope.is_rollback_only)
            finally:
                scope.leave()

    def leave(self, *, commit: bool) -> None:
        scope = self._owned
        if scope is not None:
            scope.leave()
            deferred.end_later(
                finish.finish(scope, commit=commit and not scope.is_rollback_only),
                limit=2 * scope.options.end_timeout,  # the end, and as long again for its callbacks
                label="get_async_db_session()",
            )
