"""pytest-xdist: each worker has a database of its own, made before its tests and dropped after.

Which name it has is a pure function with a table here; the rest are runs with real workers.
"""

from pathlib import Path

import pytest
from sqlalchemy import make_url

from repom.testing.workers import url_of_worker
from tests.support.reader import connect, execute, rows
from tests.testing.suites import run, write

URLS = [
    ("postgresql://me:secret@host/shop?sslmode=require", "shop_gw1"),
    ("mysql+aiomysql://host/shop", "shop_gw1"),
    ("sqlite:///test.db", "test_gw1.db"),
    ("sqlite:////data/my.tests/test", "/data/my.tests/test_gw1"),
    ("sqlite:///file:/data/a%20b.db?mode=rwc&uri=true", "file:///data/a%20b_gw1.db"),
    ("sqlite://", None),
    ("sqlite:///:memory:", ":memory:"),
]


@pytest.mark.parametrize(("url", "database"), URLS)
def test_database_of_a_worker(url: str, database: str | None) -> None:
    """Its name is that of the configured one and of the worker; all else stays. What only one
    process can see stays as it is."""
    given = make_url(url)
    assert url_of_worker(given, "gw1") == given.set(database=database)


TESTS = """
import pathlib, time
import pytest
from sqlalchemy import select
from tests.testing.inner.app import User
from repom import get_database, session_scope

@pytest.mark.parametrize("number", range(8))
async def test_shared_connection(async_db_test, client, number):
    assert (await client.get("/users")).json() == []
    for email in ("a", "b"):
        assert (await client.post(f"/users?email={email}")).status_code == 201
        time.sleep(0.02)
    assert (await client.get("/users")).json() == ["a", "b"]

async def test_that_commits(async_db_engine, worker_id):
    # Without the fixture that rolls back, sessions are those of production, in the worker's own.
    async with session_scope() as session:
        session.add(User(email=worker_id))
    async with async_db_engine.connect() as connection:
        assert (await connection.scalars(select(User.email))).all() == [worker_id]
    database = get_database().stand_in.url.database
    pathlib.Path(f"database_of_{worker_id}").write_text(str(database))
"""


def databases(url: str) -> set[str]:
    """The databases on the server."""
    sql = "SELECT datname FROM pg_database" if url.startswith("post") else "SHOW DATABASES"
    return {name for (name,) in rows(url, sql)}


def test_workers(tmp_path: Path, database_url: str) -> None:
    """Two at once: no test of one sees rows of the other, nor does the configured database get
    any, and theirs are gone at the end."""
    write(tmp_path, test_workers=TESTS)
    run(tmp_path, database_url, "-n2", "--dist=each").assert_passed()
    names = {path.read_text() for path in tmp_path.glob("database_of_*")}
    assert len(names) == 2
    assert all(name.endswith(("_gw0", "_gw1", "_gw0.sqlite3", "_gw1.sqlite3")) for name in names)
    if database_url.startswith("sqlite"):
        assert not [*Path(str(make_url(database_url).database)).parent.glob("*.sqlite3*")]
    else:
        assert not names & databases(database_url)
        schema = "current_schema()" if database_url.startswith("post") else "database()"
        tables = f"SELECT 1 FROM information_schema.tables WHERE table_schema = {schema}"
        assert rows(database_url, tables) == []


def test_what_an_earlier_run_has_left(tmp_path: Path, postgres_url: str) -> None:
    """A database of that name, of a run that was killed, is dropped."""
    name = f"{make_url(postgres_url).database}_gw0"
    execute(postgres_url, f"CREATE DATABASE {name}")
    left = make_url(postgres_url).set(database=name).render_as_string(hide_password=False)
    execute(left, "CREATE TABLE users (wrong INTEGER)")
    write(tmp_path, test_workers=TESTS)
    run(tmp_path, postgres_url, "-n1").assert_passed()
    assert name not in databases(postgres_url)


def test_database_that_is_in_use(tmp_path: Path, postgres_url: str) -> None:
    """The same tests run twice at a time: the second run says so, and does not disturb the
    first."""
    name = f"{make_url(postgres_url).database}_gw0"
    execute(postgres_url, f"CREATE DATABASE {name}")
    used = make_url(postgres_url).set(database=name).render_as_string(hide_password=False)
    connection = connect(used)
    try:
        write(tmp_path, test_workers=TESTS)
        done = run(tmp_path, postgres_url, "-n1")
        assert f"/{name}, the database of one worker of pytest-xdist, cannot be made" in done.output
        assert "passed" not in done.outcomes
    finally:
        connection.close()
        execute(postgres_url, f"DROP DATABASE {name} WITH (FORCE)")
