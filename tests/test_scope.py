"""The scope itself: which session it gives to whom, and what it keeps alive."""

import asyncio
import gc
import logging
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest
from sqlalchemy import func, select

from repom import (
    current_scope,
    current_session,
    current_sync_session,
    on_commit,
    session_scope,
    sync_session_scope,
)
from repom.begin import BeginOptions
from repom.callbacks import Callbacks
from repom.database import Database
from repom.errors import (
    MixedSessionsError,
    ScopeClosedError,
    TransactionError,
    UnknownDatabaseError,
    WrongEventLoopError,
    WrongThreadError,
)
from repom.registry import Databases
from repom.scope import SessionScope
from repom.scope_options import ScopeOptions
from tests.support.units import Note, assert_nothing_open, database, postgres, sqlite, texts

__all__ = ["database", "postgres", "sqlite"]


# --- one session for each database --------------------------------------------------------------


async def test_one_session_for_each_database(sqlite: Database, postgres: Database) -> None:
    """Whatever it is asked for by, and in whatever task."""

    async def child() -> None:
        assert current_session() is session
        assert current_session(postgres) is other

    async with session_scope(sqlite) as session:
        other = current_session(postgres)
        assert other is not session
        assert current_session() is current_session("default") is current_session(sqlite)
        await asyncio.create_task(child())


async def test_session_first_opened_in_a_child_task_is_that_of_the_scope(
    database: Database,
) -> None:
    """What goes into the context variable is the scope, so its owner sees the session."""

    async def child() -> None:
        current_session(database).add(Note(text="a"))

    async with session_scope():
        await asyncio.create_task(child())
    assert texts(database) == ["a"]


async def test_unused_scope_takes_no_connection(postgres: Database) -> None:
    async with session_scope(postgres):
        current_session()
    async with session_scope(postgres) as session:
        session.add(note := Note(text="a"))
        session.expunge(note)
    assert postgres.async_engine.pool.status().startswith("Pool size: 10  Connections in pool: 0")


async def test_work_is_an_open_transaction_or_a_callback(sqlite: Database) -> None:
    """Without either there is nothing to end, so a response need not wait."""
    async with session_scope(sqlite) as session:
        scope = current_scope()
        assert not scope.has_work
        await session.execute(select(1))
        assert scope.has_work
        await scope.commit()
        assert not scope.has_work
        on_commit(lambda: None)
        assert scope.has_work


async def test_threads_that_ask_at_the_same_time_get_one_session(sqlite: Database) -> None:
    async with session_scope():
        asked = (asyncio.to_thread(current_sync_session, sqlite) for _ in range(8))
        assert len(set(await asyncio.gather(*asked))) == 1


# --- errors that teach --------------------------------------------------------------------------


async def test_async_session_in_a_thread(sqlite: Database) -> None:
    async with session_scope(sqlite):
        with pytest.raises(WrongThreadError, match=r"current_sync_session\(\)"):
            await asyncio.to_thread(current_session)


async def test_session_on_another_event_loop(sqlite: Database) -> None:
    async def elsewhere() -> None:
        with pytest.raises(WrongEventLoopError, match=r"session_scope\(\)"):
            current_session()

    async with session_scope(sqlite):
        await asyncio.to_thread(asyncio.run, elsewhere())


