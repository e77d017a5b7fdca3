"""Every driver: the connection of the tests is one of the driver that the application uses."""

from pathlib import Path

import pytest

from tests.testing.suites import run, write

ONLY_SYNC = """
from repom.testing import create_test_fixtures

db_engine, db_test = create_test_fixtures(only_sync=True)
"""


def with_driver(request: pytest.FixtureRequest, driver: str) -> str:
    """The URL of an empty database, with `driver`."""
    if driver == "memory":
        return "sqlite://"
    backend = driver.split("+")[0]
    fixture = {"postgresql": "postgres_url", "mysql": "mysql_url", "sqlite": "sqlite_url"}[backend]
    url: str = request.getfixturevalue(fixture)
    return url.replace(backend, driver, 1)


@pytest.mark.parametrize("driver", ["postgresql+psycopg", "mysql+asyncmy"])
def test_other_async_drivers(tmp_path: Path, request: pytest.FixtureRequest, driver: str) -> None:
    """All that the usual ones can, see test_suites.py."""
    write(tmp_path, "requests", "units")
    run(tmp_path, with_driver(request, driver)).assert_passed()


@pytest.mark.parametrize(
    "driver", ["postgresql+psycopg", "postgresql+psycopg2", "mysql", "sqlite", "memory"]
)
def test_only_sync_code(tmp_path: Path, request: pytest.FixtureRequest, driver: str) -> None:
    """By the sync driver, where the application has nothing else."""
    write(tmp_path, "sync_only", conftest=ONLY_SYNC)
    run(tmp_path, with_driver(request, driver)).assert_passed()


def test_past_sqlalchemy(tmp_path: Path, postgres_url: str) -> None:
    """Code that uses asyncpg's connection itself."""
    write(tmp_path, "postgresql")
    run(tmp_path, postgres_url).assert_passed()


def test_no_sync_driver(tmp_path: Path, postgres_url: str) -> None:
    """The test's own sync session needs none; sync code of the application does, as ever."""
    test = """
import builtins, pytest
from sqlalchemy import select
from repom import sync_session_scope
from repom.errors import MissingDriverError
from repom.testing import test_client
from tests.testing.inner.app import User, app

def test_sync_session(db_test):
    db_test.add(User(email="a"))
    db_test.flush()
    with test_client(app) as client:
        assert client.get("/users").json() == ["a"]
    with pytest.raises(MissingDriverError, match="repom\\\\[postgres\\\\]"):
        with sync_session_scope() as session:
            session.execute(select(User))
"""
    hidden = """
import sys
sys.modules["psycopg"] = sys.modules["psycopg2"] = None
from repom.testing import create_test_fixtures

db_engine, db_test = create_test_fixtures()
"""
    write(tmp_path, conftest=hidden, test_sync=test)
    run(tmp_path, postgres_url).assert_passed()
