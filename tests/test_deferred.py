"""The COMMIT after `return` inside `async for session in get_async_db_session()`."""

import asyncio
import contextvars
import logging
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

import pytest
from sqlalchemy import func, select, update
from sqlalchemy.exc import IntegrityError

from repom import current_session, deferred, on_commit, session_scope
from repom.async_session import get_async_db_session, get_async_session
from repom.database import Database
from repom.deferred import EndingTask, Guard
from repom.errors import NoScopeError, TransactionError
from repom.session import get_db_session
from tests.support.units import (
    Late,
    Line,
    Note,
    assert_nothing_open,
    database,
    late_checking,
    postgres,
    prepared,
    sqlite,
    texts,
)

__all__ = ["database", "late_checking", "postgres", "sqlite"]

COUNT = select(func.count(Note.id))


async def write(database: Database, text: str) -> Note | None:
    """Write a note and return it, before it is committed."""
    async for session in get_async_db_session(database):
        note = Note(text=text)
        session.add(note)
        await session.flush()
        return note
    return None


async def fail(database: Database) -> str | None:
    """Return as if all were well; COMMIT is going to fail."""
    async for session in get_async_db_session(database):
        session.add(Late(note_id=77))
        return "done"
    return None


# --- it happens ---------------------------------------------------------------------------------


def run_on_uvloop(coro: Coroutine[Any, Any, Any]) -> None:
    uvloop = pytest.importorskip("uvloop")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(coro)


@pytest.mark.parametrize("run", [asyncio.run, run_on_uvloop])
def test_ten_runs_are_ten_rows(
    database: Database, run: Callable[[Coroutine[Any, Any, Any]], None]
) -> None:
    """The loop that is about to end waits for it."""
    for number in range(10):
        run(write(database, f"{number}"))
    assert texts(database) == [f"{number}" for number in range(10)]


def test_task_cancelled_by_a_time_out_of_its_parent(database: Database) -> None:
    """It is rolled back; that of a sibling which had returned is committed."""

    async def hang() -> None:
        async for session in get_async_db_session(database):
            session.add(Note(text="lost"))
            await asyncio.Event().wait()

    async def main() -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(None) as timeout, asyncio.TaskGroup() as group:
                group.create_task(hang())
                await group.create_task(write(database, "kept"))
                timeout.reschedule(asyncio.get_running_loop().time())
                await asyncio.Event().wait()

    asyncio.run(main())
    assert texts(database) == ["kept"]


# --- who waits for it ---------------------------------------------------------------------------


async def in_scope(database: Database) -> int | None:
    async with session_scope(database, sqlite_begin="DEFERRED") as session:
        count: int | None = await session.scalar(COUNT)
        return count


async def after_add(database: Database) -> int | None:
    """`add` begins a transaction, as SQLAlchemy sees it, but takes no connection."""
    async with session_scope(database, sqlite_begin="DEFERRED") as session:
        with session.no_autoflush:
            session.add(Note(text="other"))
            count: int | None = await session.scalar(COUNT)
            return count


async def in_savepoint(database: Database) -> int | None:
    async with (
        session_scope(database, sqlite_begin="DEFERRED") as session,
        session.begin_nested(),
    ):
        count: int | None = await session.scalar(COUNT)
        return count


async def in_scope_of_an_idle_one(database: Database) -> int | None:
    async with session_scope(database):
        return await in_scope(database)


async def by_hand(database: Database) -> int | None:
    session = await get_async_session(database)
    try:
        count: int | None = await session.scalar(COUNT)
        return count
    finally:
        await session.close()


@pytest.mark.parametrize(
    "read", [in_scope, after_add, in_savepoint, in_scope_of_an_idle_one, by_hand]
)
async def test_next_session_reads_what_was_written(
    database: Database, read: Callable[[Database], Coroutine[Any, Any, int | None]]
) -> None:
    await write(database, "a")
    assert await read(database) == 1


async def test_last_flush_of_the_next_session_can_refer_to_it(database: Database) -> None:
    """Its first statement may be the INSERT that comes with its own COMMIT."""
    note = await write(database, "a")
    assert note is not None
    async with session_scope(database) as session:
        session.add(Line(note_id=note.id))
    assert_nothing_open(database)


async def test_pool_of_one_connection(postgres_url: str) -> None:
    """Who waits for the connection waits for the COMMIT that gives it back."""
    pool = {"pool_size": 1, "max_overflow": 0, "pool_timeout": 5}
    with prepared(postgres_url, engine_kwargs=pool) as database:
        for number in range(3):
            await write(database, f"{number}")
        assert await in_scope(database) == 3


async def test_nobody_waits_for_it_who_may_be_waited_for(postgres: Database) -> None:
    """It cannot end before the enclosing transaction has, whose row it changes."""

    async def change(text: str) -> None:
        async for session in get_async_db_session(postgres):
            (await session.scalars(select(Note))).one().remark = text
            return

    await write(postgres, "a")
    elsewhere = contextvars.copy_context()
    async with asyncio.timeout(10):
        async with session_scope(postgres) as outer:
            await outer.execute(update(Note).values(remark="outer"))
            await asyncio.create_task(change("deferred"), context=elsewhere)
            assert deferred.pending
            async with session_scope(postgres) as inner:
                assert await inner.scalar(COUNT) == 1
            assert await outer.scalar(COUNT) == 1
        await deferred.settled()
    async with session_scope(postgres) as session:
        assert await session.scalar(select(Note.remark)) == "deferred"


