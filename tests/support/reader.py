"""A database seen from outside: what is committed, and who is connected.

Everything here uses the plain sync drivers (sqlite3, psycopg, pymysql), never repom and never
SQLAlchemy's engines, so that a test does not ask the code under test whether it was right. Each
call blocks for a few milliseconds; in a coroutine that is wanted, because nothing else happens
meanwhile.
"""

import re
import sqlite3
from contextlib import closing
from typing import Any, NamedTuple

import psycopg
import pymysql
from sqlalchemy.engine import make_url

CONNECT_TIMEOUT = 2  # seconds; the least that libpq takes
LOCK_TIMEOUT = 10  # seconds that a statement waits for a lock, instead of for ever


def is_postgres(url: str) -> bool:
    """Whether this is the URL of a PostgreSQL database."""
    return make_url(url).get_backend_name().startswith("postgres")


def is_sqlite(url: str) -> bool:
    """Whether this is the URL of an SQLite database."""
    return make_url(url).get_backend_name() == "sqlite"


def connect(url: str) -> Any:
    """Open a connection of the plain sync driver, in autocommit; the caller closes it."""
    parsed = make_url(url)
    if is_sqlite(url):
        return sqlite3.connect(parsed.database or "", timeout=LOCK_TIMEOUT, isolation_level=None)
    if is_postgres(url):
        return psycopg.connect(
            parsed.set(drivername="postgresql").render_as_string(hide_password=False),
            autocommit=True,
            connect_timeout=CONNECT_TIMEOUT,
            options=f"-c statement_timeout={LOCK_TIMEOUT}s",
        )
    return pymysql.connect(
        host=parsed.host,
        port=parsed.port or 3306,
        user=parsed.username,
        password=parsed.password or "",
        database=parsed.database,
        autocommit=True,
        connect_timeout=CONNECT_TIMEOUT,
        read_timeout=LOCK_TIMEOUT,
        # With TLS a connection costs 27 ms more: OpenSSL reads its certificates each time.
        ssl_disabled=True,
    )


def rows(url: str, sql: str, *params: object) -> list[tuple[Any, ...]]:
    """Return the rows of a query, asked on a connection of its own; parameters are `%s`."""
    with closing(connect(url)) as connection:
        return ask(connection, sql, *params)


def execute(url: str, sql: str, *params: object) -> None:
    """Run a statement and commit it, on a connection of its own; parameters are `%s`."""
    rows(url, sql, *params)


def ask(connection: Any, sql: str, *params: object) -> list[tuple[Any, ...]]:
    """Run a statement on a connection of `connect()`; return its rows, if it has any."""
    if isinstance(connection, sqlite3.Connection):
        sql = sql.replace("%s", "?")
    with closing(connection.cursor()) as cursor:
        # Without parameters none are passed, so that a % in the statement is just that.
        cursor.execute(sql, params) if params else cursor.execute(sql)
        return [tuple(row) for row in cursor.fetchall()] if cursor.description else []


class ServerConnection(NamedTuple):
    """A connection as its server sees it."""

    id: int
    state: str
    in_transaction: bool
    query: str


def connections(url: str) -> list[ServerConnection]:
    """Return the connections to this PostgreSQL or MariaDB database, the asking one left out."""
    with closing(connect(url)) as connection:
        return other_connections(connection)


def open_transactions(url: str) -> int:
    """Return how many connections to this database are in a transaction.

    For an SQLite file, which must be in WAL mode, it is 1 if there are any, found after waiting.
    """
    if is_sqlite(url):
        busy, *_ = rows(url, "PRAGMA wal_checkpoint(TRUNCATE)")[0]
        return int(busy)
    return sum(connection.in_transaction for connection in connections(url))


def other_connections(connection: Any) -> list[ServerConnection]:
    """Return the connections to the database of `connection`, itself left out."""
    if isinstance(connection, psycopg.Connection):
        found = ask(
            connection,
            "select pid, state, xact_start is not null, query from pg_stat_activity"
            " where datname = current_database() and pid <> pg_backend_pid()"
            " and backend_type = 'client backend'",
        )
        return [ServerConnection(*row) for row in found]
    found = ask(
        connection,
        "select id, if(command = 'Sleep', 'idle', lower(command)), coalesce(info, '')"
        " from information_schema.processlist where db = database() and id <> connection_id()",
    )
    if not found:
        return []
    busy = _threads_in_transaction(ask(connection, "show engine innodb status")[0][2])
    return [
        ServerConnection(
            id_,
            "idle in transaction" if id_ in busy and state == "idle" else state,
            id_ in busy,
            query,
        )
        for id_, state, query in found
    ]


def _threads_in_transaction(innodb_status: str) -> set[int]:
    # The status, and not information_schema.innodb_trx: that is a copy which is renewed only
    # when nobody has read it for 0.1 s, so who polls it sees the past.
    transactions = innodb_status.split("---TRANSACTION ")[1:]
    found = [
        re.search(r"thread id (\d+)", transaction)
        for transaction in transactions
        if "ACTIVE" in transaction.partition("\n")[0]
    ]
    return {int(match[1]) for match in found if match}
