"""What one dialect needs when an engine is made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import URL

from repom.dialects.base import Support
from repom.dialects.mysql import MySQL
from repom.dialects.postgresql import POSTGRESQL_DRIVERS, PostgreSQL
from repom.dialects.read_only import ReadOnly, ReadOnlyMySQL, ReadOnlyPostgreSQL, ReadOnlySQLite
from repom.dialects.sqlite import Begin, SQLite, is_sqlite
from repom.errors import ConfigurationError
from repom.urls import safe

__all__ = ["Begin", "Support", "support_for"]


def support_for(
    url: URL,
    connect_args: Mapping[str, Any],
    *,
    is_async: bool,
    sqlite_begin: Begin | None = None,
    pgbouncer: bool = False,
    read_only: bool = False,
    in_transactions: bool = False,
) -> Support:
    """The support for the dialect of `url`; the plain one for what repom knows nothing of.

    Args:
        url: the URL with the driver that will be used.
        connect_args: what the URL says in words that this driver takes only as arguments.
        is_async: whether it is for an `AsyncEngine`.
        sqlite_begin: see `Database`.
        pgbouncer: see `Database`.
        read_only: whether the database is to hold the connections read-only.
        in_transactions: whether what only reads needs a transaction for that, too.

    Raises:
        ConfigurationError: how this database does that is not known.
    """
    if read_only:
        support = _read_only_support_for(url, connect_args, is_async, pgbouncer)
        # Of PgBouncer's and of memory databases see their classes.
        in_memory = isinstance(support, ReadOnlySQLite) and support.is_memory
        support.in_autocommit = not (in_transactions or pgbouncer or in_memory)
        return support
    match url.get_backend_name():
        case "sqlite" if is_sqlite(url):
            return SQLite(url, connect_args, is_async=is_async, begin=sqlite_begin or "DEFERRED")
        case "postgresql" if url.get_driver_name() in POSTGRESQL_DRIVERS:
            return PostgreSQL(url, connect_args, is_async=is_async, pgbouncer=pgbouncer)
        case "mysql" | "mariadb":
            return MySQL(url, connect_args, is_async=is_async)
        case _:
            return Support(url, connect_args, is_async=is_async)


def _read_only_support_for(
    url: URL, connect_args: Mapping[str, Any], is_async: bool, pgbouncer: bool
) -> ReadOnly:
    match url.get_backend_name():
        case "sqlite" if is_sqlite(url):
            return ReadOnlySQLite(url, connect_args, is_async=is_async)
        case "postgresql" if url.get_driver_name() in POSTGRESQL_DRIVERS:
            return ReadOnlyPostgreSQL(url, connect_args, is_async=is_async, pgbouncer=pgbouncer)
        case "mysql" | "mariadb":
            return ReadOnlyMySQL(url, connect_args, is_async=is_async)
    raise ConfigurationError(
        f"read_only was asked for, but repom does not know how {safe(url)} holds a connection "
        "read-only.\nIt does for PostgreSQL, MySQL, MariaDB and SQLite by their usual drivers. "
        "Leave read_only out."
    )