def test_two_event_loops_that_ask_at_the_same_moment(sqlite: Database) -> None:
    """Neither has a session yet when the other one asks; only one of them gets it."""
    both_have_asked = threading.Barrier(2, timeout=10)

    class Meeting(Databases):
        def __getitem__(self, database: str | Database | None) -> Database:
            both_have_asked.wait()
            return super().__getitem__(database)

    databases = Meeting({"default": sqlite})
    scope = SessionScope(ScopeOptions(databases, BeginOptions(), "defer", 1.0), "a test")
    got: list[object] = []

    async def ask() -> None:
        try:
            got.append(scope.session())
        except WrongEventLoopError as error:
            got.append(error)

    threads = [threading.Thread(target=asyncio.run, args=(ask(),)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(type(each).__name__ for each in got) == ["AsyncSession", "WrongEventLoopError"]


@pytest.mark.parametrize(
    ("first", "second"),
    [(current_session, current_sync_session), (current_sync_session, current_session)],
    ids=["async first", "sync first"],
)
async def test_sync_and_async_session_of_one_database(
    sqlite: Database, first: Callable[..., object], second: Callable[..., object]
) -> None:
    """The error says which is in use: two connections cannot share one transaction."""
    async with session_scope():
        first(sqlite)
        with pytest.raises(MixedSessionsError, match="two connections") as caught:
            second(sqlite)
    assert str(caught.value).startswith(f"{second.__name__}() was called where {first.__name__}()")


async def test_async_session_in_a_scope_that_sync_code_ends(
    sqlite: Database, postgres: Database
) -> None:
    """Also that of another database: nobody could await its COMMIT."""
    with sync_session_scope(sqlite) as session:
        with pytest.raises(MixedSessionsError, match=r"inside sync_session_scope\(\)"):
            current_session(postgres)
        session.add(Note(text="a"))
    assert texts(sqlite) == ["a"]


async def test_commit_sync_with_an_async_session(sqlite: Database, postgres: Database) -> None:
    async with session_scope(sqlite) as session:
        session.add(Note(text="a"))
        current_sync_session(postgres).add(Note(text="b"))
        with pytest.raises(MixedSessionsError, match=r"await current_scope\(\)\.commit\(\)"):
            current_scope().commit_sync()
    assert (texts(sqlite), texts(postgres)) == (["a"], ["b"])


async def test_unknown_name(sqlite: Database) -> None:
    async with session_scope(sqlite):
        with pytest.raises(UnknownDatabaseError, match=r"'reports'.*Known: default"):
            current_session("reports")


# --- after the end ------------------------------------------------------------------------------


async def test_left_over_task_is_told_that_its_scope_has_ended(sqlite: Database) -> None:
    """By every way to the session, and to its end."""
    over = asyncio.Event()

    async def left_over() -> None:
        await over.wait()
        scope = current_scope()
        assert not scope.is_open
        for use in (
            current_session,
            current_sync_session,
            lambda: on_commit(print),
            scope.commit_sync,
        ):
            with pytest.raises(ScopeClosedError, match=r"session_scope\(\)"):
                use()
        with pytest.raises(ScopeClosedError):
            await scope.commit()

    async with session_scope(sqlite):
        task = asyncio.create_task(left_over())
    over.set()
    await task


async def test_thread_that_asks_in_the_moment_of_the_end(sqlite: Database) -> None:
    """A session that it opened then would never be closed."""
    looks_up = threading.Event()
    ended = threading.Event()

    class SlowDatabases(Databases):
        def __getitem__(self, database: str | Database | None) -> Database:
            looks_up.set()
            ended.wait()
            return super().__getitem__(database)

    async with session_scope():
        scope = current_scope()
        scope.options = scope.options._replace(databases=SlowDatabases({"default": sqlite}))
        asking = asyncio.create_task(asyncio.to_thread(current_sync_session))
        await asyncio.to_thread(looks_up.wait)
    ended.set()
    with pytest.raises(ScopeClosedError):
        await asking


# --- rollback_only ------------------------------------------------------------------------------


async def test_rollback_only(database: Database) -> None:
    """The block ends without an error, and nothing of it stays."""
    async with session_scope(database) as session:
        session.add(Note(text="a"))
        await session.flush()
        current_scope().rollback_only()
        assert await session.scalar(select(func.count(Note.id))) == 1
    with sync_session_scope(database) as sync:
        sync.add(Note(text="b"))
        current_scope().rollback_only()
    assert texts(database) == []
    assert_nothing_open(database)


async def test_commit_after_rollback_only_is_a_contradiction(sqlite: Database) -> None:
    async with session_scope(sqlite) as session:
        session.add(Note(text="a"))
        current_scope().rollback_only()
        with pytest.raises(TransactionError, match="Decide for one of them"):
            await current_scope().commit()
    assert texts(sqlite) == []


async def test_scope_shows_what_it_is_and_how_far(sqlite: Database) -> None:
    async with session_scope(sqlite):
        scope = current_scope()
        assert repr(scope) == "<SessionScope session_scope() (open)>"
        scope.refuse_work()
        assert repr(scope) == "<SessionScope session_scope() (ending)>"
    assert repr(scope) == "<SessionScope session_scope() (closed)>"


# --- the context --------------------------------------------------------------------------------


async def test_scope_left_in_another_context_leaves_that_one_alone(sqlite: Database) -> None:
    """As an async generator may be that is finalised elsewhere; the scope ends all the same."""
    block = session_scope(sqlite)
    session = await asyncio.create_task(block.__aenter__())
    session.add(Note(text="a"))
    await block.__aexit__(None, None, None)
    assert texts(sqlite) == ["a"]


async def test_scope_left_twice_takes_nothing_from_the_one_around_it(sqlite: Database) -> None:
    async with session_scope(sqlite) as outer:
        async with session_scope(sqlite):
            inner = current_scope()
        inner.leave()
        assert current_session() is outer


# --- memory -------------------------------------------------------------------------------------


@contextmanager
def without_garbage_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@pytest.mark.parametrize("ends", ["commit", "rollback", "failing callback"])
async def test_scope_is_freed_when_its_block_is_left(
    postgres: Database, ends: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its sessions and their objects, by counting references alone."""
    # pytest keeps what is logged, with its traceback.
    monkeypatch.setattr(logging.getLogger("repom"), "disabled", True)
    alive: list[weakref.ref[object]] = []

    def fail() -> None:
        raise ZeroDivisionError

    async def work() -> None:
        async with session_scope(postgres) as session:
            note = Note(text="a", remark="x")
            session.add(note)
            await session.flush()
            async with session.begin_nested():
                await session.scalars(select(Note))
            found: list[object] = [current_scope(), session, session.sync_session, note]
            alive.extend(map(weakref.ref, found))
            if ends == "failing callback":
                on_commit(fail)
            if ends == "rollback":
                raise ZeroDivisionError

    await postgres.ping()  # a connection keeps alive the context that it was opened in
    # The loop lets go of a cancelled timer when there is none before it.
    other_timer = asyncio.get_running_loop().call_later(10, print)
    with without_garbage_collector():
        with suppress(ZeroDivisionError):
            await work()
        await asyncio.sleep(0)
        assert [reference() for reference in alive] == [None] * 4
    other_timer.cancel()


async def test_closed_scope_keeps_no_session_alive(sqlite: Database) -> None:
    """A task that it has left behind keeps the scope, but not what was in it."""
    async with session_scope(sqlite) as session:
        scope = current_scope()
        session.add(Note(text="a"))
        alive = weakref.ref(session)
    with without_garbage_collector():
        del session
        await asyncio.sleep(0)
        assert alive() is None
    assert not scope.is_open


def test_sync_scope_is_freed_when_its_block_is_left(sqlite: Database) -> None:
    alive: list[weakref.ref[SessionScope]] = []

    def work() -> None:
        with sync_session_scope(sqlite) as session:
            session.add(Note(text="a"))
            alive.append(weakref.ref(current_scope()))

    with without_garbage_collector():
        work()
        assert alive[0]() is None


def test_unit_of_work_that_begins_while_another_is_first_used(
    sqlite: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by what the garbage collector finalizes just then. It does not wait for the other one."""
    make = Callbacks

    def begin_another() -> Callbacks:
        monkeypatch.undo()
        with sync_session_scope(sqlite):
            current_sync_session()
        return make()

    def use() -> None:
        with sync_session_scope(sqlite):
            used.set()

    used = threading.Event()
    monkeypatch.setattr("repom.scope.Callbacks", begin_another)
    thread = threading.Thread(target=use, daemon=True)
    thread.start()
    thread.join(10)
    assert used.is_set()
