"""The sessions of a scope at its end: time limits, and the threads of sync sessions."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import anyio
import anyio.to_thread
import pytest
from sqlalchemy import insert, select, text, update
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from repom import (
    current_scope,
    current_session,
    current_sync_session,
    deferred,
    session_scope,
)
from repom.database import Database
from repom.deferred import EndingTask
from repom.errors import CommitOutcomeUnknown, ScopeClosedError, TransactionError
from repom.finish import finish
from repom.transaction import new_scope
from tests.support.polling import until
from tests.support.reader import ask, connect, execute
from tests.support.units import (
    Note,
    assert_nothing_open,
    checked_out,
    database,
    postgres,
    prepared,
    remarks,
    texts,
    url_of,
)

__all__ = ["database", "postgres"]

SLOW_COMMIT = """
create function slowly() returns trigger language plpgsql as
  $$ begin perform pg_sleep({seconds}); return null; end $$;
create constraint trigger slowly after insert on unit_note
  deferrable initially deferred for each row execute function slowly();
"""


@contextmanager
def locked_row(database: Database) -> Iterator[None]:
    """Somebody else has changed a note and does not commit."""
    execute(url_of(database), "insert into unit_note (text) values ('locked')")
    connection = connect(url_of(database))
    connection.autocommit = False
    ask(connection, "update unit_note set remark = 'by somebody else'")
    try:
        yield
    finally:
        connection.close()


# --- time limits --------------------------------------------------------------------------------


async def test_commit_past_the_limit_has_an_unknown_outcome(postgres: Database) -> None:
    """It was sent, and nobody has heard the answer. Its connection is closed."""
    execute(url_of(postgres), SLOW_COMMIT.format(seconds=60))

    async def work() -> None:
        async with session_scope(postgres, end_timeout=0.1) as session:
            session.add(Note(text="a"))

    with pytest.raises(CommitOutcomeUnknown, match=r"'default'.*time limit"):
        await work()
    assert_nothing_open(postgres)


async def test_flush_past_the_limit_has_a_known_outcome(postgres: Database) -> None:
    """COMMIT was never sent: nothing of it is in the database."""

    async def work() -> None:
        async with session_scope(postgres, end_timeout=0.1) as session:
            note = (await session.scalars(select(Note))).one()
            note.remark = "mine"

    with locked_row(postgres):
        with pytest.raises(TransactionError, match="flush on database") as caught:
            await work()
        assert not isinstance(caught.value, CommitOutcomeUnknown)
        assert checked_out(postgres) == 0
    assert_nothing_open(postgres)


@pytest.mark.parametrize("ends", ["commit", "rollback"])
async def test_statement_of_a_sibling_past_the_limit_is_cut_off(
    postgres: Database, ends: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The end does not wait for it for ever, and leaves no connection to it."""
    running = asyncio.Event()

    async def sibling() -> None:
        running.set()
        await current_session().execute(text("select pg_sleep(60)"))

    async def work() -> None:
        async with session_scope(postgres, end_timeout=0.1) as session:
            await session.execute(insert(Note).values(text="a"))
            tasks.append(asyncio.create_task(sibling()))
            await running.wait()
            if ends == "rollback":
                raise ZeroDivisionError

    tasks: list[asyncio.Task[None]] = []
    with pytest.raises(TransactionError if ends == "commit" else ZeroDivisionError) as caught:
        await work()
    assert not isinstance(caught.value, CommitOutcomeUnknown)
    with pytest.raises(ScopeClosedError):
        await tasks[0]
    assert texts(postgres) == []
    assert_nothing_open(postgres)
    if ends == "rollback":
        assert "statement of another task" in caplog.text


async def test_sibling_that_has_no_connection_yet_is_not_waited_for(postgres: Database) -> None:
    """It waits for the COMMIT of another unit of work, which hangs."""
    loop = asyncio.get_running_loop()
    hanging = EndingTask(asyncio.sleep(60), loop=loop, limit=60)
    deferred.pending[loop] = {hanging}
    try:
        async with session_scope(postgres, end_timeout=0.1) as session:
            sibling = asyncio.create_task(session.execute(select(1)))
            await asyncio.sleep(0)
    finally:
        del deferred.pending[loop]
    assert not sibling.done()
    hanging.cancel()
    with pytest.raises(ScopeClosedError):
        await sibling
    assert_nothing_open(postgres)


async def test_sibling_that_waits_for_a_connection_is_not_waited_for(postgres_url: str) -> None:
    """What it gets after the end is given back at once."""
    with prepared(postgres_url, engine_kwargs={"pool_size": 1, "max_overflow": 0}) as database:

        async def work() -> None:
            async with session_scope(database, end_timeout=0.1) as session:
                tasks.append(asyncio.create_task(session.execute(select(1))))
                await asyncio.sleep(0)

        tasks: list[asyncio.Task[Any]] = []
        async with database.async_engine.connect():
            with pytest.raises(TransactionError):
                await work()
            assert not tasks[0].done()
        with pytest.raises(ScopeClosedError):
            await tasks[0]
        assert_nothing_open(database)


async def test_pool_time_out_works_in_the_last_flush(postgres_url: str) -> None:
    """It is the first to need a connection, and there is none: that is its error."""
    pool = {"pool_size": 1, "max_overflow": 0, "pool_timeout": 0.05}
    with prepared(postgres_url, engine_kwargs=pool) as database:

        async def work() -> None:
            async with session_scope(database, end_timeout=5) as session:
                session.add(Note(text="a"))

        async with database.async_engine.connect():
            with pytest.raises(PoolTimeoutError):
                await work()


