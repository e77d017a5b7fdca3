"""What code writes that has no request around it, or wants a smaller block inside one."""

from __future__ import annotations

import functools
import inspect
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    asynccontextmanager,
    contextmanager,
)
from types import TracebackType
from typing import Any, Generic, ParamSpec, TypeVar, cast

from repom import finish
from repom.current import databases_here, open_scope_here
from repom.database import AsyncSessionT, BeginOptions, Database, SessionT
from repom.deferred import raise_failure
from repom.dialects import Begin
from repom.errors import DurableAtomicError, ScopeError
from repom.managed import InnerCommits
from repom.registry import DEFAULT
from repom.scope import END_TIMEOUT, SessionScope

P = ParamSpec("P")
R = TypeVar("R")


def new_scope(
    database: str | Database | None = None,
    *,
    isolation_level: str | None = None,
    inner_commits: InnerCommits = "defer",
    end_timeout: float = END_TIMEOUT,
    sqlite_begin: Begin = "IMMEDIATE",
    label: object = "session_scope()",
    is_sync: bool = False,
) -> SessionScope:
    """A scope for the databases known here, not yet entered; see `session_scope`."""
    raise_failure()
    return SessionScope(
        databases_here().overlaid(database),
        label=label,
        begin=BeginOptions(sqlite_begin, isolation_level),
        inner_commits=inner_commits,
        end_timeout=end_timeout,
        is_sync=is_sync,
    )


def session_scope(
    database: str | Database[AsyncSessionT, Any] | None = None,
    *,
    isolation_level: str | None = None,
    inner_commits: InnerCommits = "defer",
    end_timeout: float = END_TIMEOUT,
    sqlite_begin: Begin = "IMMEDIATE",
) -> AbstractAsyncContextManager[AsyncSessionT]:
    """A unit of work for jobs, scripts, WebSocket messages and parallel writers.

    Committed when the block is left, rolled back when it raises or is cancelled, closed
    always. Everything called from the block finds it by `current_session()`. Inside another
    unit of work it is independent of that one; for a part of that one use `atomic()`.

    Args:
        database: the one that `current_session()` means inside; a name, or the `Database`.
        isolation_level: SQLAlchemy's name of one, such as "SERIALIZABLE".
        inner_commits: what `session.commit()` by code inside means: "defer" (a flush; the
            block commits), "allow", or "forbid".
        end_timeout: seconds that the end may take before the connection is closed.
        sqlite_begin: how it begins on SQLite. "DEFERRED" for a block that only reads.

    Raises:
        Exception: what COMMIT raised; nothing was committed then.
        CommitOutcomeUnknown: the connection was lost while COMMIT was in flight.

    Example:
        >>> async def nightly() -> None:
        ...     async with session_scope() as session:
        ...         session.add(Article(title="Good morning"))
    """
    return _owned(
        lambda: new_scope(
            database,
            isolation_level=isolation_level,
            inner_commits=inner_commits,
            end_timeout=end_timeout,
            sqlite_begin=sqlite_begin,
        )
    )


@asynccontextmanager
async def _owned(make: Callable[[], SessionScope]) -> AsyncIterator[Any]:
    scope = make()
    scope.enter()
    try:
        try:
            yield scope.session()
        except BaseException:
            await finish.finish(scope, commit=False)
            raise
        await finish.finish(scope, commit=not scope.is_rollback_only)
    finally:
        scope.leave()


def sync_session_scope(
    database: str | Database[Any, SessionT] | None = None,
    *,
    isolation_level: str | None = None,
    inner_commits: InnerCommits = "defer",
    sqlite_begin: Begin = "IMMEDIATE",
) -> AbstractContextManager[SessionT]:
    """The sync twin of `session_scope`; inside it, use `current_sync_session()`.

    Args:
        database: as for `session_scope`, like the others. There is no time limit for its end:
            give the driver one in `connect_args`.
    """
    return _owned_sync(
        lambda: new_scope(
            database,
            isolation_level=isolation_level,
            inner_commits=inner_commits,
            sqlite_begin=sqlite_begin,
            label="sync_session_scope()",
            is_sync=True,
        )
    )


