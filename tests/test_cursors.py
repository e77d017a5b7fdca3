"""Results that are fetched while they are read: who may still read, and what must wait for that.

What it means for a response that is read from a cursor: `tests/promise/test_bodies.py`.
"""

import asyncio
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from sqlalchemy import insert, literal, select, text
from sqlalchemy.exc import ResourceClosedError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from sqlalchemy.util import greenlet_spawn

from repom import atomic, current_scope, session_scope, sync_session_scope
from repom.database import Database
from repom.errors import OpenCursorError
from repom.scope import SessionScope
from tests.support.reader import execute
from tests.support.units import (
    Note,
    assert_nothing_open,
    database,
    postgres,
    prepared,
    sqlite,
    texts,
)

__all__ = ["database", "postgres", "sqlite"]

#: A SELECT whose rows are fetched one by one.
ONE_BY_ONE = select(Note).execution_options(yield_per=1)


async def fill(session: AsyncSession, count: int = 3) -> None:
    await session.execute(insert(Note), [{"id": n, "text": f"{n}"} for n in range(1, count + 1)])


async def test_result_of_stream_is_an_open_cursor_until_it_is_read(database: Database) -> None:
    """Read to its end, closed, or dropped: then nobody can read from it any more."""
    async with session_scope(database) as session:
        scope = current_scope()
        await fill(session)
        assert not scope.has_open_cursor

        result = await session.stream_scalars(ONE_BY_ONE)
        assert scope.has_open_cursor
        assert [note.id async for note in result] == [1, 2, 3]
        assert not scope.has_open_cursor

        result = await session.stream_scalars(ONE_BY_ONE)
        await result.close()
        assert not scope.has_open_cursor

        result = await session.stream_scalars(ONE_BY_ONE)
        await anext(result)
        assert scope.has_open_cursor
        del result
        assert not scope.has_open_cursor


async def test_rows_that_have_been_fetched_are_no_open_cursor(database: Database) -> None:
    """Without `yield_per` the ORM fetches all at the first row; they outlive their transaction."""
    async with session_scope(database) as session:
        await fill(session)
        unread = await session.execute(select(Note.id))
        result = await session.stream_scalars(select(Note.id).order_by(Note.id))
        assert await anext(result) == 1
        assert not current_scope().has_open_cursor
        await current_scope().commit()
        assert [id_ async for id_ in result] == [2, 3]
        assert len(unread.all()) == 3


async def by_connection(session: AsyncSession) -> Any:
    return await (await session.connection()).stream(select(Note.id))


async def by_run_sync(session: AsyncSession) -> Any:
    return await session.run_sync(lambda sync: sync.execute(ONE_BY_ONE))


async def by_text(session: AsyncSession) -> Any:
    return await session.stream(text("SELECT id FROM unit_note"))


@pytest.mark.parametrize("open_", [by_connection, by_run_sync, by_text])
async def test_other_ways_to_an_open_cursor(
    database: Database, open_: Callable[[AsyncSession], Any]
) -> None:
    """Whoever executes it: what counts is that rows are still to come."""
    async with session_scope(database) as session:
        await fill(session)
        result = await open_(session)
        assert current_scope().has_open_cursor
        del result
        assert not current_scope().has_open_cursor


SYNC: list[Callable[[Session], Any]] = [
    lambda session: session.execute(ONE_BY_ONE),
    lambda session: session.scalars(select(Note), execution_options={"yield_per": 1}),
    lambda session: iter(session.query(Note).yield_per(1)),
    lambda session: session.connection().execution_options(stream_results=True).execute(ONE_BY_ONE),
    lambda session: session.execute(text("SELECT 1").execution_options(stream_results=True)),
]


@pytest.mark.parametrize("open_", SYNC, ids=["execute", "scalars", "Query", "Connection", "text"])
def test_open_cursor_of_a_sync_session(database: Database, open_: Callable[[Session], Any]) -> None:
    """`yield_per` and `stream_results` are to it what `stream()` is to an `AsyncSession`."""
    with sync_session_scope(database) as session:
        session.add_all(Note(id=n, text=str(n)) for n in range(1, 4))
        session.flush()
        assert not current_scope().has_open_cursor
        result = open_(session)
        if hasattr(result, "__next__"):
            next(result)  # a Query is executed when it is read
        assert current_scope().has_open_cursor
        del result
        assert not current_scope().has_open_cursor


@pytest.mark.parametrize("statement", [select(Note), select(Note.__table__)], ids=["ORM", "Core"])
def test_ordinary_result_of_a_sync_session(database: Database, statement: Any) -> None:
    """Its rows are here already, read or not. Only the module sqlite3 finds one when it is asked
    for it."""
    with sync_session_scope(database) as session:
        session.add(Note(id=1, text="a"))
        session.flush()
        rows = session.execute(statement)
        assert current_scope().has_open_cursor is database.is_sqlite
        assert len(rows.all()) == 1
        assert not current_scope().has_open_cursor


async def test_cursor_that_was_not_read_to_its_end_is_closed_at_the_end(
    database: Database,
) -> None:
    """MySQL commits nothing on a connection on which rows are still coming, nor does it flush."""
    async with session_scope(database) as session:
        session.add_all(Note(id=n, text=f"{n}".zfill(80)) for n in range(1, 1000))
        await session.flush()
        session.expunge_all()
        result = await session.stream_scalars(ONE_BY_ONE)
        assert await anext(result)
        session.add(Note(id=1000, text="flushed at the end"))
    assert len(texts(database)) == 1000
    assert_nothing_open(database)
    with pytest.raises(ResourceClosedError):
        await anext(result)


async def commit(session: AsyncSession, scope: SessionScope) -> None:
    await scope.commit()


