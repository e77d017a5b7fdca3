"""What `create_test_fixtures()` and `create_async_test_fixtures()` can be given, and bad input.

More of this: test_suites.py, for what a test can do with them.
"""

from pathlib import Path

from tests.support.reader import rows
from tests.testing.suites import run, write

MODELS = """
from sqlalchemy import MetaData, select
from sqlalchemy.orm import Mapped, mapped_column
from repom import Database, RepomConfig
from repom.models import Base

class Note(Base):
    __tablename__ = "notes"
    id: Mapped[int] = mapped_column(primary_key=True)

class Config(RepomConfig):
    databases = {"reports": "sqlite:///reports.db"}

def config():
    return Config()

logs = Database("sqlite:///logs.db")
"""
CONFTEST = """
import models
from repom.testing import create_async_test_fixtures, create_test_fixtures

by_default, default_session = create_async_test_fixtures()
same_default, default_sync_session = create_test_fixtures("default")
by_name, reports_session = create_async_test_fixtures("reports")
by_object, logs_session = create_async_test_fixtures(models.logs)
by_url, url_session = create_test_fixtures("sqlite:///by_url.db", metadata=models.MetaData())
"""
TESTS = """
import pytest
from sqlalchemy import inspect, select
from models import Note, logs
from repom import current_session, get_database, session_scope, sync_session_scope

@pytest.mark.parametrize("number", range(2))
async def test_several_databases_at_once(default_session, reports_session, logs_session, number):
    pairs = [(None, default_session), ("reports", reports_session), (logs, logs_session)]
    for expected, (database, session) in enumerate(pairs):
        async with session_scope(database) as unit:
            unit.add(Note(id=expected))
    for expected, (database, session) in enumerate(pairs):
        assert (await session.scalars(select(Note.id))).all() == [expected]

async def test_two_phase_is_one_phase(default_session, reports_session):
    # SQLite could not prepare anything; nothing of a test is prepared, on no database.
    async with session_scope(two_phase=True) as unit:
        unit.add(Note(id=1))
        current_session("reports").add(Note(id=2))
    assert (await default_session.scalars(select(Note.id))).all() == [1]
    assert (await reports_session.scalars(select(Note.id))).all() == [2]

async def test_one_of_them(reports_session):
    assert logs.stand_in is None and get_database().stand_in is None
    async with session_scope("reports") as unit:
        assert (await unit.scalars(select(Note.id))).all() == []

async def test_names_of_one_database(
    default_session, default_sync_session, by_default, same_default
):
    default_session.add(Note(id=1))
    await default_session.flush()
    assert default_sync_session.scalars(select(Note.id)).all() == [1]
    assert by_default.sync_engine is same_default

def test_engine_outside_of_a_test(same_default):
    # It has connections of its own, which commit.
    with same_default.begin() as connection:
        connection.execute(Note.__table__.insert().values(id=7))
    with same_default.connect() as connection:
        connection.execute(Note.__table__.insert().values(id=8))

def test_what_was_committed_by_the_engine(default_sync_session):
    assert default_sync_session.scalars(select(Note.id)).all() == [7]

def test_metadata(url_session):
    assert inspect(url_session.connection()).get_table_names() == []
"""


def test_which_database(tmp_path: Path) -> None:
    """The configured default, a configured name, a `Database`, or a URL; several in one test.
    Fixtures for the same one share the connection. The tables are those that are given."""
    (tmp_path / ".env").write_text("CONFIG_HOOK=models:config\n")
    write(tmp_path, models=MODELS, conftest=CONFTEST, test_it=TESTS)
    run(tmp_path, "sqlite:///default.db").assert_passed()
    assert rows(f"sqlite:///{tmp_path}/default.db", "SELECT id FROM notes") == [(7,)]
    assert rows(f"sqlite:///{tmp_path}/reports.db", "SELECT id FROM notes") == []


URL = """
from sqlalchemy import select
from repom import get_database, session_scope
from repom.async_session import get_async_session
from models import Note

async def test_it(db):
    for _ in range(2):
        async with session_scope() as unit:
            unit.add(Note())
    session = await get_async_session()
    assert len((await session.scalars(select(Note))).all()) == 2
    await session.close()

async def test_without_the_fixture():
    async with session_scope() as unit:
        assert (await unit.scalars(select(Note))).all() == []
"""


