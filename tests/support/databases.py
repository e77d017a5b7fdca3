"""Databases for the tests: one file, one PostgreSQL, one MariaDB, empty for each test.

The servers are looked for at `REPOM_TEST_POSTGRES_URL` and `REPOM_TEST_MYSQL_URL`, else at their
usual local addresses. The tests that need a missing one are skipped, or fail where `CI` is true.
A run makes one database per server, under a name of its own, so that several runs and several
workers do not meet. URLs name no driver (`postgresql://...`): repom chooses it.
"""

import contextlib
import functools
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pymysql
import pytest
from sqlalchemy.engine import URL, make_url

from tests.support.reader import ServerConnection, ask, connect, execute, other_connections

CLOSE_TIMEOUT = 1.0  # seconds in which a server has noticed that a connection was closed

# What a test has used, for the check at its very end.
USED_URLS = pytest.StashKey[list[str]]()

# Not waiting for the disk: if the server crashes, this database is of no use anyway.
_EMPTY_POSTGRES = """
set synchronous_commit = off;
do $$ declare name text; begin
  for name in select nspname from pg_namespace
    where nspname !~ '^pg_' and nspname <> 'information_schema'
  loop execute format('drop schema %I cascade', name); end loop;
  create schema public;
end $$
"""


@dataclass(frozen=True)
class Server:
    """A kind of server: `variable` names its URL, `default` is where it usually is."""

    name: str
    variable: str
    default: str

    def url(self) -> URL:
        """Return the URL of the database to log in to, without a driver."""
        given = os.environ.get(self.variable) or self.default
        return make_url(given).set(drivername=make_url(self.default).drivername)


POSTGRES = Server(
    "PostgreSQL", "REPOM_TEST_POSTGRES_URL", "postgresql://postgres@127.0.0.1:5432/test"
)
MYSQL = Server("MariaDB", "REPOM_TEST_MYSQL_URL", "mysql://root@127.0.0.1:3306/test")


@functools.cache
def why_missing(server: Server) -> str:
    """Return why a server cannot be used, in one line, or ""; it is tried once in a run."""
    try:
        connect(_text(server.url())).close()
    except (psycopg.Error, pymysql.Error) as error:
        reason = str(error).splitlines()[0]
        return (
            f"no {server.name} server at {server.url().render_as_string()} ({reason}):"
            f" start one there, or set {server.variable} to the URL of another"
        )
    return ""


def in_ci() -> bool:
    """Whether `CI` is true, so that a missing server is a failure and never a skip."""
    return os.environ.get("CI", "").lower() in {"1", "true", "yes"}


def _database_of_this_run(server: Server) -> Iterator[str]:
    if reason := why_missing(server):
        if in_ci():
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason)
    admin = _text(server.url())
    name = f"repom_test_{os.getpid()}_{secrets.token_hex(4)}"
    url = _text(server.url().set(database=name))
    execute(admin, f"create database {name}")
    yield url
    with closing(connect(url)) as connection:
        _terminate(connection, other_connections(connection))
    execute(admin, f"drop database {name}")


def leave_clean(url: str, *, may_stay: bool = False) -> list[ServerConnection]:
    """Empty a database after a test; return the connections to it that the test left open.

    Those are terminated, so that only the test which left them pays for it. A server notices a
    closed connection a moment later, so it has `CLOSE_TIMEOUT` to do so.

    Args:
        may_stay: connections may be left, so do not wait for them.
    """
    with closing(connect(url)) as connection:
        left = other_connections(connection)
        end, pause = time.monotonic() + CLOSE_TIMEOUT, 0.001
        while left and not may_stay and time.monotonic() < end:
            time.sleep(pause)
            pause = min(2 * pause, 0.1)
            left = other_connections(connection)
        _terminate(connection, left)
        if isinstance(connection, psycopg.Connection):
            ask(connection, _EMPTY_POSTGRES)
        else:
            name = make_url(url).database
            ask(connection, f"drop database {name}")
            ask(connection, f"create database {name}")
    return left


def _terminate(connection: Any, others: list[ServerConnection]) -> None:
    postgres = isinstance(connection, psycopg.Connection)
    kill = "select pg_terminate_backend(%s)" if postgres else "kill %s"
    for other in others:
        with contextlib.suppress(pymysql.OperationalError):  # it has just ended by itself
            ask(connection, kill, other.id)


def _text(url: URL) -> str:
    return url.render_as_string(hide_password=False)


# --- fixtures ---------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def postgres_database() -> Iterator[str]:
    """The PostgreSQL database of this run; a test uses `postgres_url`."""
    yield from _database_of_this_run(POSTGRES)


@pytest.fixture(scope="session")
def mysql_database() -> Iterator[str]:
    """The MariaDB database of this run; a test uses `mysql_url`."""
    yield from _database_of_this_run(MYSQL)


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    """The URL of an SQLite file that does not exist yet."""
    return f"sqlite:///{tmp_path / 'test.sqlite3'}"


@pytest.fixture
def postgres_url(request: pytest.FixtureRequest, postgres_database: str) -> str:
    """The URL of an empty PostgreSQL database; a connection left open fails the test."""
    request.node.stash[USED_URLS].append(postgres_database)
    return postgres_database


@pytest.fixture
def mysql_url(request: pytest.FixtureRequest, mysql_database: str) -> str:
    """The URL of an empty MariaDB database; a connection left open fails the test."""
    request.node.stash[USED_URLS].append(mysql_database)
    return mysql_database


@pytest.fixture(params=["sqlite", "postgresql", "mysql"])
def database_url(request: pytest.FixtureRequest) -> str:
    """The URL of an empty database: the test runs once on each kind."""
    name = {"sqlite": "sqlite_url", "postgresql": "postgres_url", "mysql": "mysql_url"}
    url: str = request.getfixturevalue(name[request.param])
    return url
