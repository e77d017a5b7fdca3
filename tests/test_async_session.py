"""The async entry points: every form of `get_async_db_session()`, and the manual session."""

import asyncio
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from repom import current_scope, current_session, session_scope, sync_session_scope
from repom.async_session import get_async_db_session, get_async_session
from repom.context import surroundings
from repom.current import Outside
from repom.database import Database
from repom.deferred import settled
from repom.errors import MixedSessionsError, NoScopeError, UnknownDatabaseError
from repom.registry import CONFIGURED
from tests.support.cancelling import CANCELLING, Cancelling, cancelled_at
from tests.support.reader import execute
from tests.support.units import (
    Late,
    Note,
    assert_nothing_open,
    checked_out,
    database,
    late_checking,
    postgres,
    sqlite,
    texts,
    url_of,
)

__all__ = ["database", "late_checking", "postgres", "sqlite"]


# --- the forms ----------------------------------------------------------------------------------
# Each writes a note with the text "a" and is left in its own way.


async def loop_to_its_end(database: Database) -> None:
    async for session in get_async_db_session(database):
        session.add(Note(text="a"))


async def loop_left_by_return(database: Database) -> Note | None:
    async for session in get_async_db_session(database):
        note = Note(text="a")
        session.add(note)
        return note
    return None


async def loop_left_by_break(database: Database) -> None:
    async for session in get_async_db_session(database):
        session.add(Note(text="a"))
        await session.flush()
        break


async def loop_continued(database: Database) -> None:
    async for session in get_async_db_session(database):
        session.add(Note(text="a"))
        continue


async def loop_with_an_error_caught_inside(database: Database) -> None:
    async for session in get_async_db_session(database):
        session.add(Note(text="a"))
        with suppress(ZeroDivisionError):
            raise ZeroDivisionError


async def loop_left_by_return_after_an_error(database: Database) -> None:
    async for session in get_async_db_session(database):
        try:
            raise ZeroDivisionError
        except ZeroDivisionError:
            session.add(Note(text="a"))
            return


async def block(database: Database) -> None:
    async with get_async_db_session(database) as session:
        session.add(Note(text="a"))


async def block_left_by_return(database: Database) -> None:
    async with get_async_db_session(database) as session:
        session.add(Note(text="a"))
        return


async def generator(database: Database) -> None:
    """As `Depends` of FastAPI drives it."""
    async with asynccontextmanager(get_async_db_session)(database) as session:
        session.add(Note(text="a"))


SUCCEEDS = [
    loop_to_its_end,
    loop_left_by_return,
    loop_left_by_break,
    loop_continued,
    loop_with_an_error_caught_inside,
    loop_left_by_return_after_an_error,
    block,
    block_left_by_return,
    generator,
]


async def loop_that_raises(database: Database) -> None:
    async for session in get_async_db_session(database):
        session.add(Note(text="a"))
        await session.flush()
        raise ZeroDivisionError


async def loop_whose_error_is_caught_outside(database: Database) -> None:
    with suppress(ZeroDivisionError):
        async for session in get_async_db_session(database):
            session.add(Note(text="a"))
            raise ZeroDivisionError


async def loop_that_is_cancelled(database: Database) -> None:
    async for session in get_async_db_session(database):
        session.add(Note(text="a"))
        await session.flush()
        raise asyncio.CancelledError


async def block_that_raises(database: Database) -> None:
    async with get_async_db_session(database) as session:
        session.add(Note(text="a"))
        raise ZeroDivisionError


async def generator_that_raises(database: Database) -> None:
    async with asynccontextmanager(get_async_db_session)(database) as session:
        session.add(Note(text="a"))
        raise ZeroDivisionError


FAILS = [
    loop_that_raises,
    loop_whose_error_is_caught_outside,
    loop_that_is_cancelled,
    block_that_raises,
    generator_that_raises,
]

Form = Callable[[Database], Awaitable[Any]]


@pytest.mark.parametrize("form", SUCCEEDS)
async def test_form_outside_a_scope_commits(sqlite: Database, form: Form) -> None:
    """At the latest before the next session of this loop, and then nothing is left open."""
    await form(sqlite)
    await settled()
    assert texts(sqlite) == ["a"]
    assert_nothing_open(sqlite)
    with pytest.raises(NoScopeError):
        current_scope()


@pytest.mark.parametrize("form", FAILS)
async def test_form_outside_a_scope_rolls_back(sqlite: Database, form: Form) -> None:
    with suppress(ZeroDivisionError, asyncio.CancelledError):
        await form(sqlite)
    await settled()
    assert texts(sqlite) == []
    assert_nothing_open(sqlite)
    with pytest.raises(NoScopeError):
        current_scope()


@pytest.mark.parametrize("form", [loop_left_by_return, loop_that_raises, block])
async def test_form_on_every_database(database: Database, form: Form) -> None:
    with suppress(ZeroDivisionError):
        await form(database)
    await settled()
    assert texts(database) == ([] if form is loop_that_raises else ["a"])
    assert_nothing_open(database)


@pytest.mark.parametrize("form", SUCCEEDS)
async def test_form_in_a_scope_leaves_the_end_to_its_owner(sqlite: Database, form: Form) -> None:
    """A later error undoes it; without one it is committed with the rest."""
    with suppress(ZeroDivisionError):
        async with session_scope(sqlite):
            await form(sqlite)
            raise ZeroDivisionError
    assert texts(sqlite) == []
    async with session_scope(sqlite) as session:
        await form(sqlite)
        assert (await session.scalars(select(Note))).one()
        assert texts(sqlite) == []
    assert texts(sqlite) == ["a"]


