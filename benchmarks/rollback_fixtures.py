"""195 tests of an application, rolled back each, against the database made anew for each.

    python -m benchmarks.rollback_fixtures [--rounds=3] [--tables=15,40] [URL ...]

By default on an SQLite file, and on the PostgreSQL of REPOM_TEST_POSTGRES_URL. The two ways run
the same tests in turns, in a pytest of their own. Printed is the time that pytest takes for
them (set up, called, torn down), of each way the best of all rounds, and what one is of the
other; beside it the same with the start of Python and all imports. Rolling back costs the same
whatever the schema; making it anew costs more with each table, so there is a line for a small
application and one for one of middle size.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from sqlalchemy import make_url

APP = '''
import os
from sqlalchemy import ForeignKey, String, select
from sqlalchemy.orm import Mapped, mapped_column
from repom.models import Base

class User(Base):
    __tablename__ = "users"
    id: Mapped[int] = mapped_column(primary_key=True)
    email: Mapped[str] = mapped_column(String(100), unique=True)

def table(number):
    """A table among others, with an index and a reference."""
    class Row(Base):
        __tablename__ = f"table_{number}"
        id: Mapped[int] = mapped_column(primary_key=True)
        user_id: Mapped[int] = mapped_column(ForeignKey("users.id"), index=True)
        name: Mapped[str] = mapped_column(String(100))
    return Row

TABLES = [table(number) for number in range(int(os.environ["TABLES"]) - 1)]
'''

TESTS = """
import pytest
from sqlalchemy import func, select
from app import User

async def count(session):
    return await session.scalar(select(func.count()).select_from(User))

@pytest.mark.parametrize("number", range(25))
async def test_create(async_db_test, number):
    async_db_test.add(User(email=f"{number}@example.com"))
    await async_db_test.commit()
    assert await count(async_db_test) == 1

@pytest.mark.parametrize("number", range(25))
async def test_read(async_db_test, number):
    async_db_test.add_all([User(email=f"{n}@example.com") for n in range(5)])
    await async_db_test.flush()
    query = select(User).where(User.email == "3@example.com")
    assert (await async_db_test.scalars(query)).one().email == "3@example.com"

@pytest.mark.parametrize("number", range(25))
async def test_update(async_db_test, number):
    user = User(email="a@example.com")
    async_db_test.add(user)
    await async_db_test.commit()
    user.email = "b@example.com"
    await async_db_test.commit()
    assert await async_db_test.scalar(select(User.email)) == "b@example.com"

@pytest.mark.parametrize("number", range(25))
async def test_isolated(async_db_test, number):
    assert await count(async_db_test) == 0

@pytest.mark.parametrize("number", range(24))
def test_create_sync(db_test, number):
    db_test.add(User(email=f"{number}@example.com"))
    db_test.commit()
    assert db_test.scalar(select(func.count()).select_from(User)) == 1

@pytest.mark.parametrize("number", range(24))
def test_read_sync(db_test, number):
    db_test.add_all([User(email=f"{n}@example.com") for n in range(5)])
    db_test.flush()
    query = select(User).where(User.email == "3@example.com")
    assert db_test.scalars(query).one().email == "3@example.com"

@pytest.mark.parametrize("number", range(24))
def test_update_sync(db_test, number):
    user = User(email="a@example.com")
    db_test.add(user)
    db_test.commit()
    user.email = "b@example.com"
    db_test.commit()
    assert db_test.scalar(select(User.email)) == "b@example.com"

@pytest.mark.parametrize("number", range(23))
def test_isolated_sync(db_test, number):
    assert db_test.scalar(select(func.count()).select_from(User)) == 0
"""

TIMES = """
import json, time, pytest

spent = 0.0

def pytest_runtest_logreport(report):
    global spent
    spent += report.duration

def pytest_sessionfinish(session):
    with open("spent.json", "w") as file:
        json.dump({"seconds": spent, "passed": session.testscollected - session.testsfailed}, file)
"""

ROLLED_BACK = """
import app
from repom.testing import create_async_test_fixtures, create_test_fixtures

async_db_engine, async_db_test = create_async_test_fixtures()
db_engine, db_test = create_test_fixtures()
"""

MADE_ANEW = """
import os, pathlib
import app, pytest, pytest_asyncio
from sqlalchemy import create_engine, make_url, text
from repom import Database
from repom.models import Base

URL = make_url(os.environ["REPOM_DATABASE_URL"])

