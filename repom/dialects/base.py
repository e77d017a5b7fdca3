"""What every dialect needs when an engine is made, and the questions only one can answer.

Two truths are established here for every connection, repom's own sessions or not:

* COMMIT of a transaction that the database has already aborted is `TransactionAbortedError`.
* A connection lost while COMMIT is in flight is `CommitOutcomeUnknown`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import URL, Connection, Engine, event
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.pool import AsyncAdaptedQueuePool, NullPool, Pool, QueuePool

from repom.errors import (
    CommitOutcomeUnknown,
    DatabaseUnreachableError,
    RepomError,
    TransactionAbortedError,
)
from repom.urls import safe

# Keys of `Connection.info`, which lives as long as the DBAPI connection.
_FIRST_ERROR = "repom.first_error"  # of the running transaction, or since its last savepoint
_ROLLED_BACK_BY = "repom.rolled_back_by"  # the error with which the server ended it
_COMMIT_SENT = "repom.commit_sent"

_QUEUE_POOL_OPTIONS = ("pool_size", "max_overflow", "pool_timeout", "pool_use_lifo")


class Support:
    """Makes engines of one dialect behave as repom promises.

    Args:
        url: where the engine connects to, with the driver it will use.
        connect_args: what the URL says in words that this driver takes only as arguments.
        is_async: whether it is for an `AsyncEngine`.
    """

    def __init__(self, url: URL, connect_args: Mapping[str, Any], *, is_async: bool) -> None:
        self.url = url
        self._url_args = connect_args
        self.is_async = is_async

    def check(self) -> None:
        """Raise what can be known without connecting."""

    def connect_args(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The driver's connect arguments: `given` by the user, and what repom needs."""
        return {**self._url_args, **given}

    def engine_kwargs(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """`given`, without the pool options that the pool in use does not take."""
        kwargs = dict(given)
        pool = kwargs.get("poolclass") or self.default_pool()
        twin = _ASYNC_TWIN if self.is_async else _SYNC_TWIN
        pool = twin.get(pool, pool)
        if not issubclass(pool, QueuePool):
            for option in _QUEUE_POOL_OPTIONS:
                kwargs.pop(option, None)
        if issubclass(pool, NullPool):
            kwargs.pop("pool_recycle", None)
        return kwargs | {"poolclass": pool}

    def default_pool(self) -> type[Pool]:
        return AsyncAdaptedQueuePool if self.is_async else QueuePool

    def is_aborted(self, driver_connection: Any) -> bool:
        """Whether the database would answer COMMIT without committing. Asks no server."""
        return False

    def ends_transaction(self, error: Exception) -> bool:
        """Whether the server rolled the whole transaction back when it raised `error`."""
        return False

    def is_lost(self, driver_connection: Any) -> bool:
        """Whether the connection is known to be dead, so that COMMIT would not be sent."""
        return False

    def connect_failed(self, error: Exception) -> RepomError:
        """The error to raise when no connection could be made."""
        return DatabaseUnreachableError(
            f"cannot connect to {safe(self.url)}: {type(error).__name__}: {error}\n"
            "Check that the server runs and is reachable, and that host, port, user, password "
            "and database name of the URL are right."
        )

    def install(self, engine: Engine) -> None:
        """Register the listeners that keep the two truths."""
        event.listen(engine, "do_connect", self._connect)
        event.listen(engine, "begin", _forget)
        event.listen(engine, "rollback_savepoint", _forget_error)
        event.listen(engine, "commit", self._before_commit)
        event.listen(engine, "handle_error", self._on_error)

    def _connect(self, dialect: Any, record: Any, cargs: Any, cparams: Any) -> Any:
        try:
            return dialect.connect(*cargs, **cparams)
        except (RepomError, TypeError):  # a wrong keyword in connect_args explains itself
            raise
        except Exception as error:
            raise self.connect_failed(error) from error

    def _before_commit(self, connection: Connection) -> None:
        info = connection.info
        driver_connection = connection.connection.driver_connection
        if _ROLLED_BACK_BY in info or self.is_aborted(driver_connection):
            _roll_back(connection)
            raise aborted() from info.get(_ROLLED_BACK_BY) or info.get(_FIRST_ERROR)
        if not self.is_lost(driver_connection):
            info[_COMMIT_SENT] = True

    def _on_error(self, context: ExceptionContext) -> BaseException | None:
        connection = context.connection
        error = context.original_exception
        if connection is None or connection.invalidated or not isinstance(error, Exception):
            return None
        info = connection.info
        if isinstance(error, TransactionAbortedError):
            # Raised by the driver's connection class, which does not know the first error.
            error.__cause__ = info.get(_FIRST_ERROR)
            return None
        if context.is_disconnect and _COMMIT_SENT in info:
            return CommitOutcomeUnknown(
                "the connection was lost while COMMIT was in flight: the database may have "
                "committed, or not.\n"
                "Look there before doing the work again; repom never retries it."
            )
        info.setdefault(_FIRST_ERROR, error)
        if self.ends_transaction(error):
            info[_ROLLED_BACK_BY] = error
        return None


def _roll_back(connection: Connection) -> None:
    """Roll back below SQLAlchemy, which takes a failed COMMIT for a transaction that is over.

    It would put the connection back into its pool with what is still open on it.
    """
    try:
        connection.dialect.do_rollback(connection.connection)
    except Exception as error:
        connection.invalidate(error)


def aborted() -> TransactionAbortedError:
    """The error for a COMMIT that would be, or was, answered by a rollback."""
    return TransactionAbortedError(
        "nothing was committed: the database had already aborted this transaction, because an "
        "earlier statement failed and its error was swallowed.\n"
        "Let that error pass (it is the __cause__), or run what may fail inside "
        "`async with atomic():`, which rolls back to a savepoint."
    )


def commit_was_sent(connection: Connection) -> bool:
    """Whether COMMIT is, or was, under way in the running transaction of `connection`."""
    return _COMMIT_SENT in connection.info


def _forget(connection: Connection) -> None:
    info = connection.info
    for key in (_FIRST_ERROR, _ROLLED_BACK_BY, _COMMIT_SENT):
        info.pop(key, None)


def _forget_error(connection: Connection, name: str, context: None) -> None:
    # Rolled back to a savepoint, an aborted transaction is healthy again. One that the server
    # has ended is not: there is no savepoint left to go back to.
    connection.info.pop(_FIRST_ERROR, None)


_ASYNC_TWIN: dict[type[Pool], type[Pool]] = {QueuePool: AsyncAdaptedQueuePool}
_SYNC_TWIN: dict[type[Pool], type[Pool]] = {AsyncAdaptedQueuePool: QueuePool}
