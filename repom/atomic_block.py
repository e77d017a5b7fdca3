"""A part of the work that happens whole or not at all."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import TracebackType
from typing import Any, Generic, ParamSpec, TypeVar, cast

from repom.conflicts import is_conflict
from repom.current import open_scope_here
from repom.database import AsyncSessionT, Database, SessionT
from repom.errors import DurableAtomicError, ScopeError
from repom.registry import DEFAULT
from repom.retry import RetryOn
from repom.scope import SessionScope
from repom.transaction import (
    run_sync_transaction,
    run_transaction,
    session_scope,
    sync_session_scope,
)

P = ParamSpec("P")
R = TypeVar("R")


class atomic(Generic[AsyncSessionT, SessionT]):  # noqa: N801 - reads as a statement, like `suppress`
    """A block that happens whole or not at all, as in Django.

    Inside a unit of work it is a savepoint, released when the block is left and rolled back
    when it raises. Outside of one it is a unit of work of its own (`session_scope()`).

    Args:
        database: a name, or the `Database`.
        durable: refuse to be a savepoint: leaving the block must mean COMMIT.
        retries: how often a decorated function is repeated, outside of a unit of work, if its
            own lost a conflict (see `run_transaction`). As a savepoint it never is: the database
            has rolled back everything, and only the owner of that can repeat it.
        retry_on: `retry_on(error)` says whether an error is worth it.

    Raises:
        DurableAtomicError: on entering, with `durable`, inside an open unit of work.
        ScopeClosedError: on entering, in a task or thread that outlives its unit of work.
        TypeError: on entering a `with` block that has `retries`: only a function can be repeated.

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
        retries: int = 0,
        retry_on: RetryOn = is_conflict,
    ) -> None:
        self._database = database
        self._durable = durable
        self._retries = retries
        self._retry_on = retry_on
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
                call = functools.partial(function, *args, **kwargs)
                if self._retries and open_scope_here() is None:
                    return await run_transaction(call, **self._options)
                async with atomic(self._database, durable=self._durable):
                    return await call()

            return cast(Callable[P, R], run_async)

        @functools.wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            call = functools.partial(function, *args, **kwargs)
            if self._retries and open_scope_here() is None:
                return run_sync_transaction(call, **self._options)
            with atomic(self._database, durable=self._durable):
                return call()

        return run

    @property
    def _options(self) -> Any:
        return {"database": self._database, "retries": self._retries, "retry_on": self._retry_on}

    def _enclosing_scope(self) -> SessionScope | None:
        if self._block is not None:
            raise ScopeError(
                "this atomic() object is in use already, by an enclosing block or by another "
                "task: it stands for one block at a time.\n"
                "Write `atomic()` once more for each block."
            )
        if self._retries:
            raise TypeError(
                "a `with atomic(retries=...)` block cannot be repeated: it is no function.\n"
                "Decorate a function with it, or write `await run_transaction(function)`."
            )
        scope = open_scope_here()
        if scope is not None and self._durable:
            raise DurableAtomicError(
                f"atomic(durable=True) was entered inside {scope.label}, whose owner commits: "
                "leaving this block could not commit anything.\n"
                "Call it outside, or open an independent unit of work with session_scope()."
            )
        return scope