async def test_commit_of_a_sync_session_past_the_limit(postgres: Database) -> None:
    """The request is answered; the thread goes on, and gives its connection back at its end."""
    execute(url_of(postgres), SLOW_COMMIT.format(seconds=0.5))
    pool: Any = postgres.engine.pool

    def write() -> None:
        current_sync_session().add(Note(text="a"))

    async def work() -> None:
        scope = new_scope(postgres, end_timeout=0.1)
        scope.enter()
        try:
            await anyio.to_thread.run_sync(write)
            await finish(scope, commit=True)
        finally:
            scope.leave()

    with pytest.raises(CommitOutcomeUnknown):
        await work()
    assert pool.checkedout() == 1
    await until(lambda: pool.checkedout() == 0)
    assert texts(postgres) == ["a"]


async def test_statement_of_a_thread_past_the_limit_is_not_waited_for(postgres: Database) -> None:
    """Its session is closed, and rolled back, as soon as it is done."""
    running = threading.Event()
    pool: Any = postgres.engine.pool

    def sibling() -> None:
        session = current_sync_session()
        session.add(Note(text="a"))
        session.flush()
        running.set()
        session.execute(text("select pg_sleep(0.5)"))

    async def work() -> None:
        scope = new_scope(postgres, end_timeout=0.1)
        scope.enter()
        thread = asyncio.create_task(asyncio.to_thread(sibling))
        await until(running.is_set)
        await finish(scope, commit=False)
        scope.leave()
        assert not thread.done()
        await thread

    await work()
    await until(lambda: pool.checkedout() == 0)
    assert texts(postgres) == []


async def test_flush_of_a_sync_session_past_the_limit(postgres: Database) -> None:
    """What it has done when its thread gets on is rolled back."""
    pool: Any = postgres.engine.pool

    def change() -> None:
        note = current_sync_session().scalars(select(Note)).one()
        note.remark = "mine"

    async def work() -> None:
        scope = new_scope(postgres, end_timeout=0.1)
        scope.enter()
        try:
            await anyio.to_thread.run_sync(change)
            await finish(scope, commit=True)
        finally:
            scope.leave()

    with locked_row(postgres):
        with pytest.raises(TransactionError, match="flush on database"):
            await work()
        assert pool.checkedout() == 1
    await until(lambda: pool.checkedout() == 0)
    assert remarks(postgres) == [None]


# --- sync sessions in a scope of the event loop -------------------------------------------------


async def test_threads_of_a_scope_share_its_sync_session(database: Database) -> None:
    """Their statements queue, and the owner on the event loop commits them."""
    sessions = set()

    def write(number: int) -> None:
        session = current_sync_session()
        sessions.add(session)
        session.execute(insert(Note).values(text=str(number)))

    scope = new_scope(database)
    scope.enter()
    await asyncio.gather(*(asyncio.to_thread(write, number) for number in range(5)))
    await finish(scope, commit=True)
    scope.leave()
    assert len(sessions) == 1
    assert sorted(texts(database)) == list("01234")


async def test_sync_session_is_ended_in_a_thread(database: Database) -> None:
    """COMMIT and ROLLBACK do not stop the event loop."""
    threads = []
    scope = new_scope(database)
    scope.enter()
    session = current_sync_session()
    session.add(Note(text="a"))
    end = type(session).end  # type: ignore[attr-defined]

    def ending(how: str) -> None:
        threads.append((how, threading.current_thread()))
        end(session, how)

    session.end = ending  # type: ignore[attr-defined]
    await scope.commit()
    session.execute(update(Note).values(remark="lost"))
    await finish(scope, commit=False)
    scope.leave()
    here = threading.current_thread()
    assert [how for how, thread in threads if thread is not here] == ["flush", "commit", "rollback"]
    # Nothing to do for the database any more, so no thread is needed.
    assert [how for how, thread in threads if thread is here] == []
    assert not session.identity_map


async def test_pool_smaller_than_the_thread_pool_does_not_deadlock(postgres_url: str) -> None:
    """Endpoints that wait for a connection do not keep those from ending that could give one."""
    pool = {"pool_size": 3, "max_overflow": 0, "pool_timeout": 20}
    anyio.to_thread.current_default_thread_limiter().total_tokens = 10
    with prepared(postgres_url, engine_kwargs=pool) as database:

        def endpoint() -> None:
            current_sync_session().execute(text("select pg_sleep(0.005)"))

        async def request() -> None:
            scope = new_scope(database)
            scope.enter()
            try:
                await anyio.to_thread.run_sync(endpoint)
                await finish(scope, commit=True)
            finally:
                scope.leave()

        async with asyncio.timeout(15), anyio.create_task_group() as group:
            for _ in range(60):
                group.start_soon(request)
        assert database.engine.pool.checkedout() == 0  # type: ignore[attr-defined]


async def test_failed_rollback_of_one_session_is_logged(
    postgres: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """The database undoes what has lost its connection; the error of the block goes on."""

    async def work() -> None:
        async with session_scope(postgres) as session:
            session.add(Note(text="a"))
            pid = await session.scalar(text("select pg_backend_pid()"))
            execute(url_of(postgres), f"select pg_terminate_backend({pid})")
            current_scope().rollback_only()

    await work()
    assert texts(postgres) == []
    assert_nothing_open(postgres)
    assert ["ROLLBACK failed on database 'default'" in text for text in caplog.messages] == [True]
