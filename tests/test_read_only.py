"""Units of work that only read: what happens to a write that somebody wanted, and to callbacks.

What the database refuses is tested in tests/dialects/test_read_only.py.
"""

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from sqlalchemy import Connection, select, text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from repom import (
    Database,
    atomic,
    current_scope,
    current_session,
    current_sync_session,
    on_commit,
    on_rollback,
    session_scope,
    sync_session_scope,
)
from repom.async_session import get_async_db_session
from repom.begin import ReadOnly
from repom.errors import ReadOnlyError
from tests.support.units import Note, assert_nothing_open, database, sqlite, texts, url_of

__all__ = ["database", "sqlite"]

both = pytest.mark.parametrize("read_only", [True, "snapshot"])


async def unit(
    database: Database, read_only: ReadOnly, work: Callable[[AsyncSession], Awaitable[object]]
) -> None:
    """Do it in a unit of work that only reads."""
    async with session_scope(database, read_only=read_only) as session:
        await work(session)


async def fill(database: Database) -> None:
    async with session_scope(database) as session:
        session.add(Note(text="a"))


# --- a write that somebody wanted


@both
async def test_an_object_that_was_added_and_never_flushed(
    database: Database, read_only: ReadOnly
) -> None:
    """It is not lost silently: leaving the block flushes it, and that is refused."""
    with pytest.raises(ReadOnlyError, match=r"session_scope\(\) only reads"):
        async with session_scope(database, read_only=read_only) as session:
            session.add(Note(text="a"))
    with (
        pytest.raises(ReadOnlyError, match=r"sync_session_scope\(\) only reads"),
        sync_session_scope(database, read_only=read_only) as sync_session,
    ):
        sync_session.add(Note(text="a"))
    assert texts(database) == []
    assert_nothing_open(database)


@both
async def test_an_attribute_that_was_set(database: Database, read_only: ReadOnly) -> None:
    """Nor is a change to an object that was read."""
    await fill(database)
    with pytest.raises(ReadOnlyError):
        async with session_scope(database, read_only=read_only) as session:
            (await session.scalars(select(Note))).one().remark = "new"
    assert texts(database) == ["a"]


@both
@pytest.mark.parametrize("how", ["flush", "text"])
async def test_a_refusal_that_was_swallowed(
    database: Database, how: str, read_only: ReadOnly
) -> None:
    """Who goes on as if it was written gets the error at the end, with the database's as cause."""
    swallowed: list[ReadOnlyError] = []

    async def work(session: AsyncSession) -> None:
        try:
            if how == "flush":
                session.add(Note(text="a"))
                await session.flush()
            else:
                await session.execute(text("DELETE FROM unit_note"))
        except ReadOnlyError as error:
            swallowed.append(error)

    with pytest.raises(ReadOnlyError) as at_the_end:
        await unit(database, read_only, work)
    assert at_the_end.value is not swallowed[0]
    assert at_the_end.value.__cause__ is swallowed[0].__cause__
    assert_nothing_open(database)


async def test_a_refusal_that_was_rolled_back(database: Database) -> None:
    """By `rollback()` or by a block of its own, the application has said that it knows."""
    await fill(database)
    async with session_scope(database, read_only=True) as session:
        session.add(Note(text="b"))
        with pytest.raises(ReadOnlyError):
            await session.flush()
        await session.rollback()
        with pytest.raises(ReadOnlyError):
            async with atomic():
                session.add(Note(text="b"))
        assert (await session.scalars(select(Note.text))).all() == ["a"]


async def test_a_commit_inside(database: Database) -> None:
    """A `commit()` by other code is a flush here, too, and refused where that is."""

    async def work(session: AsyncSession) -> None:
        await session.commit()  # there was nothing to write
        session.add(Note(text="a"))
        with pytest.raises(ReadOnlyError):
            await session.commit()

    with pytest.raises(ReadOnlyError):
        await unit(database, True, work)
    async with session_scope(database, read_only=True, inner_commits="allow") as session:
        await session.commit()
        await current_scope().commit()


async def test_a_statement_that_would_make_it_writable(database: Database) -> None:
    """It is refused before the database sees it, since the connection goes back to a pool."""
    statement = {
        "sqlite": "PRAGMA query_only = OFF",
        "postgresql": "SET default_transaction_read_only = off",
        "mysql": "SET SESSION TRANSACTION READ WRITE",
    }[database.url.get_backend_name()]
    async with session_scope(database, read_only=True) as session:
        with pytest.raises(ReadOnlyError, match="would let its connection write"):
            await session.execute(text(statement))
        connection = await session.connection()
        with pytest.raises(ReadOnlyError):
            await connection.exec_driver_sql(statement)
    with pytest.raises(ReadOnlyError):
        async with session_scope(database, read_only=True) as session:
            session.add(Note(text="a"))


@both
@pytest.mark.parametrize(
    "option", [{"isolation_level": "SERIALIZABLE"}, {"postgresql_readonly": 0}]
)
async def test_options_of_a_connection(
    database: Database, option: dict[str, object], read_only: ReadOnly
) -> None:
    """Those that would begin transactions, or let them write, are refused."""
    async with session_scope(database, read_only=read_only) as session:
        with pytest.raises(ReadOnlyError, match="snapshot"):
            await session.connection(execution_options=option)
        await session.connection(execution_options={"stream_results": True})
    assert_nothing_open(database)


