"""What user code writes: `session_scope()`, `run_transaction()`, and their sync twins."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial

import pytest
from sqlalchemy import select, text
from sqlalchemy.exc import IntegrityError

from repom import (
    current_scope,
    current_session,
    current_sync_session,
    on_commit,
    run_sync_transaction,
    run_transaction,
    session_scope,
    sync_session_scope,
)
from repom.database import Database
from repom.errors import CommitOutcomeUnknown, NoScopeError
from tests.support.cancelling import CANCELLING, Cancelling, answered_commits, cancelled_at
from tests.support.faultproxy import FaultProxy
from tests.support.units import (
    Late,
    Note,
    assert_nothing_open,
    database,
    late_checking,
    postgres,
    prepared,
    remarks,
    sqlite,
    texts,
)

__all__ = ["database", "late_checking", "postgres", "sqlite"]


# --- session_scope --------------------------------------------------------------------------------


async def test_scope_commits_when_left(database: Database) -> None:
    async with session_scope(database) as session:
        session.add(Note(text="a"))
    assert texts(database) == ["a"]
    assert_nothing_open(database)


async def test_scope_rolls_back_when_an_exception_leaves_it(database: Database) -> None:
    with suppress(ZeroDivisionError):
        async with session_scope(database) as session:
            session.add(Note(text="a"))
            await session.flush()
            raise ZeroDivisionError
    assert texts(database) == []
    assert_nothing_open(database)


def test_sync_scope_commits_and_rolls_back(database: Database) -> None:
    with sync_session_scope(database) as session:
        assert current_sync_session() is session
        session.add(Note(text="a"))
    with suppress(ZeroDivisionError), sync_session_scope(database) as session:
        session.add(Note(text="b"))
        session.flush()
        raise ZeroDivisionError
    assert texts(database) == ["a"]
    assert database.engine.pool.checkedout() == 0  # type: ignore[attr-defined]


@pytest.mark.parametrize("how", CANCELLING)
@pytest.mark.parametrize("pool", ["pooled", "new"])
@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
async def test_scope_cancelled_at_any_await(
    kind: str, pool: str, how: Cancelling, request: pytest.FixtureRequest
) -> None:
    """The row is there exactly if COMMIT was answered; nothing is left open; it stays cancelled.

    With a connection from the pool, and with one that is made at the first statement.
    """
    database: Database = request.getfixturevalue(kind)

    async def work(note: str) -> None:
        async with session_scope(database) as session:
            session.add(Note(text=note))
            await session.flush()
            await session.execute(select(Note.id))

    expected = []
    for number in range(1, 200):
        await database.ping()
        if pool == "new":
            await database.async_engine.dispose()
        with answered_commits(database) as answered:
            was_cancelled = await cancelled_at(number, how, work(f"{number}"))
        assert_nothing_open(database)
        if answered:
            expected.append(f"{number}")
        assert texts(database) == expected
        if not was_cancelled:
            break
    assert number > 3
    assert len(expected) > 1  # cancelled in COMMIT, which was answered all the same
    with pytest.raises(NoScopeError):
        current_scope()


async def test_scope_whose_body_swallows_the_cancellation_is_ended(sqlite: Database) -> None:
    """A body that goes on after its `CancelledError` has decided to; its work is committed."""

    async def work() -> None:
        async with session_scope(sqlite) as session:
            session.add(Note(text="a"))
            with suppress(asyncio.CancelledError):
                await asyncio.Event().wait()

    task = asyncio.create_task(work())
    await asyncio.sleep(0)
    task.cancel()
    await task
    assert texts(sqlite) == ["a"]


async def test_failed_commit_is_raised_in_place(late_checking: Database) -> None:
    """And nothing of the scope is in the database, nor open."""

    async def work() -> None:
        async with session_scope(late_checking) as session:
            session.add_all([Note(text="a"), Late(note_id=77)])

    with pytest.raises(IntegrityError):
        await work()
    assert texts(late_checking) == []
    assert_nothing_open(late_checking)


def test_failed_commit_of_a_sync_scope_is_raised_in_place(late_checking: Database) -> None:
    def work() -> None:
        with sync_session_scope(late_checking) as session:
            session.add_all([Note(text="a"), Late(note_id=77)])

    with pytest.raises(IntegrityError):
        work()
    assert texts(late_checking) == []
    assert late_checking.engine.pool.checkedout() == 0  # type: ignore[attr-defined]


async def test_nested_scope_is_independent(postgres: Database) -> None:
    """It commits although the scope around it rolls back, and the other way round."""
    with suppress(ZeroDivisionError):
        async with session_scope(postgres) as outer:
            outer.add(Note(text="outer"))
            await outer.flush()
            async with session_scope() as inner:  # the default is still that of the outer one
                assert inner is not outer
                assert current_session() is inner
                inner.add(Note(text="inner"))
            assert current_session() is outer
            raise ZeroDivisionError
    async with session_scope(postgres) as outer:
        outer.add(Note(text="outer"))
        with suppress(ZeroDivisionError):
            async with session_scope(postgres) as inner:
                inner.add(Note(text="lost"))
                raise ZeroDivisionError
    assert texts(postgres) == ["inner", "outer"]


async def test_scopes_of_two_tasks_are_independent(database: Database) -> None:
    """Each parallel writer that opens its own has a transaction of its own."""

    async def write(note: str) -> None:
        async with session_scope(database) as session:
            session.add(Note(text=note))
            await session.flush()
            assert current_session() is session
            if note == "bad":
                raise ZeroDivisionError

    names = ["a", "b", "bad", "c"]
    await asyncio.gather(*map(write, names), return_exceptions=True)
    assert sorted(texts(database)) == ["a", "b", "c"]


async def test_isolation_level_is_that_of_the_scope(postgres: Database) -> None:
    """And only of this one: the next use of the pooled connection has the server's default."""
    level = text("SHOW transaction_isolation")
    async with session_scope(postgres, isolation_level="SERIALIZABLE") as session:
        assert await session.scalar(level) == "serializable"
    async with session_scope(postgres) as session:
        assert await session.scalar(level) == "read committed"
    with sync_session_scope(postgres, isolation_level="REPEATABLE READ") as sync:
        assert sync.scalar(level) == "repeatable read"