async def test_cancelled_while_it_waits(sqlite: Database) -> None:
    """The session that has waited for it can be used by other tasks of the unit of work."""
    settle = asyncio.Event()
    async with asyncio.timeout(10):
        async with session_scope(sqlite) as session:
            deferred.end_later(until_set(settle), limit=5, label="a unit")
            waits = asyncio.create_task(session.scalar(COUNT))
            await asyncio.sleep(0)
            waits.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waits
            settle.set()
            assert await session.scalar(COUNT) == 0
    await deferred.settled()


async def until_set(event: asyncio.Event) -> None:
    await event.wait()


async def test_sync_session_on_the_loop_does_not_wait(database: Database) -> None:
    """It could not let the COMMIT happen."""
    await write(database, "a")
    if database.is_sqlite:
        await deferred.settled()  # which has one writer at a time
    with get_db_session(database) as session:
        assert session.scalar(COUNT) in (0, 1)
    await deferred.settled()


async def test_callbacks_of_it_do_not_wait_for_it(database: Database) -> None:
    """They are a part of it, and have sessions all the same."""
    seen = []

    async def callback() -> None:
        seen.append(await current_session().scalar(COUNT))
        seen.append(await in_scope(database))

    async def work() -> None:
        async for session in get_async_db_session(database):
            session.add(Note(text="a"))
            on_commit(callback)
            return

    await work()
    async with asyncio.timeout(5):
        await deferred.settled()
    assert seen == [1, 1]


# --- it fails -----------------------------------------------------------------------------------


async def test_failure_is_told_in_every_way_there_is(
    late_checking: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """At ERROR, to the loop, and once to the next call of the context it came from."""
    told: list[dict[str, Any]] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: told.append(context))
    others_context = contextvars.Context()  # no copy: that may share the list of an earlier test
    try:
        assert await fail(late_checking) == "done"
        await deferred.settled()
        await asyncio.sleep(0)
    finally:
        loop.set_exception_handler(None)
    assert_nothing_open(late_checking)

    (record,) = [record for record in caplog.records if record.name == "repom"]
    assert record.levelno == logging.ERROR
    assert "async with get_async_db_session() as session:" in record.getMessage()
    assert [type(context["exception"]) for context in told] == [IntegrityError]

    other = loop.create_task(in_scope(late_checking), context=others_context)
    assert await other == 0
    with pytest.raises(IntegrityError):
        await get_async_session(late_checking)
    session = await get_async_session(late_checking)
    await session.close()


@pytest.mark.parametrize("call", [current_session, session_scope().__aenter__])
async def test_failure_is_raised_at_the_next_call(
    sqlite: Database, call: Callable[[], Any]
) -> None:
    """Whatever it is: nothing that follows may be built on it."""
    asyncio.get_running_loop().set_exception_handler(lambda *_: None)
    await fail(sqlite)
    await deferred.settled()
    await asyncio.sleep(0)
    with pytest.raises(IntegrityError):
        await call()
    with pytest.raises(NoScopeError):
        current_session()


async def test_time_limit_of_it(caplog: pytest.LogCaptureFixture) -> None:
    """It is an error like others, and cancels nobody."""
    asyncio.get_running_loop().set_exception_handler(lambda *_: None)
    deferred.end_later(asyncio.sleep(60), limit=0.01, label="a unit")
    await deferred.settled()
    await asyncio.sleep(0)
    with pytest.raises(TransactionError, match="time limit"):
        deferred.raise_failure()
    assert "COMMIT after leaving the loop of a unit failed" in caplog.text


def test_loop_left_when_its_event_loop_is_gone(caplog: pytest.LogCaptureFixture) -> None:
    """As by a task that is garbage when its loop is closed: there is nobody to end anything."""

    async def end() -> None:
        raise AssertionError("not to be called")

    deferred.end_later(end(), limit=1, label="a unit")
    assert "a unit was not ended" in caplog.text
    assert not deferred.pending


# --- the tasks that nobody awaits


async def steps(log: list[int]) -> None:
    for number in range(20):
        await asyncio.sleep(0)
        log.append(number)


def test_end_of_asyncio_run_waits_for_a_guarded_ending() -> None:
    """`asyncio.run()` cancels the tasks that are left; a guarded ending goes on to its end."""
    log: list[int] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        Guard(EndingTask(steps(log), loop=loop, limit=60), name="end of a test")

    asyncio.run(main())
    assert log == list(range(20))


async def test_nobody_else_can_find_an_ending() -> None:
    """What a server cancels when it stops, `asyncio.all_tasks()`, does not have it."""
    loop = asyncio.get_running_loop()
    before = asyncio.all_tasks()
    task = EndingTask(steps([]), loop=loop, limit=60)
    assert asyncio.all_tasks() == before
    await task
