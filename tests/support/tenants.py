"""Tenants: in one PostgreSQL database, kept apart by its policies or schemas, or one in each."""

import secrets
import threading
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from contextvars import ContextVar
from pathlib import Path

import pytest
from sqlalchemy import Connection, text
from sqlalchemy.engine import make_url

from tests.support.polling import block_until
from tests.support.reader import ask, connect, execute, rows

#: Whose request, or job, this is.
tenant: ContextVar[str] = ContextVar("tenant")

#: A new row is of the tenant that writes it, as in an application it is by a default, too.
_ROWS = """
CREATE TABLE note (tenant TEXT NOT NULL DEFAULT current_setting('app.tenant'), text TEXT NOT NULL);
ALTER TABLE note ENABLE ROW LEVEL SECURITY;
ALTER TABLE note FORCE ROW LEVEL SECURITY;
CREATE POLICY of_tenant ON note USING (tenant = current_setting('app.tenant', true));
GRANT USAGE ON SCHEMA public TO {role};
GRANT ALL ON note TO {role}
"""

_SCHEMA = """
CREATE SCHEMA {name};
CREATE TABLE {name}.note (tenant TEXT NOT NULL DEFAULT '{name}', text TEXT NOT NULL);
GRANT USAGE ON SCHEMA {name} TO {role};
GRANT ALL ON ALL TABLES IN SCHEMA {name} TO {role}
"""


def choose_rows(connection: Connection) -> None:
    """An `on_begin`: the policies see whose transaction it is."""
    connection.execute(
        text("SELECT set_config('app.tenant', :tenant, true)"), {"tenant": tenant.get()}
    )


def choose_schema(connection: Connection) -> None:
    """An `on_begin`: names without a schema mean the tenant's."""
    connection.execute(
        text("SELECT set_config('search_path', quote_ident(:tenant), true)"),
        {"tenant": tenant.get()},
    )


@contextmanager
def tenants_url(postgres_url: str, *names: str) -> Iterator[str]:
    """The URL of a database with notes of all tenants, for a role that no policy exempts.

    Args:
        postgres_url: for the superuser.
        names: of tenants with schemas of their own; by default they share a table.
    """
    role = f"repom_tenants_{secrets.token_hex(4)}"
    execute(postgres_url, f"CREATE ROLE {role} LOGIN")
    try:
        if not names:
            execute(postgres_url, _ROWS.format(role=role))
        for name in names:
            execute(postgres_url, _SCHEMA.format(name=name, role=role))
        yield make_url(postgres_url).set(username=role).render_as_string(hide_password=False)
    finally:
        execute(postgres_url, f"DROP OWNED BY {role}; DROP ROLE {role}")


# --- a database for each

NAMES = "abcde"

_EMPTY = "DROP TABLE IF EXISTS note; CREATE TABLE note (text VARCHAR(100) NOT NULL)"


@pytest.fixture(scope="session")
def tenant_databases(postgres_database: str) -> Iterator[dict[str, str]]:
    """The URLs of PostgreSQL databases by the names of tenants; a test uses `tenant_urls`."""
    admin = make_url(postgres_database)
    urls = {name: admin.set(database=f"{admin.database}_{name}") for name in NAMES}
    for url in urls.values():
        execute(postgres_database, f"CREATE DATABASE {url.database}")
    yield {name: url.render_as_string(hide_password=False) for name, url in urls.items()}
    for url in urls.values():
        execute(postgres_database, f"DROP DATABASE {url.database} WITH (FORCE)")


@pytest.fixture(params=["sqlite", "postgresql"])
def tenant_urls(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[dict[str, str]]:
    """The URLs of databases by the names of tenants, each with an empty table of notes.

    A connection that is left open fails the test.
    """
    urls = {name: f"sqlite:///{tmp_path / name}.sqlite3" for name in NAMES}
    if request.param == "postgresql":
        urls = request.getfixturevalue("tenant_databases")
    for url in urls.values():
        for statement in _EMPTY.split(";"):
            execute(url, statement)
    yield urls
    block_until(lambda: connected(urls.values()) == 0)


def texts(url: str) -> list[str]:
    """What is committed in the database of one tenant."""
    return [text for (text,) in rows(url, "SELECT text FROM note")]


def connected(urls: Iterable[str]) -> int:
    """How many databases have connections; for SQLite, how many connections aiosqlite has."""
    urls = list(urls)
    if urls[0].startswith("sqlite"):
        return sum("_connection_worker" in thread.name for thread in threading.enumerate())
    sql = "SELECT count(DISTINCT datname) FROM pg_stat_activity WHERE datname = ANY(%s)"
    with closing(connect(urls[0].rpartition("/")[0] + "/postgres")) as connection:
        return int(ask(connection, sql, [make_url(url).database for url in urls])[0][0])
