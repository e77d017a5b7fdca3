"""What the tests of units of work share: tables, a database that has them, cancelling."""

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import anyio
import pytest
from sqlalchemy import ForeignKey, MetaData, String
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.orm import Mapped, mapped_column, relationship

from repom.database import Database
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
    """Fail if a connection is in use here, or a transaction is open on the server."""
    assert checked_out(database) == 0
    if not database.is_sqlite:  # a server notices a moment later
        block_until(lambda: open_transactions(url_of(database)) == 0)


# --- cancelling -----------------------------------------------------------------------------------

Cancelling = Literal["cancel", "cancel twice", "cancel scope", "timeout"]
CANCELLING: tuple[Cancelling, ...] = ("cancel", "cancel twice", "cancel scope", "timeout")


class _Watched:
    """Awaits a coroutine, and tells of every time that it suspends its task."""

    def __init__(self, coro: Coroutine[Any, Any, Any], suspended: Callable[[], None]) -> None:
        self._coro = coro
        self._suspended = suspended

    def __await__(self) -> "_Watched":
        return self

    def __iter__(self) -> "_Watched":
        return self

    def __next__(self) -> Any:
        return self.send(None)

    def send(self, value: Any) -> Any:
        yielded = self._coro.send(value)
        self._suspended()
        return yielded

    def throw(self, *error: Any) -> Any:
        yielded = self._coro.throw(*error)
        self._suspended()
        return yielded

    def close(self) -> None:
        self._coro.close()


async def cancelled_at(number: int, how: Cancelling, coro: Coroutine[Any, Any, Any]) -> bool:
    """Run `coro` in a task and cancel it when it is suspended for the `number`-th time.

    Returns:
        Whether it was cancelled; False if it ended before that.
    """
    loop = asyncio.get_running_loop()
    count = 0
    cancel: Callable[[], object]

    def suspended() -> None:
        nonlocal count
        count += 1
        if count == number:
            cancel()
            if how == "cancel twice":
                loop.call_soon(cancel)

    async def run() -> bool:
        nonlocal cancel
        if how == "cancel scope":
            with anyio.CancelScope() as scope:
                cancel = lambda: loop.call_soon(scope.cancel)  # noqa: E731
                await _Watched(coro, suspended)
            return scope.cancelled_caught
        if how == "timeout":
            try:
                async with asyncio.timeout(None) as timeout:
                    cancel = lambda: timeout.reschedule(loop.time())  # noqa: E731
                    await _Watched(coro, suspended)
            except TimeoutError:
                return True
            return False
        await _Watched(coro, suspended)
        return False

    task = asyncio.create_task(run())
    cancel = lambda: loop.call_soon(task.cancel)  # noqa: E731
    await asyncio.wait((task,))
    return task.cancelled() or task.result()


@contextmanager
def answered_commits(engine: AsyncEngine) -> Iterator[list[Any]]:
    """The list of the connections on which a COMMIT was answered meanwhile."""
    dialect: Any = engine.sync_engine.dialect
    do_commit, answered = dialect.do_commit, []

    def watched(connection: Any) -> None:
        do_commit(connection)
        answered.append(connection)

    dialect.do_commit = watched
    yield answered
    dialect.do_commit = do_commit


@contextmanager
def counted_turns() -> Iterator[list[int]]:
    """Count how often the running loop looks for events meanwhile."""
    selector: Any = asyncio.get_running_loop()._selector  # type: ignore[attr-defined]
    select, turns = selector.select, [0]

    def counting(timeout: float | None = None) -> Any:
        turns[0] += 1
        return select(timeout)

    selector.select = counting
    yield turns
    selector.select = select