@contextmanager
def _owned_sync(make: Callable[[], SessionScope]) -> Iterator[Any]:
    scope = make()
    scope.enter()
    try:
        try:
            yield scope.sync_session()
        except BaseException:
            finish.finish_sync(scope, commit=False)
            raise
        finish.finish_sync(scope, commit=not scope.is_rollback_only)
    finally:
        scope.leave()


class atomic(Generic[AsyncSessionT, SessionT]):  # noqa: N801 - reads as a statement, like `contextlib.suppress`
    """A block that happens whole or not at all, as in Django.

    Inside a unit of work it is a savepoint, released when the block is left and rolled back
    when it raises. Outside of one it is a unit of work of its own (`session_scope()`).

    Args:
        database: a name, or the `Database`.
        durable: refuse to be a savepoint: leaving the block must mean COMMIT.

    Raises:
        DurableAtomicError: on entering, with `durable`, inside an open unit of work.

    Example:
        >>> @atomic()
        ... async def transfer(a: Account, b: Account, amount: int) -> None:
        ...     a.balance -= amount
        ...     b.balance += amount

        >>> async def import_row(row: dict) -> None:
        ...     async with atomic() as session:
        ...         session.add(Article(**row))
    """

    def __init__(
        self,
        database: str | Database[AsyncSessionT, SessionT] | None = None,
        *,
        durable: bool = False,
    ) -> None:
        self._database = database
        self._durable = durable
        self._block: Any = None

    async def __aenter__(self) -> AsyncSessionT:
        session: Any = None
        scope = self._enclosing_scope()
        if scope is None:
            self._block = session_scope(self._database)
        else:
            session = scope.session(self._database or DEFAULT)
            self._block = session.begin_nested()
        try:
            entered = await self._block.__aenter__()
        except BaseException:
            self._block = None
            raise
        return cast(AsyncSessionT, session or entered)

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        block, self._block = self._block, None
        await block.__aexit__(kind, error, tb)

    def __enter__(self) -> SessionT:
        session: Any = None
        scope = self._enclosing_scope()
        if scope is None:
            self._block = sync_session_scope(self._database)
        else:
            session = scope.sync_session(self._database or DEFAULT)
            self._block = session.begin_nested()
        try:
            entered = self._block.__enter__()
        except BaseException:
            self._block = None
            raise
        return cast(SessionT, session or entered)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        block, self._block = self._block, None
        block.__exit__(kind, error, tb)

    def __call__(self, function: Callable[P, R]) -> Callable[P, R]:
        """Decorate `function`, sync or async: each call of it is such a block.

        Raises:
            TypeError: it is a generator function, whose body runs when the call is over.
        """
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            raise TypeError(
                f"@atomic() cannot decorate {function.__qualname__}(): the body of a generator "
                "runs after the call that makes it.\n"
                "Write `async with atomic():` (or `with atomic():`) inside it."
            )
        if inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def run_async(*args: P.args, **kwargs: P.kwargs) -> Any:
                async with atomic(self._database, durable=self._durable):
                    return await function(*args, **kwargs)

            return cast(Callable[P, R], run_async)

        @functools.wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            with atomic(self._database, durable=self._durable):
                return function(*args, **kwargs)

        return run

    def _enclosing_scope(self) -> SessionScope | None:
        if self._block is not None:
            raise ScopeError(
                "this atomic() object is in use already, by an enclosing block or by another "
                "task: it stands for one block at a time.\n"
                "Write `atomic()` once more for each block."
            )
        scope = open_scope_here()
        if scope is not None and self._durable:
            raise DurableAtomicError(
                f"atomic(durable=True) was entered inside {scope.label}, whose owner commits: "
                "leaving this block could not commit anything.\n"
                "Call it outside, or open an independent unit of work with session_scope()."
            )
        return scope
