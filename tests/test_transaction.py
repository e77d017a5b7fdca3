"""What user code writes: `session_scope()`, its sync twin, and `atomic()`."""

import asyncio
import inspect
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
from sqlalchemy import insert, literal, select, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from repom import (
    atomic,
    current_scope,
    current_session,
    current_sync_session,
    session_scope,
    sync_session_scope,
)
from repom.database import Database
from repom.errors import DurableAtomicError, NoScopeError, ScopeError
from tests.support.cancelling import CANCELLING, Cancelling, answered_commits, cancelled_at
from tests.support.units import (
    Late,
    Note,
    assert_nothing_open,
    database,
    late_checking,
    postgres,
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
    assert number > 5
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


# --- atomic: a savepoint, or a scope --------------------------------------------------------------


async def test_atomic_outside_a_scope_is_one(database: Database) -> None:
    async with atomic(database) as session:
        assert current_session() is session
        session.add(Note(text="a"))
    with suppress(ZeroDivisionError):
        async with atomic(database):
            current_session().add(Note(text="b"))
            raise ZeroDivisionError
    assert texts(database) == ["a"]


async def test_atomic_in_a_scope_is_a_savepoint(database: Database) -> None:
    """An error that is caught outside the block undoes the block, and nothing else."""
    async with session_scope(database) as session:
        session.add(Note(text="before"))
        async with atomic() as inner:
            assert inner is session
            session.add(Note(text="kept"))
        with suppress(ZeroDivisionError):
            async with atomic():
                session.add(Note(text="undone"))
                await session.flush()
                raise ZeroDivisionError
        session.add(Note(text="after"))
    assert texts(database) == ["before", "kept", "after"]


async def test_atomic_of_a_scope_that_fails_is_undone_with_it(database: Database) -> None:
    with suppress(ZeroDivisionError):
        async with session_scope(database):
            async with atomic() as session:
                session.add(Note(text="a"))
            raise ZeroDivisionError
    assert texts(database) == []


def test_sync_atomic_is_a_savepoint_or_a_scope(database: Database) -> None:
    with atomic(database) as session:
        session.add(Note(text="own"))
    with sync_session_scope(database) as session:
        with atomic() as inner:
            assert inner is session
            session.add(Note(text="kept"))
        with suppress(ZeroDivisionError), atomic():
            session.add(Note(text="undone"))
            session.flush()
            raise ZeroDivisionError
    assert texts(database) == ["own", "kept"]


async def test_failed_statement_in_atomic_leaves_the_transaction_healthy(
    database: Database,
) -> None:
    """PostgreSQL refuses everything after an error, until it is rolled back to a savepoint."""
    async with session_scope(database) as session:
        session.add(Note(text="a"))
        for statement in (insert(Note).values(text="a"), text("no sql")):
            with pytest.raises(Exception, match=r"unit_note|syntax"):
                async with atomic():
                    await session.execute(statement)
        with pytest.raises(IntegrityError):
            async with atomic():
                session.add(Note(text="a"))
        session.add(Note(text="b"))
    assert texts(database) == ["a", "b"]


async def test_atomic_of_another_database(sqlite: Database, postgres: Database) -> None:
    """In a scope it is a savepoint of the session that the scope has for that database."""
    async with session_scope(sqlite):
        with suppress(ZeroDivisionError):
            async with atomic(postgres) as session:
                assert session is current_session(postgres)
                session.add(Note(text="undone"))
                await session.flush()
                raise ZeroDivisionError
        current_session(postgres).add(Note(text="kept"))
    assert texts(postgres) == ["kept"]


# --- atomic as a decorator ------------------------------------------------------------------------


def test_decorated_function_keeps_name_signature_and_return(sqlite: Database) -> None:
    @atomic(sqlite)
    async def transfer(amount: int, *, note: str = "") -> int:
        """Move it."""
        return amount * 2

    @atomic(sqlite)
    def transfer_sync(amount: int) -> int:
        current_sync_session()
        return amount * 3

    assert inspect.iscoroutinefunction(transfer)
    assert not inspect.iscoroutinefunction(transfer_sync)
    assert (transfer.__name__, transfer.__doc__) == ("transfer", "Move it.")
    assert str(inspect.signature(transfer)) == "(amount: int, *, note: str = '') -> int"
    assert asyncio.run(transfer(21)) == 42
    assert transfer_sync(2) == 6


async def test_decorated_function_is_a_block_at_each_call(database: Database) -> None:
    """Recursion nests: the innermost that fails undoes itself, if its error is caught."""

    @atomic(database)
    async def write(depth: int) -> None:
        current_session().add(Note(text=f"depth {depth}"))
        if depth == 2:
            raise ZeroDivisionError
        with suppress(ZeroDivisionError):
            await write(depth + 1)

    await write(0)
    assert texts(database) == ["depth 0", "depth 1"]


@pytest.mark.parametrize("shared", [False, True], ids=["scopes of their own", "one scope"])
async def test_concurrent_use_of_one_decorator(database: Database, shared: bool) -> None:
    """Each call has its own scope; in one scope, one savepoint after the other."""

    @atomic(database)
    async def write(number: int) -> None:
        session = current_session()
        session.add(Note(text=str(number)))
        await session.flush()
        await asyncio.sleep(0)
        if number % 2:
            raise ZeroDivisionError

    async def write_all() -> None:
        calls = (write(number) for number in range(6))
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(result) for result in results] == [type(None), ZeroDivisionError] * 3

    if shared:
        async with session_scope(database):
            await write_all()
    else:
        await write_all()
    assert sorted(texts(database)) == ["0", "2", "4"]