async def roll_back(session: AsyncSession, scope: SessionScope) -> None:
    await session.rollback()


@pytest.mark.parametrize("end", [commit, roll_back], ids=lambda end: end.__name__)
async def test_who_reads_on_after_the_end_of_the_transaction_gets_an_error(
    database: Database, end: Callable[[AsyncSession, SessionScope], Any]
) -> None:
    """Never fewer rows than there are, nor those that other transactions have made since."""
    async with session_scope(database) as session:
        await fill(session)
        await current_scope().commit()
        result = await session.stream_scalars(ONE_BY_ONE)
        assert await anext(result)
        await end(session, current_scope())
        with pytest.raises(ResourceClosedError):
            await anext(result)


async def test_statements_let_go_of_results_that_nobody_reads(database: Database) -> None:
    """A transaction of many streams keeps none but those that somebody may read."""

    async def stream() -> Any:
        result = await session.stream(ONE_BY_ONE)
        await result.fetchone()
        return result, weakref.ref(result._real_result.raw.context)  # type: ignore[attr-defined]

    async with session_scope(database) as session:
        await fill(session)
        result, known = await stream()
        del result
        assert known() is not None, "somebody has to close it"
        await session.execute(select(Note.id))
        assert known() is None


def test_sqlite_keeps_no_results_that_were_read(sqlite: Database) -> None:
    """Every result of its sync session is looked at, and none is kept."""
    with sync_session_scope(sqlite) as session:
        result: Any = session.execute(select(Note.__table__))
        known = weakref.ref(result.context)
        assert result.all() == []
        del result
        session.execute(select(Note))
        assert known() is None


# --- MySQL sends the rows of one statement at a time ----------------------------------------------


async def test_statement_that_would_take_the_rest_of_a_stream(database: Database) -> None:
    """The drivers of MySQL throw away what has not come yet: there it is refused, and the reader
    loses nothing. The other databases can do both."""
    async with session_scope(database) as session:
        await fill(session)
        result = await session.stream_scalars(
            select(Note.id).order_by(Note.id), execution_options={"yield_per": 1}
        )
        assert await anext(result) == 1
        if database.url.get_backend_name() == "mysql":
            with pytest.raises(OpenCursorError, match="Read it to its end or close it"):
                await session.execute(select(literal(1)))
            with pytest.raises(OpenCursorError):
                await (await session.connection()).exec_driver_sql("select 1")
            with pytest.raises(OpenCursorError):
                await session.scalar(select(literal(1)))
            with pytest.raises(OpenCursorError):
                async with atomic():  # a SAVEPOINT is a statement, too
                    await session.execute(select(literal(1)))
        else:
            assert await session.scalar(select(literal(1))) == 1
        assert [id_ async for id_ in result] == [2, 3]
        assert await session.scalar(select(literal(1))) == 1


async def test_block_that_fails_while_it_reads_a_stream(database: Database) -> None:
    """The error leaves the block, and not one about the rows that are given up with it."""
    async with session_scope(database) as session:
        await fill(session)
        kept = []
        with suppress(LookupError):
            async with atomic():
                kept.append(await session.stream(ONE_BY_ONE))
                await kept[0].fetchone()
                raise LookupError
        session.add(Note(id=9, text="after"))
    assert texts(database) == ["1", "2", "3", "after"]


async def test_stream_that_is_not_read_any_more_stands_in_nobodys_way(database: Database) -> None:
    """Closed, or let go."""
    async with session_scope(database) as session:
        await fill(session)
        result = await session.stream(ONE_BY_ONE)
        await result.fetchone()
        await result.close()
        assert await session.scalar(select(literal(1))) == 1
        await (await session.stream(ONE_BY_ONE)).fetchone()
        assert await session.scalar(select(literal(2))) == 2


async def test_cursor_that_cannot_be_closed_does_not_keep_the_scope_from_ending(
    mysql_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Its connection is lost; the end finds that out, too, and throws it away."""
    with prepared(mysql_url) as database:
        async with session_scope(database) as session:
            number = await session.scalar(text("select connection_id()"))
            many = text("select repeat('x', 10000) from mysql.help_topic")
            result = await session.stream(many)
            await result.fetchone()
            execute(mysql_url, f"kill {number}")
            current_scope().rollback_only()
        assert [record.name.split(".")[0] for record in caplog.records] == ["sqlalchemy", "repom"]
        assert_nothing_open(database)
        del result


async def test_nothing_is_said_of_the_cursor_of_a_closed_connection(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """A client that goes while its response is read from a cursor leaves one in each case."""
    async with session_scope(database) as session:
        session.add_all(Note(id=n, text=f"{n}".zfill(80)) for n in range(1, 1000))
        await session.flush()
        result = await session.stream(select(Note.text), execution_options={"yield_per": 5})
        assert await result.fetchone()
        await (await session.connection()).invalidate()  # as a cancelled fetch does
        current_scope().rollback_only()
    assert caplog.records == []
    assert texts(database) == []
    assert_nothing_open(database)
    del result


async def test_cursor_whose_closing_was_cancelled(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """At its end a result closes its cursor. A client that goes in that moment leaves one behind
    for which SQLAlchemy could only log that it cannot be closed again."""
    async with session_scope(database) as session:
        session.add(Note(text="a"))
        await session.flush()
        result = await session.stream(select(Note.text))
        at_its_end = greenlet_spawn(result._real_result._soft_close)
        closing = asyncio.create_task(at_its_end)
        await asyncio.sleep(0)
        closing.cancel()
        with suppress(asyncio.CancelledError):
            await closing
    assert caplog.records == []
    assert texts(database) == ["a"]
    assert_nothing_open(database)
    del result
