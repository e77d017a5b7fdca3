"""What a `Database` does at the begin of each of its transactions: `Database(on_begin=...)`.

It hangs on the class of the sessions and not on the engine: an engine tells of a begin before
there is a transaction in which something could be executed, and a listener of it makes SQLAlchemy
prepare for all of them at every statement. So a database without `on_begin` pays nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, TypeVar

from sqlalchemy import Connection, event
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session, SessionTransaction

from repom.errors import ConfigurationError, TransactionError

#: Called with the connection of the transaction that has just begun. No coroutine function: in
#: an async session it runs where SQLAlchemy's own events do, and executes without `await`.
OnBegin = Callable[[Connection], object]

_KEY = "repom.on_begin"  # of `Session.info`

AsyncSessionT = TypeVar("AsyncSessionT", bound=AsyncSession)
SessionT = TypeVar("SessionT", bound=Session)


class _Telling(Session):
    """A session with an `on_begin` in its `info`."""


# One for each class of an application, however many databases have it.
_classes: dict[type[Any], type[Any]] = {}


def telling_class(base: type[SessionT]) -> type[SessionT]:
    """A subclass of `base` that calls what `telling_kwargs` has put into its sessions."""
    if issubclass(base, _Telling):
        return base
    # SQLAlchemy's listeners are inherited, by the classes that `repom.managed` makes, too.
    bases = (_Telling,) if base is Session else (base, _Telling)
    names = {"__module__": base.__module__}
    return _classes.get(base) or _classes.setdefault(base, type(base.__name__, bases, names))


def telling_async_class(base: type[AsyncSessionT]) -> type[AsyncSessionT]:
    """The same, for an `AsyncSession`."""
    sync = telling_class(base.sync_session_class)
    if sync is base.sync_session_class:
        return base
    names = {"sync_session_class": sync, "__module__": base.__module__}
    return _classes.get(base) or _classes.setdefault(base, type(base.__name__, (base,), names))


def telling_kwargs(session_kwargs: Mapping[str, Any], on_begin: OnBegin) -> dict[str, Any]:
    """`session_kwargs` for sessions of such a class."""
    kwargs = dict(session_kwargs)
    kwargs["info"] = {**(kwargs.get("info") or {}), _KEY: on_begin}
    if kwargs.get("sync_session_class"):
        kwargs["sync_session_class"] = telling_class(kwargs["sync_session_class"])
    return kwargs


def _after_begin(session: Session, transaction: SessionTransaction, connection: Any) -> None:
    # A savepoint is a part of what has begun already.
    if transaction.nested or _KEY not in session.info:
        return
    try:
        _refuse_autocommit(connection)
        result = session.info[_KEY](connection)
        if inspect.isawaitable(result):
            _refuse_awaitable(result)
    except BaseException as error:
        # The session has the connection already. Whoever swallows this error would go on
        # without what `on_begin` was to see to.
        connection.__class__ = _NotBegun
        connection.repom_cause = error
        raise


event.listen(_Telling, "after_begin", _after_begin)


class _NotBegun(Connection):
    """A connection on which nothing is executed until its transaction has been rolled back."""

    repom_cause: BaseException

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TransactionError(
            "on_begin of this database has failed, and without it nothing is executed in the "
            "transaction.\nLet that error pass (it is the __cause__), or roll back first."
        ) from self.repom_cause

    execute = _refuse
    exec_driver_sql = _refuse
    scalar = _refuse
    scalars = _refuse


def _refuse_autocommit(connection: Any) -> None:
    if connection._is_autocommit_isolation():
        raise ConfigurationError(
            "this database has an on_begin, and no transactions: its isolation level is "
            "AUTOCOMMIT here.\nWhat on_begin sets for the transaction would be over before the "
            "next statement. Use another level."
        )


def _refuse_awaitable(result: Any) -> NoReturn:
    if inspect.iscoroutine(result):
        result.close()
    raise ConfigurationError(
        "on_begin has returned an awaitable, and nobody awaits it.\n"
        "Write a plain function: it gets a sync Connection, in async sessions too, and calls "
        "`connection.execute(...)` without await."
    )
