"""PostgreSQL: asyncpg, psycopg and psycopg2."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

from sqlalchemy import URL, Engine, event
from sqlalchemy.pool import PoolProxiedConnection

from repom.dialects.base import Support
from repom.dialects.hosts import TIMEOUT, connect_to_one, has_several_hosts
from repom.dialects.pipelined_begin import pipeline_begin, refuse_rollback
from repom.errors import RepomError, TwoPhaseUnavailableError
from repom.urls import safe

POSTGRESQL_DRIVERS = frozenset({"asyncpg", "psycopg", "psycopg_async", "psycopg2"})

# libpq's PQTRANS_INERROR, the same number in psycopg and psycopg2.
_IN_ERROR = 3
# in_failed_sql_transaction: refused because of an error before it.
_CONSEQUENCE = "25P02"
# Class 08, connection exception: found by the driver, and not said by the server.
_CONNECTION_CLASS = "08"
# In answer to COMMIT: it may have happened.
_UNDECIDED = frozenset(
    {
        # statement_completion_unknown: CockroachDB's "result is ambiguous"
        # (https://www.cockroachlabs.com/docs/stable/common-errors#result-is-ambiguous)
        "40003",
        "08007",  # transaction_resolution_unknown
        "XXA00",  # CockroachDB: it has happened, but for a part of its DDL
    }
)

# admin_shutdown, crash_shutdown, cannot_connect_now: all of them FATAL
_LAST_WORDS = frozenset({"57P01", "57P02", "57P03"})
_READ_ONLY = "25006"  # read_only_sql_transaction


class PostgreSQL(Support):
    """Finds out whether COMMIT really committed.

    PostgreSQL answers COMMIT of an aborted transaction with the command tag ROLLBACK and no
    error (https://www.postgresql.org/docs/current/sql-commit.html). psycopg knows the state
    before; asyncpg shows only the tag, which is read where it arrives.

    Args:
        pgbouncer: the server is a PgBouncer in transaction mode. Both statement caches of
            asyncpg are switched off, and nothing else: a `prepared_statement_name_func`
            leaves statements behind on the server's connections.
    """

    def __init__(
        self, url: URL, connect_args: Mapping[str, Any], *, is_async: bool, pgbouncer: bool = False
    ) -> None:
        super().__init__(url, connect_args, is_async=is_async)
        self.driver = url.get_driver_name()
        self.pgbouncer = pgbouncer

    def connect_args(self, given: Mapping[str, Any]) -> dict[str, Any]:
        args = super().connect_args(given)
        if self.pgbouncer and self.driver == "asyncpg":
            args["statement_cache_size"] = 0
            args["prepared_statement_cache_size"] = 0
        elif self.pgbouncer and self.driver != "psycopg2":
            args["prepare_threshold"] = None
        if has_several_hosts(self.url, args):
            if self.driver == "asyncpg":
                args.setdefault("async_creator_fn", connect_to_one)
            elif "connect_timeout" not in self.url.query:
                # libpq's own is for ever, psycopg's more than two minutes
                args.setdefault("connect_timeout", TIMEOUT)
        return args

    def install(self, engine: Engine) -> None:
        super().install(engine)
        if self.driver == "asyncpg":
            event.listen(engine, "connect", _make_truthful)

    def aborts(self, error: Exception, driver_connection: Any) -> bool:
        # The newest counts: what was before it has been healed by a savepoint.
        return sqlstate(error) not in (None, _CONSEQUENCE)

    def is_aborted(self, connection: PoolProxiedConnection) -> bool:
        if self.driver == "asyncpg":
            return False
        driver_connection: Any = connection.driver_connection
        return bool(driver_connection.info.transaction_status == _IN_ERROR)

    def is_lost(self, driver_connection: Any) -> bool:
        if self.driver == "asyncpg":
            return bool(driver_connection.is_closed())
        return bool(driver_connection.closed)

    def is_answer(self, error: Exception) -> bool:
        # A server that shuts down, or was told to end this connection, says so instead of
        # committing: while it commits, it does not listen. A pooler may say it by itself.
        if self.pgbouncer:
            return False
        return any(not state.startswith(_CONNECTION_CLASS) for state in _sqlstates(error))

    def is_undecided(self, error: Exception) -> bool:
        return not _UNDECIDED.isdisjoint(_sqlstates(error))

    def is_last_word(self, error: Exception) -> bool:
        return sqlstate(error) in _LAST_WORDS

    def is_demoted(self, error: Exception) -> bool:
        return sqlstate(error) == _READ_ONLY

    def check_two_phase(self) -> None:
        if self.driver == "asyncpg":
            raise TwoPhaseUnavailableError(
                "two_phase=True: asyncpg has no two-phase commit.\n"
                "Write postgresql+psycopg:// in the URL: that driver has it, sync and async."
            )

    def prepare_failed(self, error: Exception) -> RepomError | None:
        # In the hint, in every language; psycopg leaves the SQLSTATE out.
        if "max_prepared_transactions" not in str(error):
            return None
        return TwoPhaseUnavailableError(
            f"two_phase=True: {safe(self.url)} cannot prepare it: {str(error).splitlines()[0]}.\n"
            "Set max_prepared_transactions in postgresql.conf to at least max_connections, and "
            "restart the server: by default it is 0."
        )

    def abandon(self, driver_connection: Any) -> None:
        if self.driver == "asyncpg":
            driver_connection.terminate()
        else:
            driver_connection.pgconn.finish()


def sqlstate(error: BaseException) -> str | None:
    """The SQLSTATE of an exception of any driver; None if the driver raised it by itself."""
    return getattr(error, "sqlstate", None) or getattr(error, "pgcode", None)


def _sqlstates(error: BaseException) -> Iterator[str]:
    """Those of `error` and its causes: asyncpg keeps what the server said as the first one."""
    cause: BaseException | None = error
    while cause is not None:
        state = sqlstate(cause)
        if state is not None:
            yield state
        cause = cause.__cause__


def _make_truthful(dbapi_connection: Any, record: Any) -> None:
    # Afterwards, and not by `connection_class`, so that connections which the application
    # makes itself (`async_creator`) cannot be without it.
    connection = dbapi_connection.driver_connection
    base: Any = type(connection)
    connection.__class__ = _truthful(base)
    pipeline_begin(dbapi_connection)


@functools.cache
def _truthful(base: Any) -> Any:
    """A connection class of asyncpg that does not take ROLLBACK for an answer to COMMIT."""

    class TruthfulConnection(base):  # type: ignore[misc]
        __slots__ = ()

        async def execute(self, query: str, *args: Any, timeout: float | None = None) -> str:  # noqa: ASYNC109 - asyncpg's
            tag: str = await super().execute(query, *args, timeout=timeout)
            if query.startswith("COMMIT"):
                refuse_rollback(tag)
            return tag

    return TruthfulConnection