# --- what is around it


async def test_a_unit_of_work_inside(database: Database) -> None:
    """It is independent, and may write, also while the outer one has read."""
    async with session_scope(database, read_only=True) as outer:
        assert (await outer.scalars(select(Note))).all() == []
        async with session_scope(database) as session:
            session.add(Note(text="a"))
        assert (await outer.scalars(select(Note.text))).all() == ["a"]
    assert texts(database) == ["a"]


async def test_what_finds_the_session(database: Database) -> None:
    """`current_session()`, a dependency and `atomic()` join it; in threads, so does the sync
    session of another one."""
    await fill(database)
    async with session_scope(database, read_only=True) as session:
        assert current_session() is session
        async with get_async_db_session() as found, atomic() as in_block:
            assert found is session
            assert in_block is session
    with sync_session_scope(database, read_only=True) as sync_session:
        found_sync = await asyncio.to_thread(current_sync_session)
        assert found_sync is sync_session


async def test_callbacks(database: Database) -> None:
    """`on_commit` runs when it has ended well, `on_rollback` when a write was refused."""
    told: list[str] = []
    async with session_scope(database, read_only=True) as session:
        await session.execute(text("SELECT 1"))
        on_commit(lambda: told.append("committed"))

    async def work(session: AsyncSession) -> None:
        session.add(Note(text="a"))
        on_rollback(lambda: told.append("rolled back"))

    with pytest.raises(ReadOnlyError):
        await unit(database, True, work)
    assert told == ["committed", "rolled back"]


async def test_the_classes_of_the_application(sqlite_url: str) -> None:
    """Its sessions are of them, with their options."""

    class OwnAsyncSession(AsyncSession):
        pass

    class OwnSession(Session):
        ends: list[str] = []  # noqa: RUF012

        def commit(self) -> None:
            self.ends.append("commit")
            super().commit()

    database = Database(
        sqlite_url,
        session_class=OwnAsyncSession,
        sync_session_class=OwnSession,
        session_kwargs={"autoflush": False, "info": {"of": "the application"}},
    )
    async with session_scope(database, read_only=True) as session:
        assert isinstance(session, OwnAsyncSession)
        assert session.info == {"of": "the application"}
        await session.execute(text("SELECT 1"))
    with sync_session_scope(database, read_only=True) as sync_session:
        assert isinstance(sync_session, OwnSession)
        assert not sync_session.autoflush
        sync_session.execute(text("SELECT 1"))
    assert OwnSession.ends == ["commit"]
    await database.dispose()


@both
async def test_on_begin(database: Database, read_only: ReadOnly) -> None:
    """What it sets is for one transaction, so there is one: the statements of the unit of work
    are in it, and no others."""
    begun: list[bool] = []

    def on_begin(connection: Connection) -> None:
        if connection.dialect.name == "postgresql":
            connection.execute(text("SET LOCAL search_path = tenant, public"))
        begun.append(connection.in_transaction())

    telling = Database(url_of(database), on_begin=on_begin, engine_kwargs={"pool_size": 1})
    for number in (1, 2):
        async with session_scope(telling, read_only=read_only) as session:
            assert (await session.scalars(select(Note))).all() == []
            if database.url.get_backend_name() == "postgresql":
                assert await session.scalar(text("SHOW search_path")) == "tenant, public"
                assert await session.scalar(text("SHOW transaction_read_only")) == "on"
        assert begun == [True] * number
    with pytest.raises(ReadOnlyError):
        async with session_scope(telling, read_only=read_only) as session:
            session.add(Note(text="a"))
    await telling.dispose()
    assert_nothing_open(database)


async def test_pools(database: Database) -> None:
    """It has one of its own for each loop, made when it is used, which `dispose()` closes."""
    assert database._reading is None
    async with session_scope(database, read_only=True) as session:
        reading = session.bind
        assert reading is not database.async_engine
    async with session_scope(database, read_only=True) as session:
        assert session.bind is reading

    async def elsewhere() -> object:
        async with session_scope(database, read_only=True) as session:
            await session.execute(text("SELECT 1"))
            return session.bind

    assert await asyncio.to_thread(asyncio.run, elsewhere()) is not reading
    await database.dispose()
    async with session_scope(database, read_only=True) as session:
        assert session.bind is not reading


def test_values() -> None:
    """A misspelt one is not taken for another, and an isolation level contradicts it."""
    with pytest.raises(ValueError, match="'snapshots'"), sync_session_scope(read_only="snapshots"):  # type: ignore[arg-type]
        pass
    contradiction = sync_session_scope(read_only="snapshot", isolation_level="SERIALIZABLE")
    with pytest.raises(ValueError, match="SERIALIZABLE"), contradiction:
        pass


async def test_inside_a_unit_that_writes(sqlite: Database) -> None:
    """On SQLite it needs no place in the line of writers."""
    async with session_scope(sqlite) as writer:
        writer.add(Note(text="a"))
        await writer.flush()
        async with session_scope(sqlite, read_only=True) as session:
            assert (await session.scalars(select(Note.text))).all() == []
