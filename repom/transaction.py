"""Units of work for code that no request is around: `session_scope()` and its kin."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    asynccontextmanager,
    contextmanager,
    nullcontext,
)
from typing import Any, TypeVar

from repom import finish
from repom.begin import BeginOptions, ReadOnly, checked_read_only
from repom.branches import Branches
from repom.conflicts import is_conflict
from repom.current import databases_here
from repom.database import AsyncSessionT, Database, SessionT
from repom.deferred import raise_failure
from repom.dialects import Begin
from repom.managed import InnerCommits
from repom.observer import committing_apart
from repom.retry import Attempts, RetryOn
from repom.scope import SessionScope
from repom.scope_options import END_TIMEOUT, ScopeOptions

R = TypeVar("R")


def new_scope(
    database: str | Database | None = None,
    *,
    isolation_level: str | None = None,
    inner_commits: InnerCommits = "defer",
    end_timeout: float = END_TIMEOUT,
    sqlite_begin: Begin = "IMMEDIATE",
    read_only: ReadOnly = False,
    label: object = "session_scope()",
    is_sync: bool = False,
    attempt: int = 1,
    two_phase: bool = False,
) -> SessionScope:
    """A scope for the databases known here, not yet entered; see `session_scope`."""
    raise_failure()
    begin = BeginOptions(sqlite_begin, isolation_level)
    if read_only:
        begin = _read_only_begin(read_only, isolation_level)
    databases = databases_here().overlaid(database)
    scope = SessionScope(
        ScopeOptions(databases, begin, inner_commits, end_timeout, is_sync=is_sync), label
    )
    scope.attempt = attempt
    if two_phase and not read_only:
        scope.branches = Branches(databases)
    return scope


def _read_only_begin(read_only: ReadOnly, isolation_level: str | None) -> BeginOptions:
    if isolation_level is not None:
        raise ValueError(
            f"read_only={read_only!r} with isolation_level={isolation_level!r}: what only reads "
            'has no transaction, and with "snapshot" one of REPEATABLE READ.\n'
            "Leave one of the two out."
        )
    return BeginOptions(read_only=checked_read_only(read_only))


def session_scope(
    database: str | Database[AsyncSessionT, Any] | None = None,
    *,
    read_only: ReadOnly = False,
    isolation_level: str | None = None,
    inner_commits: InnerCommits = "defer",
    end_timeout: float = END_TIMEOUT,
    sqlite_begin: Begin = "IMMEDIATE",
    two_phase: bool = False,
) -> AbstractAsyncContextManager[AsyncSessionT]:
    """A unit of work for jobs, scripts, WebSocket messages and parallel writers.

    Committed when the block is left, rolled back when it raises or is cancelled, closed
    always. Everything called from the block finds it by `current_session()`. Inside another
    unit of work it is independent of that one; for a part of that one use `atomic()`.

    Args:
        database: the one that `current_session()` means inside; a name, or the `Database`.
        read_only: True for a block that only reads: on a connection that the database holds
            read-only, each statement by itself, without BEGIN and COMMIT. "snapshot" for
            statements that are to see one state of the database.
        isolation_level: SQLAlchemy's name of one, such as "SERIALIZABLE".
        inner_commits: what `session.commit()` by code inside means: "defer" (a flush; the
            block commits), "allow", or "forbid".
        end_timeout: seconds that the end may take before the connection is closed.
        sqlite_begin: how it begins on SQLite. "DEFERRED" for a block that only reads.
        two_phase: whether several databases commit all or nothing, by their two-phase commit.

    Raises:
        Exception: what COMMIT raised; nothing was committed then.
        CommitOutcomeUnknown: the connection was lost while COMMIT was in flight.
        ReadOnlyError: a block that only reads has tried to write; at the latest when it is left.
        ValueError: `read_only` is none of the three, or there is an `isolation_level` beside it.

    Example:
        >>> async def nightly() -> None:
        ...     async with session_scope() as session:
        ...         session.add(Article(title="Good morning"))
    """
    return _inside(
        functools.partial(
            new_scope,
            database,
            read_only=read_only,
            isolation_level=isolation_level,
            inner_commits=inner_commits,
            end_timeout=end_timeout,
            sqlite_begin=sqlite_begin,
            two_phase=two_phase,
        )
    )


@asynccontextmanager
async def _inside(make: Callable[[], SessionScope]) -> AsyncIterator[Any]:
    scope = make()
    scope.enter()
    try:
        try:
            yield scope.session()
        except BaseException:
            await finish.finish(scope, commit=False)
            raise
        await _finish(scope)
    finally:
        scope.leave()


def sync_session_scope(
    database: str | Database[Any, SessionT] | None = None,
    *,
    read_only: ReadOnly = False,
    isolation_level: str | None = None,
    inner_commits: InnerCommits = "defer",
    sqlite_begin: Begin = "IMMEDIATE",
    two_phase: bool = False,
) -> AbstractContextManager[SessionT]:
    """The sync twin of `session_scope`; inside it, use `current_sync_session()`.

    Args:
        database: as for `session_scope`, like the others. There is no time limit for its end:
            give the driver one in `connect_args`.
    """
    return _inside_sync(
        functools.partial(
            new_scope,
            database,
            read_only=read_only,
            isolation_level=isolation_level,
            inner_commits=inner_commits,
            sqlite_begin=sqlite_begin,
            label="sync_session_scope()",
            is_sync=True,
            two_phase=two_phase,
        )
    )


async def _finish(scope: SessionScope) -> None:
    """The end of a block that was left without an exception."""
    commit = not scope.is_rollback_only
    with committing_apart() if commit and scope.has_effects else nullcontext():
        await finish.finish(scope, commit=commit)


@contextmanager
def _inside_sync(make: Callable[[], SessionScope]) -> Iterator[Any]:
    scope = make()
    scope.enter()
    try:
        try:
            yield scope.sync_session()
        except BaseException:
            finish.finish_sync(scope, commit=False)
            raise
        _finish_sync(scope)
    finally:
        scope.leave()


def _finish_sync(scope: SessionScope) -> None:
    """The sync twin of `_finish`."""
    commit = not scope.is_rollback_only
    with committing_apart() if commit and scope.has_effects else nullcontext():
        finish.finish_sync(scope, commit=commit)


async def run_transaction(
    function: Callable[[], Awaitable[R]],
    *,
    database: str | Database | None = None,
    retries: int = 3,
    retry_on: RetryOn = is_conflict,
    isolation_level: str | None = None,
    two_phase: bool = False,
) -> R:
    """Call `function` in a unit of work, and once more in a new one if that lost a conflict.

    Serialization failures, deadlocks and failed certifications, at COMMIT too, are what a
    database tells of two transactions that cannot both happen. Nothing of the one that lost is
    left, so it can be done again: all of it, since what it had read is out of date.

    Args:
        function: async, without parameters. It may be called several times, so what it does
            outside of the database belongs into `on_commit`.
        database: a name, or the `Database`; the default one if left out.
        retries: how often it may be repeated, after a growing pause.
        retry_on: `retry_on(error)` says whether an error is worth it.
        isolation_level: as for `session_scope`.
        two_phase: as for `session_scope`.

    Returns:
        What `function` returned in the attempt that was committed.

    Raises:
        Exception: what `function` or COMMIT raised in the last attempt.
        CommitOutcomeUnknown: the connection was lost in COMMIT. It is never repeated.

    Example:
        >>> async def count() -> None:
        ...     counter = await current_session().get_one(Counter, 1)
        ...     counter.value += 1

        >>> async def visit() -> None:
        ...     await run_transaction(count, isolation_level="SERIALIZABLE")
    """
    attempts = Attempts(retries, retry_on, label=_name(function))
    while True:
        make = functools.partial(
            new_scope,
            database,
            isolation_level=isolation_level,
            label=_name(function),
            attempt=attempts.number,
            two_phase=two_phase,
        )
        try:
            async with _inside(make):
                return await function()
        except Exception as error:
            pause = attempts.pause_after(error)
            if pause is None:
                raise
        await asyncio.sleep(pause)


def run_sync_transaction(
    function: Callable[[], R],
    *,
    database: str | Database | None = None,
    retries: int = 3,
    retry_on: RetryOn = is_conflict,
    isolation_level: str | None = None,
    two_phase: bool = False,
) -> R:
    """The sync twin of `run_transaction`; inside it, use `current_sync_session()`.

    Args:
        function: without parameters. The others are those of `run_transaction`.
    """
    attempts = Attempts(retries, retry_on, label=_name(function))
    while True:
        make = functools.partial(
            new_scope,
            database,
            isolation_level=isolation_level,
            label=_name(function),
            is_sync=True,
            attempt=attempts.number,
            two_phase=two_phase,
        )
        try:
            with _inside_sync(make):
                return function()
        except Exception as error:
            pause = attempts.pause_after(error)
            if pause is None:
                raise
        time.sleep(pause)


def _name(function: Callable[..., object]) -> str:
    if isinstance(function, functools.partial):
        return _name(function.func)
    return f"{getattr(function, '__qualname__', repr(function))}()"
