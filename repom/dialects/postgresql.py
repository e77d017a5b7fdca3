"""PostgreSQL: asyncpg, psycopg and psycopg2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import URL

from repom.dialects.base import Support, aborted

# libpq's PQTRANS_INERROR, the same number in psycopg and psycopg2.
_IN_ERROR = 3


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
        if self.driver == "asyncpg":
            args["connection_class"] = _truthful(args.get("connection_class"))
            if self.pgbouncer:
                args["statement_cache_size"] = 0
                args["prepared_statement_cache_size"] = 0
        elif self.pgbouncer and self.driver == "psycopg":
            args["prepare_threshold"] = None
        return args

    def is_aborted(self, driver_connection: Any) -> bool:
        if self.driver == "asyncpg":
            return False
        return bool(driver_connection.info.transaction_status == _IN_ERROR)

    def is_lost(self, driver_connection: Any) -> bool:
        if self.driver == "asyncpg":
            return bool(driver_connection.is_closed())
        return bool(driver_connection.closed)


def _truthful(base: Any) -> Any:
    """A connection class of asyncpg that does not take ROLLBACK for an answer to COMMIT."""
    import asyncpg

    class TruthfulConnection(base or asyncpg.Connection):  # type: ignore[misc]
        __slots__ = ()

        async def execute(self, query: str, *args: Any, timeout: float | None = None) -> str:  # noqa: ASYNC109 - asyncpg's
            tag: str = await super().execute(query, *args, timeout=timeout)
            if tag == "ROLLBACK" and query.startswith("COMMIT"):
                raise aborted()
            return tag

    return TruthfulConnection
