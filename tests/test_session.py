"""The sync entry points: every form of `get_db_session()`, and the manual session."""

import inspect
from collections.abc import Callable
from contextlib import contextmanager, suppress
from typing import Any

import pytest
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError

from repom import current_scope, current_sync_session, session_scope, sync_session_scope
from repom.context import surroundings
from repom.current import Outside
from repom.database import Database
from repom.errors import MixedSessionsError, NoScopeError, UnknownDatabaseError
from repom.registry import CONFIGURED
from repom.session import get_db_session, get_db_transaction, get_session
from tests.support.units import Late, Note, database, late_checking, postgres, sqlite, texts

__all__ = ["database", "late_checking", "postgres", "sqlite"]

Get = Callable[[Database], Any]
GETS = pytest.mark.parametrize("get", [get_db_session, get_db_transaction])


def assert_nothing_checked_out(database: Database) -> None:
    assert database.engine.pool.checkedout() == 0  # type: ignore[attr-defined]


# --- the forms ----------------------------------------------------------------------------------
# Each writes a note with the text "a" and is left in its own way.


def loop_to_its_end(get: Get, database: Database) -> None:
    for session in get(database):
        session.add(Note(text="a"))


def loop_left_by_return(get: Get, database: Database) -> None:
    for session in get(database):
        session.add(Note(text="a"))
        return


def loop_left_by_break(get: Get, database: Database) -> None:
    for session in get(database):
        session.add(Note(text="a"))
        break


def loop_continued(get: Get, database: Database) -> None:
    for session in get(database):
        session.add(Note(text="a"))
        continue


def loop_with_an_error_caught_inside(get: Get, database: Database) -> None:
    for session in get(database):
        session.add(Note(text="a"))
        with suppress(ZeroDivisionError):
            raise ZeroDivisionError


def block(get: Get, database: Database) -> None:
    with get(database) as session:
        session.add(Note(text="a"))


def generator(get: Get, database: Database) -> None:
    """As `Depends` of FastAPI drives it."""
    with contextmanager(get)(database) as session:
        session.add(Note(text="a"))


SUCCEEDS = [
    loop_to_its_end,
    loop_left_by_return,
    loop_left_by_break,
    loop_continued,
    loop_with_an_error_caught_inside,
    block,
    generator,
]


def loop_that_raises(get: Get, database: Database) -> None:
    for session in get(database):
        session.add(Note(text="a"))
        session.flush()
        raise ZeroDivisionError


def loop_whose_error_is_caught_outside(get: Get, database: Database) -> None:
    with suppress(ZeroDivisionError):
        for session in get(database):
            session.add(Note(text="a"))
            raise ZeroDivisionError


def block_that_raises(get: Get, database: Database) -> None:
    with get(database) as session:
        session.add(Note(text="a"))
        raise ZeroDivisionError


def generator_that_raises(get: Get, database: Database) -> None:
    with contextmanager(get)(database) as session:
        session.add(Note(text="a"))
        raise ZeroDivisionError


FAILS = [
    loop_that_raises,
    loop_whose_error_is_caught_outside,
    block_that_raises,
    generator_that_raises,
]

Form = Callable[[Get, Database], None]


@GETS
@pytest.mark.parametrize("form", SUCCEEDS)
def test_form_outside_a_scope_commits(sqlite: Database, get: Get, form: Form) -> None:
    form(get, sqlite)
    assert texts(sqlite) == ["a"]
    assert_nothing_checked_out(sqlite)
    with pytest.raises(NoScopeError):
        current_scope()


@GETS
@pytest.mark.parametrize("form", FAILS)
def test_form_outside_a_scope_rolls_back(sqlite: Database, get: Get, form: Form) -> None:
    with suppress(ZeroDivisionError):
        form(get, sqlite)
    assert texts(sqlite) == []
    assert_nothing_checked_out(sqlite)
    with pytest.raises(NoScopeError):
        current_scope()


@pytest.mark.parametrize("form", [loop_left_by_return, block])
def test_form_on_every_database(database: Database, form: Form) -> None:
    form(get_db_session, database)
    assert texts(database) == ["a"]
    assert_nothing_checked_out(database)


