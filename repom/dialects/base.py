"""What every dialect needs when an engine is made, and the questions only one can answer.

Two truths are established here for every connection, repom's own sessions or not:

* COMMIT of a transaction that the database has already aborted is `TransactionAbortedError`.
* A connection lost while COMMIT is in flight is `CommitOutcomeUnknown`, and so is an answer to
  COMMIT by which the server itself does not know.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from sqlalchemy import URL, Connection, Engine, event
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.pool import AsyncAdaptedQueuePool, NullPool, Pool, PoolProxiedConnection, QueuePool

from repom.awaited_pool import AwaitedQueuePool
from repom.dialects.write_queue import Ticket
from repom.errors import (
    CommitOutcomeUnknown,
    DatabaseUnreachableError,
    RepomError,
    TransactionAbortedError,
    TwoPhaseUnavailableError,
)
from repom.lending import LendingQueuePool
from repom.observer import observer_here
from repom.urls import safe

# Keys of `PoolProxiedConnection.info`, which lives as long as the DBAPI connection.
ABORTED_BY = "repom.aborted_by"  # the error with which the server aborted the transaction
_COMMIT_SENT = "repom.commit_sent"  # and not yet answered
_ROLLBACK_SENT = "repom.rollback_sent"  # and not yet answered
CLOSED_BY_COMMIT = "repom.closed_by_commit"  # its session gives it back right after COMMIT
READING = "repom.reading"  # the `Reading` of the unit of work that has it, if that only reads
_IS_CLEAN = "repom.is_clean"  # nothing was begun since COMMIT, so there is nothing to roll back

_QUEUE_POOL_OPTIONS = ("pool_size", "max_overflow", "pool_timeout", "pool_use_lifo")


def info_of(connection: Any) -> dict[str, Any]:
    """The dict that is `PoolProxiedConnection.info`.

    SQLAlchemy's own way there remembers it, for which every checkout gets a `__dict__` of its own.
    """
    record = getattr(connection, "_connection_record", None)
    found: dict[str, Any] = connection.info if record is None else record.info
    return found


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
        return AwaitedQueuePool if self.is_async else LendingQueuePool

    # --- what only one dialect can answer; none of it asks the server

    def aborts(self, error: Exception, driver_connection: Any) -> bool:
        """Whether the server has aborted the whole transaction, and raised `error` for that."""
        return False

    def is_aborted(self, connection: PoolProxiedConnection) -> bool:
        """Whether the server would answer COMMIT without committing."""
        return ABORTED_BY in info_of(connection)

    def is_lost(self, driver_connection: Any) -> bool:
        """Whether the connection is known to be dead, so that COMMIT would not be sent."""
        return False

    def is_answer(self, error: Exception) -> bool:
        """Whether `error`, which ended the connection, is the server's answer to COMMIT."""
        return False

    def is_undecided(self, error: Exception) -> bool:
        """Whether `error`, the server's answer to COMMIT, says that it does not know itself."""
        return False

    def is_last_word(self, error: Exception) -> bool:
        """Whether the server, having said `error`, closes the connection."""
        return False

    def is_demoted(self, error: Exception) -> bool:
        """Whether `error` says that this server takes no writes any more, or not for now.

        It lives and answers reads. In a transaction that was declared read-only the error may
        be the application's own mistake; then it is not asked for.
        """
        return False

    def check_two_phase(self) -> None:
        """Raise what can be known, without connecting, against two-phase transactions."""
        raise TwoPhaseUnavailableError(
            f"two_phase=True: {self.url.drivername} has no two-phase commit.\n"
            "It is to be had with PostgreSQL by psycopg or psycopg2, and with MySQL and MariaDB."
        )

    def prepare_failed(self, error: Exception) -> RepomError | None:
        """The error to raise in place of one by which the server could not prepare, if any."""
        return None

    def connect_failed(self, error: Exception) -> RepomError:
        """The error to raise when no connection could be made."""
        said = " ".join(str(error).split())  # psycopg takes several lines
        return DatabaseUnreachableError(
            f"cannot connect to {safe(self.url)}: {type(error).__name__}: {said}\n"
            "Check that the server runs and is reachable, and that host, port, user, password "
            "and database name of the URL are right."
        )

    def abandon(self, driver_connection: Any) -> None:
        """Close a connection whose event loop is closed, so without asking the server.

        What repom does not know how to close, the driver closes when it is collected.
        """

    def place_in_line(self, connection: PoolProxiedConnection, *, awaits: bool) -> Ticket | None:
        """The right to write, for a transaction that only `repom.testing` begins.

        Args:
            connection: where it begins.
            awaits: whether the caller awaits its turn, or blocks its thread.

        Returns:
            None where there may be many writers.
        """
        return None

    # --- the two truths

    def install(self, engine: Engine) -> None:
        """Make `engine` keep the two truths."""
        # Methods of the dialect, of which every engine has its own, and not events of the
        # engine: a single listener makes SQLAlchemy prepare for all of them at every
        # statement. Nor `do_connect`, where the first listener to connect keeps others out,
        # those that fetch a password for instance.
        dialect: Any = engine.dialect
        begin, commit, rollback = dialect.do_begin, dialect.do_commit, dialect.do_rollback
        dialect.connect = partial(self._connect, dialect.connect)
        # For each transaction, and no `partial`: through C, a call takes a part of the C stack,
        # which is copied whenever its greenlet waits.
        dialect.do_begin = lambda connection: self._begin(begin, connection)
        dialect.do_commit = lambda connection: self.commit(commit, connection)
        dialect.do_rollback = lambda connection: self._rollback(rollback, connection)
        self.watch(engine)

    def watch(self, engine: Engine) -> None:
        """Make `engine` keep the two truths, if its dialect is that of an installed one."""
        event.listen(engine, "handle_error", self._on_error)

    def _connect(self, connect: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return connect(*args, **kwargs)
        except (RepomError, TypeError):  # a wrong keyword in connect_args explains itself
            raise
        except Exception as error:
            raise self.connect_failed(error) from error

    def _begin(self, do_begin: Callable[..., None], connection: PoolProxiedConnection) -> None:
        self.begins(connection)
        do_begin(connection)

    def begins(self, connection: PoolProxiedConnection) -> None:
        """Forget what was known of the transaction before the one that begins."""
        info = info_of(connection)
        info.pop(ABORTED_BY, None)
        info.pop(CLOSED_BY_COMMIT, None)
        info.pop(_IS_CLEAN, None)

    def commit(self, do_commit: Callable[..., None], connection: PoolProxiedConnection) -> None:
        """COMMIT by `do_commit(connection)`, unless the server would not."""
        # What is raised here, `_on_error` sees.
        if self.is_aborted(connection):
            raise aborted()
        info = info_of(connection)
        if not self.is_lost(connection.driver_connection):
            info[_COMMIT_SENT] = True
        do_commit(connection)
        info.pop(_COMMIT_SENT, None)
        if info.pop(CLOSED_BY_COMMIT, False):
            info[_IS_CLEAN] = True
        else:  # not by a session of a scope, which would say so itself
            observer_here().committed()

    def _rollback(
        self, do_rollback: Callable[..., None], connection: PoolProxiedConnection
    ) -> None:
        # The pool rolls back whatever comes back to it, which on MySQL is a round trip.
        info = info_of(connection)
        if not info.pop(_IS_CLEAN, False):
            info[_ROLLBACK_SENT] = True
            do_rollback(connection)
            info.pop(_ROLLBACK_SENT, None)

    def _on_error(self, context: ExceptionContext) -> BaseException | None:
        connection = context.connection
        error = context.original_exception
        if connection is None or connection.invalidated or not isinstance(error, Exception):
            return None
        info = info_of(connection.connection)
        commit_sent = info.pop(_COMMIT_SENT, False)
        if info.pop(_ROLLBACK_SENT, False) and not context.is_disconnect:
            # By a server that was told to cancel it, for instance. SQLAlchemy takes the transaction
            # for over, and would put the connection back into its pool with it.
            context.is_disconnect, context.invalidate_pool_on_disconnect = True, False
        if self.is_last_word(error):
            # The driver may see the end of the connection a moment after what was said last.
            context.is_disconnect = True
        why = self._why_unknown(error, context.is_disconnect) if commit_sent else None
        if why is not None:
            if not context.is_disconnect:
                _roll_back(connection)
            observer_here().committed()
            return CommitOutcomeUnknown(
                f"{why}: the database may have committed, or not.\n"
                "Look there before doing the work again; repom never retries it."
            )
        if isinstance(error, TransactionAbortedError):
            error.__cause__ = info.get(ABORTED_BY)
            _roll_back(connection)
        elif isinstance(error, RepomError):
            return None  # the database has not been asked
        elif self.is_demoted(error) and not _is_declared_read_only(connection):
            # As if it was lost. So the whole pool is renewed: its other connections were opened
            # when this server was the one that writes, and would fail one after the other.
            context.is_disconnect = True
        elif context.is_disconnect:
            pass  # the server undoes it
        elif commit_sent:
            _roll_back(connection)
        elif self.aborts(error, connection.connection.driver_connection):
            info[ABORTED_BY] = error
        observer_here().failed(context.sqlalchemy_exception or error)
        return None

    def _why_unknown(self, error: Exception, is_disconnect: bool) -> str | None:
        """Why nobody knows what became of a COMMIT that ended in `error`, if so it is."""
        if isinstance(error, RepomError):
            return None  # the server's silent ROLLBACK, for instance
        if self.is_undecided(error):
            return "the server does not know what became of COMMIT"
        if is_disconnect and not self.is_answer(error):
            return "the connection was lost while COMMIT was in flight"
        return None


def _roll_back(connection: Connection) -> None:
    """Roll back below SQLAlchemy, which takes a failed COMMIT for a transaction that is over.

    It would put the connection back into its pool with what is still open on it.
    """
    try:
        connection.dialect.do_rollback(connection.connection)
    except Exception as error:
        connection.invalidate(error)


def _is_declared_read_only(connection: Connection) -> bool:
    options = connection.get_execution_options()
    return READING in info_of(connection.connection) or bool(options.get("postgresql_readonly"))


def aborted() -> TransactionAbortedError:
    """The error for a COMMIT that would be, or was, answered by a rollback."""
    return TransactionAbortedError(
        "nothing was committed: the database had already aborted this transaction, because an "
        "earlier statement failed and its error was swallowed.\n"
        "Let that error pass (it is the __cause__), or run what may fail inside "
        "`async with atomic():`, which rolls back to a savepoint."
    )


_ASYNC_TWIN: dict[type[Pool], type[Pool]] = {
    AsyncAdaptedQueuePool: AwaitedQueuePool,
    QueuePool: AwaitedQueuePool,
}
_SYNC_TWIN: dict[type[Pool], type[Pool]] = {
    AsyncAdaptedQueuePool: LendingQueuePool,
    QueuePool: LendingQueuePool,
}