async def test_one_object_is_one_block_at_a_time(sqlite: Database) -> None:
    """Shared by two tasks it would end the block of the other."""
    block = atomic(sqlite)
    async with block:
        with pytest.raises(ScopeError, match=r"Write `atomic\(\)` once more"):
            await block.__aenter__()
    async with block as session:
        session.add(Note(text="again"))
    with block as sync:
        with pytest.raises(ScopeError, match="in use already"):
            block.__enter__()
        sync.add(Note(text="and again"))
    assert texts(sqlite) == ["again", "and again"]


def generator() -> Iterator[int]:
    yield 1


async def async_generator() -> AsyncIterator[int]:
    yield 1


@pytest.mark.parametrize("function", [generator, async_generator])
def test_generator_functions_are_refused(function: Callable[[], Any]) -> None:
    """Their body would run when the block has been left."""
    with pytest.raises(TypeError, match=r"(?s)@atomic\(\) cannot decorate .*generator.*inside it"):
        atomic()(function)


async def test_block_that_cannot_be_entered_can_be_tried_again(
    sqlite: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What fails on entering leaves the object unused."""
    block = atomic(sqlite)

    async def entering() -> None:
        async with block:
            pass

    def refuse(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    with monkeypatch.context() as patched:
        patched.setattr(AsyncSession, "__init__", refuse)
        patched.setattr(Session, "__init__", refuse)
        with pytest.raises(ZeroDivisionError):
            await entering()
        with pytest.raises(ZeroDivisionError):
            block.__enter__()
    await entering()
    with pytest.raises(NoScopeError):
        current_scope()


# --- durable --------------------------------------------------------------------------------------


async def test_durable_commits_when_left(sqlite: Database) -> None:
    async with atomic(sqlite, durable=True) as session:
        session.add(Note(text="a"))
    assert texts(sqlite) == ["a"]


async def test_durable_refuses_to_be_a_savepoint(sqlite: Database) -> None:
    """The error names the unit of work that would have the last word."""

    @atomic(sqlite, durable=True)
    async def pay() -> None:
        raise AssertionError("not to be called")

    async with session_scope(sqlite) as session:
        with pytest.raises(
            DurableAtomicError, match=r"(?s)inside session_scope\(\).*session_scope"
        ):
            await pay()
        assert await session.scalar(select(literal(1))) == 1