def make_anew():
    if URL.get_backend_name() == "sqlite":
        for suffix in ("", "-wal", "-shm"):
            pathlib.Path(URL.database + suffix).unlink(missing_ok=True)
        return
    # All that is in it. DROP DATABASE waits for a checkpoint, which takes far longer.
    with SERVER.begin() as connection:
        connection.execute(text("DROP SCHEMA public CASCADE"))
        connection.execute(text("CREATE SCHEMA public"))

SERVER = Database(URL).new_engine() if URL.get_backend_name() != "sqlite" else None

@pytest_asyncio.fixture
async def async_db_test():
    make_anew()
    database = Database(URL)
    await database.create_all(Base.metadata)
    async with database.sessionmaker() as session:
        yield session
    await database.dispose()

@pytest.fixture
def db_test():
    make_anew()
    database = Database(URL)
    database.create_all_sync(Base.metadata)
    with database.sync_sessionmaker() as session:
        yield session
    database.dispose_sync()
"""

# Only what the tests use: others that happen to be installed take their time in the first test
# (Faker's makes all its providers there), which would be counted as that of a fixture.
_PLUGINS = ("-p", "pytest_asyncio.plugin", "-p", "times", "-p", "no:cacheprovider")

WAYS = {"rolled back": ROLLED_BACK, "made anew": MADE_ANEW}


def main() -> None:
    """Measure, for each URL, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("urls", nargs="*")
    parser.add_argument("--tables", type=_numbers, default=[15, 40], metavar="N,...")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for url in given.urls or default_urls(folder):
            for tables in given.tables:
                compare(Path(folder), url, tables, given.rounds)


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def compare(folder: Path, url: str, tables: int, rounds: int) -> None:
    """Measure the two ways in turns, and print."""
    shown = make_url(url).render_as_string()
    print(f"{shown}: 195 tests, {tables} tables, best of {rounds}")
    best: dict[str, tuple[float, float]] = {}
    for number in range(rounds):
        for way, conftest in WAYS.items():
            here = folder / f"{way.replace(' ', '_')}_{number}"
            here.mkdir(exist_ok=True)
            measured = run(here, conftest, url, tables)
            best[way] = min(best.get(way, measured), measured)
    for way, (tests, process) in best.items():
        print(f"  {way:12} {tests:7.2f} s in the tests, {process:7.2f} s in all")
    (fast, fast_process), (slow, slow_process) = (best[way] for way in WAYS)
    print(f"  {slow / fast:12.1f} times as fast, {slow_process / fast_process:.1f} in all\n")


def default_urls(folder: str) -> list[str]:
    """An SQLite file, and a database beside the one that the tests are told."""
    server = make_url(
        os.environ.get("REPOM_TEST_POSTGRES_URL", "postgresql://postgres@127.0.0.1:5432/test")
    )
    postgres = server.set(database="repom_benchmark").render_as_string(hide_password=False)
    return [f"sqlite:///{folder}/benchmark.db", postgres]


def run(folder: Path, conftest: str, url: str, tables: int) -> tuple[float, float]:
    """Seconds in the tests, and of the whole process."""
    files = {"app": APP, "conftest": conftest, "test_app": TESTS, "times": TIMES}
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
    (folder / "pytest.ini").write_text(
        "[pytest]\nasyncio_mode = auto\nasyncio_default_fixture_loop_scope = function\n"
    )
    ensure(url)
    start = time.perf_counter()
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *_PLUGINS],
        cwd=folder,
        env={
            **os.environ,
            "REPOM_DATABASE_URL": url,
            "PYTHONPATH": f"{folder}:{os.getcwd()}",
            "TABLES": str(tables),
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        },
        capture_output=True,
        text=True,
    )
    process = time.perf_counter() - start
    spent = json.loads((folder / "spent.json").read_text())
    if result.returncode or spent["passed"] != 195:
        sys.exit(result.stdout + result.stderr)
    return spent["seconds"], process


def ensure(url: str) -> None:
    """Make the PostgreSQL database if it is not there."""
    from sqlalchemy import text

    from repom import Database

    wanted = make_url(url)
    if wanted.get_backend_name() == "sqlite":
        return
    server = Database(wanted.set(database="postgres")).new_engine(isolation_level="AUTOCOMMIT")
    with server.connect() as connection:
        found = text("SELECT 1 FROM pg_database WHERE datname = :name")
        if connection.scalar(found, {"name": wanted.database}) is None:
            connection.execute(text(f"CREATE DATABASE {wanted.database}"))
    server.dispose()


if __name__ == "__main__":
    main()