async def test_two_runs_of_a_job_in_one_process(database: Database) -> None:
    """Each `asyncio.run()` has an event loop of its own."""

    async def nightly(note: str) -> None:
        async with session_scope(database) as session:
            session.add(Note(text=note))

    for note in ("a", "b"):
        await asyncio.to_thread(asyncio.run, nightly(note))
    assert texts(database) == ["a", "b"]


# --- run_transaction: again after a conflict ------------------------------------------------------

CLIENTS = 6


async def increment(seen: list[int]) -> int:
    """Read and write what others read and write, too; what is read decides what is written."""
    seen.append(current_scope().attempt)
    note = (await current_session().scalars(select(Note))).one()
    number = int(note.remark or 0) + 1
    note.remark = f"{number}"
    return number


def increment_sync(seen: list[int]) -> int:
    seen.append(current_scope().attempt)
    note = current_sync_session().scalars(select(Note)).one()
    number = int(note.remark or 0) + 1
    note.remark = f"{number}"
    return number


def with_a_counter(database: Database) -> None:
    with sync_session_scope(database) as session:
        session.add(Note(text="counter"))


async def test_work_that_lost_a_conflict_is_done_again(database: Database) -> None:
    """No increment is lost, each is returned once, and somebody needed a second attempt, but on
    SQLite, where writers wait for each other before they read."""
    with_a_counter(database)
    seen: list[int] = []
    counted = await asyncio.gather(
        *(
            run_transaction(
                partial(increment, seen),
                database=database,
                retries=50,
                isolation_level="SERIALIZABLE",
            )
            for _ in range(CLIENTS)
        )
    )
    assert sorted(counted) == list(range(1, CLIENTS + 1))
    assert remarks(database) == [f"{CLIENTS}"]
    assert (max(seen) > 1) is not database.is_sqlite
    assert_nothing_open(database)


def test_sync_work_that_lost_a_conflict_is_done_again(database: Database) -> None:
    with_a_counter(database)
    seen: list[int] = []
    with ThreadPoolExecutor(CLIENTS) as threads:
        futures = [
            threads.submit(
                run_sync_transaction,
                partial(increment_sync, seen),
                database=database,
                retries=50,
                isolation_level="SERIALIZABLE",
            )
            for _ in range(CLIENTS)
        ]
        counted = [future.result() for future in futures]
    assert sorted(counted) == list(range(1, CLIENTS + 1))
    assert remarks(database) == [f"{CLIENTS}"]


async def test_work_is_repeated_only_so_often(database: Database) -> None:
    """What it raised in the end is raised; nothing of any attempt is kept, and what waited for
    COMMIT did not happen."""
    attempts, called = [], []

    async def lose() -> None:
        attempts.append(current_scope().attempt)
        current_session().add(Note(text="a"))
        on_commit(lambda: called.append("committed"))
        raise ZeroDivisionError

    def is_lost(error: BaseException) -> bool:
        return isinstance(error, ZeroDivisionError)

    with pytest.raises(ZeroDivisionError) as caught:
        await run_transaction(lose, database=database, retries=2, retry_on=is_lost)
    assert attempts == [1, 2, 3]
    assert caught.value.__notes__ == ["It was attempt 3, the last one."]
    assert (texts(database), called) == ([], [])


async def test_other_errors_are_not_repeated(sqlite: Database) -> None:
    attempts = []

    async def fail() -> None:
        attempts.append(current_scope().attempt)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await run_transaction(fail, database=sqlite)
    assert attempts == [1]


async def test_unknown_outcome_is_not_repeated(postgres_url: str) -> None:
    """It may have been committed, and was, here."""
    async with FaultProxy(postgres_url + "?sslmode=disable") as proxy:
        with prepared(postgres_url) as direct:
            database = Database(proxy.url)
            attempts = []

            async def write() -> None:
                attempts.append(current_scope().attempt)
                current_session().add(Note(text="a"))

            proxy.cut(b"COMMIT", "after")
            with pytest.raises(CommitOutcomeUnknown):
                await run_transaction(write, database=database)
            assert (attempts, texts(direct)) == ([1], ["a"])
            await database.dispose()