@pytest.mark.parametrize("form", SUCCEEDS)
def test_form_in_a_scope_leaves_the_end_to_its_owner(sqlite: Database, form: Form) -> None:
    """A later error undoes it; without one it is committed with the rest."""
    with suppress(ZeroDivisionError), sync_session_scope(sqlite):
        form(get_db_session, sqlite)
        raise ZeroDivisionError
    assert texts(sqlite) == []
    with sync_session_scope(sqlite) as session:
        form(get_db_session, sqlite)
        assert session.scalars(select(Note)).one()
        assert texts(sqlite) == []
    assert texts(sqlite) == ["a"]


async def test_form_in_a_scope_of_the_event_loop(sqlite: Database) -> None:
    """As a `def` endpoint that the middleware serves."""
    async with session_scope():
        block(get_db_session, sqlite)
        assert current_sync_session(sqlite).in_transaction()
    assert texts(sqlite) == ["a"]


def test_form_that_is_dropped_in_a_scope_has_nothing_to_end(
    sqlite: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """A cancelled request never leaves its `Depends`. Nothing is said to be rolled back that
    was not."""
    with sync_session_scope(sqlite):
        next(get_db_session(sqlite)).add(Note(text="a"))
    assert texts(sqlite) == ["a"]
    assert caplog.records == []


def test_session_of_the_form_is_the_current_one(sqlite: Database) -> None:
    with get_db_session(sqlite) as session:
        assert current_sync_session() is session
        for inner in get_db_session():
            assert inner is session


def test_form_rolls_back_when_told_to(sqlite: Database) -> None:
    for session in get_db_session(sqlite):
        session.add(Note(text="a"))
        current_scope().rollback_only()
        break
    assert texts(sqlite) == []


def test_failed_commit_is_raised_in_place(late_checking: Database) -> None:
    def in_block() -> None:
        with get_db_session(late_checking) as session:
            session.add(Late(note_id=77))

    def in_loop() -> None:
        for session in get_db_session(late_checking):
            session.add(Late(note_id=77))

    for form in (in_block, in_loop):
        with pytest.raises(IntegrityError):
            form()
    assert_nothing_checked_out(late_checking)


def test_failed_commit_of_a_loop_that_was_left_is_raised_at_the_next_use(
    late_checking: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """`return` has no place for it: it is logged at ERROR, and raised once by the next call."""

    def write() -> str:
        for session in get_db_session(late_checking):
            session.add(Late(note_id=77))
            return "done"
        return ""

    assert write() == "done"
    (record,) = caplog.records
    assert record.levelname == "ERROR"
    assert "with get_db_session() as session:" in record.getMessage()
    assert_nothing_checked_out(late_checking)
    with pytest.raises(IntegrityError):
        get_session(late_checking)
    get_session(late_checking).close()


def test_what_cannot_begin_leaves_nothing_behind(sqlite: Database) -> None:
    with pytest.raises(UnknownDatabaseError), get_db_session("reports"):
        pass
    with pytest.raises(NoScopeError):
        current_scope()


@GETS
@pytest.mark.parametrize("form", [block, loop_to_its_end, generator])
def test_session_held_for_a_whole_connection_is_warned_of(
    sqlite: Database, caplog: pytest.LogCaptureFixture, get: Get, form: Form
) -> None:
    """As by the async twin: where a framework drives the generator, on a connection."""
    place = Outside(CONFIGURED, place="a connection", advice="Advice.", is_connection=True)
    token = surroundings.set(place)
    try:
        form(get, sqlite)
    finally:
        surroundings.reset(token)
    assert texts(sqlite) == ["a"]
    assert [record.levelname for record in caplog.records] == ["WARNING"] * (form is generator)
    assert all("is a dependency in a connection" in message for message in caplog.messages)


async def test_form_where_the_async_session_is_in_use(sqlite: Database) -> None:
    async with session_scope(sqlite):
        with pytest.raises(MixedSessionsError), get_db_session():
            pass


# --- the manual session -------------------------------------------------------------------------


def test_manual_session_is_the_callers(database: Database) -> None:
    """Ready to execute; nothing is committed, rolled back or closed for the caller."""
    session = get_session(database)
    session.add(Note(text="a"))
    session.flush()
    assert texts(database) == []
    session.commit()
    assert texts(database) == ["a"]
    session.close()
    assert_nothing_checked_out(database)


def test_generator_function_for_frameworks() -> None:
    """FastAPI looks at the function: it has to be one that makes a generator."""
    for get in (get_db_session, get_db_transaction):
        assert inspect.isgeneratorfunction(inspect.unwrap(get))
