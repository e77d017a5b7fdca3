"""What the tests of units of work share: tables, and a database that has them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy import ForeignKey, MetaData, String
from sqlalchemy.orm import Mapped, mapped_column, relationship

from repom.database import Database
from repom.dialects.write_queue import write_queue
from repom.models import NAMING_CONVENTION, Base
from tests.support.polling import block_until
from tests.support.reader import open_transactions, rows


class UnitBase(Base):
    """The base of the tables below, which no other test creates."""

    __abstract__ = True
    metadata = MetaData(naming_convention=NAMING_CONVENTION)


class Note(UnitBase):
    """A row with a unique text."""

    __tablename__ = "unit_note"
    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str] = mapped_column(String(80), unique=True)
    remark: Mapped[str | None] = mapped_column(String(80))
    lines: Mapped[list["Line"]] = relationship()


class Line(UnitBase):
    """A row of a note."""

    __tablename__ = "unit_line"
    id: Mapped[int] = mapped_column(primary_key=True)
    note_id: Mapped[int] = mapped_column(ForeignKey("unit_note.id"))


class Late(Base):
    """A row whose foreign key is checked by COMMIT only, which MySQL cannot do."""

    __tablename__ = "unit_late"
    metadata = MetaData(naming_convention=NAMING_CONVENTION)
    id: Mapped[int] = mapped_column(primary_key=True)
    note_id: Mapped[int] = mapped_column(ForeignKey(Note.id, deferrable=True, initially="DEFERRED"))


@contextmanager
def prepared(url: str, **kwargs: Any) -> Iterator[Database]:
    """A `Database` at `url` with the tables above."""
    database = Database(url, **kwargs)
    database.create_all_sync(UnitBase.metadata)
    if database.url.get_backend_name() != "mysql":
        database.create_all_sync(Late.metadata)
    yield database
    database.dispose_sync()


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    """A database with the tables above; the test runs once on each kind."""
    with prepared(database_url) as database:
        yield database


@pytest.fixture
def sqlite(sqlite_url: str) -> Iterator[Database]:
    """An SQLite database with the tables above."""
    with prepared(sqlite_url) as database:
        yield database


@pytest.fixture
def postgres(postgres_url: str) -> Iterator[Database]:
    """A PostgreSQL database with the tables above."""
    with prepared(postgres_url) as database:
        yield database


@pytest.fixture(params=["sqlite", "postgres"])
def late_checking(request: pytest.FixtureRequest) -> Database:
    """A database with the tables above that can check a foreign key at COMMIT."""
    database: Database = request.getfixturevalue(request.param)
    return database


def url_of(database: Database) -> str:
    """The URL that the fixture gave to the database."""
    return database.url.render_as_string(hide_password=False)


def texts(database: Database) -> list[str]:
    """The texts of the notes that are committed."""
    return [text for (text,) in rows(url_of(database), "SELECT text FROM unit_note ORDER BY id")]


def remarks(database: Database) -> list[str | None]:
    """The remarks of the notes that are committed."""
    return [text for (text,) in rows(url_of(database), "SELECT remark FROM unit_note ORDER BY id")]


def checked_out(database: Database) -> int:
    """How many connections of the running loop's pool are in use."""
    pool: Any = database.async_engine.pool
    count: int = pool.checkedout()
    return count


def assert_nothing_open(database: Database) -> None:
    """Fail if a connection is in use here, or a transaction is open in the database."""
    assert checked_out(database) == 0
    # A server notices a moment later; SQLite is told by threads of aiosqlite.
    block_until(lambda: open_transactions(url_of(database)) == 0)
    if database.is_sqlite:
        line = write_queue(os.path.realpath(database.url.database or ""))
        block_until(lambda: line.holder() is None)