def test_url_is_used_in_place_of_the_configured_default(tmp_path: Path) -> None:
    """Also by what was made of the configuration before; the configured one is not touched."""
    conftest = (
        "import models\nfrom repom import get_database\n{}\n"
        "from repom.testing import create_async_test_fixtures\n"
        "engine, db = create_async_test_fixtures('sqlite:///by_url.db')"
    )
    for early in ("", "default = get_database()"):
        write(tmp_path, models=MODELS, conftest=conftest.format(early), test_url=URL)
        run(tmp_path, "sqlite:///configured.db").assert_passed()
    assert (tmp_path / "by_url.db").exists()
    assert not (tmp_path / "configured.db").exists()


READERS_MODELS = """
from repom import Database
from repom.models import Base
from sqlalchemy.orm import Mapped, mapped_column

class Note(Base):
    __tablename__ = "notes"
    id: Mapped[int] = mapped_column(primary_key=True)

shop = Database("sqlite:///shop.db", readers=["sqlite:////nowhere/replica.db"])
"""
READERS_TESTS = """
from sqlalchemy import select
from models import Note, shop
from repom import session_scope, sync_session_scope

async def test_it(db):
    async with session_scope(shop) as unit:
        unit.add(Note(id=1))
    async with session_scope(shop, read_only=True) as unit:
        assert (await unit.scalars(select(Note.id))).all() == [1]
    with sync_session_scope(shop, read_only="snapshot") as unit:
        assert unit.scalars(select(Note.id)).all() == [1]
"""


def test_a_database_with_readers(tmp_path: Path) -> None:
    """Tests read from the connection that they write to; no reader is connected to."""
    conftest = (
        "import models\nfrom repom.testing import create_async_test_fixtures\n"
        "engine, db = create_async_test_fixtures(models.shop)"
    )
    write(tmp_path, models=READERS_MODELS, conftest=conftest, test_it=READERS_TESTS)
    run(tmp_path, "sqlite:///default.db").assert_passed()


# --- bad input

ONE = """
from repom.testing import create_async_test_fixtures, create_test_fixtures
{}
"""
USES = """
async def test_async(async_db): ...
async def test_async_again(async_db): ...
def test_sync(sync_db): ...
"""


def test_driver_that_is_missing(tmp_path: Path) -> None:
    """Each test says which one, and how to install it; nothing else goes wrong."""
    conftest = ONE.format(
        "import sys; sys.modules['asyncpg'] = sys.modules['psycopg'] = None\n"
        "sys.modules['psycopg2'] = None\n"
        "engine, async_db = create_async_test_fixtures('postgresql://127.0.0.1/nowhere')\n"
        "sync_engine, sync_db = create_test_fixtures('postgresql+psycopg2://127.0.0.1/nowhere')"
    )
    write(tmp_path, conftest=conftest, test_it=USES)
    done = run(tmp_path, "sqlite://", "-rE")
    assert done.outcomes == {"error": 3}, done.output
    assert done.output.count("MissingDriverError") >= 3, done.output
    assert 'pip install "repom[' in done.output


def test_server_that_is_not_there(tmp_path: Path) -> None:
    """Each test says so, without a password."""
    url = "postgresql://me:secret@127.0.0.1:1/nowhere"
    conftest = ONE.format(
        f"engine, async_db = create_async_test_fixtures({url!r})\n"
        f"sync_engine, sync_db = create_test_fixtures({url!r})"
    )
    write(tmp_path, conftest=conftest, test_it=USES)
    done = run(tmp_path, "sqlite://", "--tb=line")
    assert done.outcomes == {"error": 3}, done.output
    assert "DatabaseUnreachableError: cannot connect to postgresql+asyncpg://me:***" in done.output
    assert "secret" not in done.output.replace(repr(url), "")


def test_only_sync_for_async_fixtures(tmp_path: Path) -> None:
    """Two fixtures that cannot share a connection: the second says which argument to leave out."""
    conftest = ONE.format(
        "sync_engine, sync_db = create_test_fixtures(only_sync=True)\n"
        "engine, async_db = create_async_test_fixtures()"
    )
    test = "def test_sync(sync_db): ...\n" + USES
    write(tmp_path, conftest=conftest, test_it=test)
    done = run(tmp_path, "sqlite:///test.db")
    assert done.outcomes == {"passed": 1, "error": 2}, done.output
    assert "Leave only_sync out" in done.output