@pytest.mark.parametrize("form", FAILS)
async def test_failing_form_in_a_scope_undoes_nothing_by_itself(
    sqlite: Database, form: Form
) -> None:
    """The error is for the owner to see; caught before, there is none."""
    async with session_scope(sqlite):
        with suppress(ZeroDivisionError, asyncio.CancelledError):
            await form(sqlite)
    assert texts(sqlite) == ["a"]


async def test_form_that_is_dropped_in_a_scope_has_nothing_to_end(
    sqlite: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """A cancelled request never leaves its `Depends`. Nothing is said to be rolled back that
    was not."""
    async with session_scope(sqlite):
        (await anext(get_async_db_session(sqlite))).add(Note(text="a"))
    assert texts(sqlite) == ["a"]
    assert caplog.records == []


async def test_session_of_the_form_is_the_current_one(sqlite: Database) -> None:
    """Code below finds it, and a nested use of the form joins it."""
    async with get_async_db_session(sqlite) as session:
        assert current_session() is session
        async for inner in get_async_db_session():
            assert inner is session
    async for session in get_async_db_session(sqlite):
        assert current_session() is session


async def test_form_rolls_back_when_told_to(sqlite: Database) -> None:
    async for session in get_async_db_session(sqlite):
        session.add(Note(text="a"))
        current_scope().rollback_only()
        break
    await settled()
    async with get_async_db_session(sqlite) as session:
        session.add(Note(text="b"))
        current_scope().rollback_only()
    assert texts(sqlite) == []


async def test_failed_commit_of_a_block_or_a_finished_loop_is_raised_in_place(
    late_checking: Database,
) -> None:
    async def in_block() -> None:
        async with get_async_db_session(late_checking) as session:
            session.add(Late(note_id=77))

    async def in_loop() -> None:
        async for session in get_async_db_session(late_checking):
            session.add(Late(note_id=77))

    for form in (in_block, in_loop):
        with pytest.raises(IntegrityError):
            await form()
    assert_nothing_open(late_checking)


@pytest.mark.parametrize("how", CANCELLING)
@pytest.mark.parametrize("form", ["block", "loop"])
async def test_form_cancelled_at_any_await(postgres: Database, form: str, how: Cancelling) -> None:
    """It commits or it does not; nothing is left open."""

    async def in_block(text: str) -> None:
        async with get_async_db_session(postgres) as session:
            session.add(Note(text=text))
            await session.flush()

    async def in_loop(text: str) -> None:
        async for session in get_async_db_session(postgres):
            session.add(Note(text=text))
            await session.flush()
            return

    work = in_block if form == "block" else in_loop
    for number in range(1, 100):
        await postgres.ping()
        before = texts(postgres)
        was_cancelled = await cancelled_at(number, how, work(f"{number}"))
        await settled()
        assert_nothing_open(postgres)
        if not was_cancelled:
            break
        assert texts(postgres) in (before, [*before, f"{number}"])
    assert number > 1
    assert texts(postgres)[-1] == f"{number}"


# --- what is refused ----------------------------------------------------------------------------


async def test_what_cannot_begin_leaves_nothing_behind(sqlite: Database) -> None:
    """An error on entering: the code after it is not inside of anything."""

    async def unknown() -> None:
        async with get_async_db_session("reports"):
            pass

    async def mixed() -> None:
        with sync_session_scope(sqlite):
            async with get_async_db_session():
                pass

    with pytest.raises(UnknownDatabaseError):
        await unknown()
    with pytest.raises(MixedSessionsError):
        await mixed()
    with pytest.raises(NoScopeError):
        current_scope()


def records_of(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    return [(record.levelname, record.getMessage()) for record in caplog.records]


@pytest.mark.parametrize("form", SUCCEEDS)
async def test_session_held_for_a_whole_connection_is_warned_of_once(
    sqlite: Database, caplog: pytest.LogCaptureFixture, form: Form
) -> None:
    """Which it is only where a framework drives the generator: a block or a loop is one message,
    and the start of an application is no connection. It works all the same."""
    start = Outside(CONFIGURED, place="the start", advice="")
    connection = Outside(
        CONFIGURED, place="a connection", advice="Open one for each message.", is_connection=True
    )
    for place in (start, connection, connection):
        token = surroundings.set(place)
        try:
            await form(sqlite)
            await settled()
        finally:
            surroundings.reset(token)
        assert texts(sqlite) == ["a"]
        execute(url_of(sqlite), "DELETE FROM unit_note")
    warning = (
        "get_async_db_session() is a dependency in a connection: what answers have told of is "
        "not committed before the end, and rolled back if that is an exception.\n"
        "Open one for each message."
    )
    assert records_of(caplog) == ([("WARNING", warning)] if form is generator else [])


# --- the manual session -------------------------------------------------------------------------


async def test_manual_session_is_the_callers(database: Database) -> None:
    """Ready to execute; nothing is committed, rolled back or closed for the caller."""
    session = await get_async_session(database)
    session.add(Note(text="a"))
    await session.flush()
    assert texts(database) == []
    await session.commit()
    assert texts(database) == ["a"]
    assert (await session.scalars(select(Note.text))).all() == ["a"]
    assert checked_out(database) == 1
    await session.close()
    assert_nothing_open(database)


async def test_manual_session_is_separate_from_that_of_a_scope(postgres: Database) -> None:
    async with session_scope(postgres) as session:
        manual = await get_async_session()
        assert isinstance(manual, AsyncSession)
        assert manual is not session
        manual.add(Note(text="a"))
        await manual.commit()
        await manual.close()
        current_scope().rollback_only()
    assert texts(postgres) == ["a"]


async def test_generator_function_for_frameworks() -> None:
    """FastAPI looks at the function: it has to be one that makes an async generator."""
    assert inspect.isasyncgenfunction(inspect.unwrap(get_async_db_session))
    assert isinstance(get_async_db_session(), AsyncIterator)
