"""What the owner of a scope does at its end: commit, callbacks, several databases, closing."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

import anyio
import pytest
from sqlalchemy import event, insert, select, text
from sqlalchemy.exc import IntegrityError, InvalidRequestError
from sqlalchemy.orm import Session

from repom import (
    atomic,
    current_scope,
    current_session,
    current_sync_session,
    on_commit,
    on_rollback,
    session_scope,
    sync_session_scope,
)
from repom.database import Database
from repom.errors import (
    CommitOutcomeUnknown,
    ConcurrentSessionUse,
    PartialCommitError,
    ScopeClosedError,
    TransactionAbortedError,
)
from repom.finish import end, finish
from repom.lost_changes import doom
from repom.registry import Databases
from repom.scope import SessionScope
from repom.transaction import new_scope
from tests.support.faultproxy import FaultProxy
from tests.support.units import (
    Late,
    Note,
    assert_nothing_open,
    checked_out,
    database,
    late_checking,
    postgres,
    prepared,
    sqlite,
    texts,
)

__all__ = ["database", "late_checking", "postgres", "sqlite"]


class CallbackError(Exception):
    pass


def outcome(calls: list[str], name: str = "") -> None:
    """Register what tells how the transaction ended."""
    on_commit(lambda: calls.append(f"{name} committed".strip()))
    on_rollback(lambda: calls.append(f"{name} rolled back".strip()))


# --- callbacks: when ------------------------------------------------------------------------------


async def test_callbacks_run_in_order_when_the_work_is_committed(database: Database) -> None:
    """Sync and async ones, one after the other, and each sees the row from outside."""
    seen = []

    def sync_callback() -> None:
        seen.append(("sync", texts(database)))

    async def async_callback() -> None:
        await asyncio.sleep(0)
        seen.append(("async", texts(database)))

    async with session_scope(database) as session:
        session.add(Note(text="a"))
        on_commit(async_callback)
        on_commit(sync_callback)
        on_rollback(lambda: seen.append(("rolled back", [])))
        assert seen == []
    assert seen == [("async", ["a"]), ("sync", ["a"])]


async def test_rollback_runs_the_other_kind(database: Database) -> None:
    calls: list[str] = []
    with suppress(ZeroDivisionError):
        async with session_scope(database):
            outcome(calls)
            raise ZeroDivisionError
    assert calls == ["rolled back"]


async def test_scope_without_a_session_has_callbacks_too(sqlite: Database) -> None:
    """`on_commit` means: if all went well; there need not be anything to commit."""
    calls: list[str] = []
    async with session_scope(sqlite):
        outcome(calls)
    assert calls == ["committed"]


async def test_callbacks_of_a_savepoint_that_failed_are_dropped(sqlite: Database) -> None:
    """Also when the failure was that of a flush, which SQLAlchemy rolls back by itself."""
    calls: list[str] = []
    async with session_scope(sqlite) as session:
        session.add(Note(text="a"))
        outcome(calls, "outer")
        with suppress(IntegrityError):
            async with atomic():
                outcome(calls, "inner")
                session.add(Note(text="a"))
        with suppress(ZeroDivisionError):
            async with atomic():
                async with atomic():
                    outcome(calls, "released in one that failed")
                raise ZeroDivisionError
    assert calls == [
        "inner rolled back",
        "released in one that failed rolled back",
        "outer committed",
    ]


async def test_rollback_by_hand_decides_at_once(sqlite: Database) -> None:
    """What is registered after it belongs to the transaction that follows."""
    calls: list[str] = []
    async with session_scope(sqlite) as session:
        outcome(calls, "first")
        session.add(Note(text="a"))
        await session.flush()
        await session.rollback()
        outcome(calls, "second")
        session.add(Note(text="b"))
    assert calls == ["first rolled back", "second committed"]
    assert texts(sqlite) == ["b"]


async def test_early_commit_runs_them_at_once(database: Database) -> None:
    """A later error undoes only what follows."""
    calls: list[str] = []
    with suppress(ZeroDivisionError):
        async with session_scope(database) as session:
            outcome(calls, "first")
            session.add(Note(text="a"))
            await current_scope().commit()
            assert calls == ["first committed"]
            assert texts(database) == ["a"]
            outcome(calls, "second")
            session.add(Note(text="b"))
            await session.flush()
            raise ZeroDivisionError
    assert calls == ["first committed", "second rolled back"]
    assert texts(database) == ["a"]


def test_early_commit_of_a_sync_scope(database: Database) -> None:
    calls: list[str] = []
    with suppress(ZeroDivisionError), sync_session_scope(database) as session:
        outcome(calls)
        session.add(Note(text="a"))
        current_scope().commit_sync()
        assert calls == ["committed"]
        session.add(Note(text="b"))
        raise ZeroDivisionError
    assert texts(database) == ["a"]


async def test_inner_commits_that_are_allowed_decide(sqlite: Database) -> None:
    """Their callbacks run at the end of the scope, whatever becomes of the rest."""
    calls: list[str] = []
    with suppress(ZeroDivisionError):
        async with session_scope(sqlite, inner_commits="allow") as session:
            outcome(calls, "commit")
            await session.commit()
            async with session.begin():
                outcome(calls, "begin")
            outcome(calls, "rest")
            raise ZeroDivisionError
    assert calls == ["commit committed", "begin committed", "rest rolled back"]


async def test_failed_commit_is_a_rollback(late_checking: Database) -> None:
    calls: list[str] = []

    async def work() -> None:
        async with session_scope(late_checking) as session:
            outcome(calls)
            session.add(Late(note_id=77))

    with pytest.raises(IntegrityError):
        await work()
    assert calls == ["rolled back"]


def test_failed_commit_of_a_sync_scope_is_a_rollback(late_checking: Database) -> None:
    calls: list[str] = []

    def work() -> None:
        with sync_session_scope(late_checking) as session:
            outcome(calls)
            session.add(Late(note_id=77))

    with pytest.raises(IntegrityError):
        work()
    assert calls == ["rolled back"]


async def test_swallowed_failure_of_a_flush_is_not_committed(database: Database) -> None:
    """SQLAlchemy has rolled back by then; success must not be told."""

    async def work() -> None:
        async with session_scope(database) as session:
            session.add(Note(text="before"))
            await session.flush()
            session.add_all([Note(text="a"), Note(text="a")])
            with suppress(IntegrityError):
                await session.flush()

    with pytest.raises(TransactionAbortedError):
        await work()
    assert texts(database) == []
    assert_nothing_open(database)


async def test_unknown_outcome_runs_neither_kind(
    postgres_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It says so, and still runs what was decided before: a savepoint that was undone."""
    calls: list[str] = []

    async def work(database: Database) -> None:
        async with session_scope(database) as session:
            with suppress(ZeroDivisionError):
                async with atomic():
                    outcome(calls, "savepoint")
                    raise ZeroDivisionError
            outcome(calls)
            session.add(Note(text="a"))

    with prepared(postgres_url):
        async with FaultProxy(f"{postgres_url}?sslmode=disable") as proxy:
            database = Database(proxy.url)
            proxy.cut(b"COMMIT", "after")
            with pytest.raises(CommitOutcomeUnknown):
                await work(database)
            await database.dispose()
    assert calls == ["savepoint rolled back"]
    assert "2 callback(s) of session_scope() were not run" in caplog.text


async def test_callback_registered_by_a_listener_of_the_last_flush(sqlite: Database) -> None:
    """It comes when new work is refused already, but it is part of the end."""
    calls: list[str] = []
    event.listen(Note, "after_insert", registers := lambda *_: outcome(calls))
    try:
        async with session_scope(sqlite) as session:
            session.add(Note(text="a"))
    finally:
        event.remove(Note, "after_insert", registers)
    assert calls == ["committed"]


async def test_what_a_listener_adds_to_the_last_flush_is_committed(database: Database) -> None:
    """An audit trail, for instance."""

    def audit(session: Session, *_: object) -> None:
        if all(note.text != "audit" for note in session.new):
            session.add(Note(text="audit"))

    async with session_scope(database) as session:
        event.listen(session.sync_session, "before_flush", audit)
        session.add(Note(text="a"))
    assert sorted(texts(database)) == ["a", "audit"]


async def test_a_listener_of_the_last_flush_finds_the_session_by_any_key(
    database: Database,
) -> None:
    """By each by which it was asked for before; new work is refused by then."""
    found: list[object] = []

    def look(*_: object) -> None:
        found.extend((current_session(), current_session(database)))

    async with session_scope(database) as session:
        assert current_session(database) is session
        event.listen(session.sync_session, "before_flush", look)
        session.add(Note(text="a"))
    assert found == [session, session]

    with sync_session_scope(database) as sync_session:
        assert current_sync_session(database) is sync_session
        event.listen(
            sync_session,
            "before_flush",
            lambda *_: found.extend((current_sync_session(), current_sync_session(database))),
        )
        sync_session.add(Note(text="b"))
    assert found[2:] == [sync_session, sync_session]
    assert texts(database) == ["a", "b"]


def test_commit_by_a_listener_of_a_flush_is_refused_by_sqlalchemy(sqlite: Database) -> None:
    """And the session is left by the one that is inside, not by the listener."""
    event.listen(Note, "after_insert", commits := lambda *_: current_scope().commit_sync())

    def work() -> None:
        with sync_session_scope(sqlite) as session:
            session.add(Note(text="a"))
            session.flush()

    try:
        with pytest.raises(InvalidRequestError):
            work()
    finally:
        event.remove(Note, "after_insert", commits)
    assert texts(sqlite) == []


# --- callbacks: what they may do ------------------------------------------------------------------


async def test_work_of_a_callback_is_committed_after_it(database: Database) -> None:
    """And is what the next callback sees. Registered in it, a further one follows at once."""
    log: list[str] = []

    async def first() -> None:
        current_session().add(Note(text="of the first"))
        on_commit(further)

    async def further() -> None:
        log.extend(texts(database))
        current_session().add(Note(text="of the further"))

    async with session_scope(database) as session:
        session.add(Note(text="of the scope"))
        on_commit(first)
        on_commit(lambda: log.append("last"))
    assert log == ["of the scope", "of the first", "last"]
    assert texts(database) == ["of the scope", "of the first", "of the further"]
    assert_nothing_open(database)


def test_work_of_a_callback_of_a_sync_scope(database: Database) -> None:
    """A sync callback has a sync session; an async one is awaited, and has an async one."""

    def first() -> None:
        current_sync_session().add(Note(text="of the first"))

    async def second() -> None:
        current_session().add(Note(text="of the second"))
        await current_session().flush()

    with sync_session_scope(database) as session:
        session.add(Note(text="of the scope"))
        on_commit(first)
        on_commit(second)
    assert texts(database) == ["of the scope", "of the first", "of the second"]
    assert database.engine.pool.checkedout() == 0  # type: ignore[attr-defined]


def test_async_callback_of_a_sync_scope_leaves_the_threads_event_loop_alone(
    sqlite: Database,
) -> None:
    """Old code asks for it by `get_event_loop()`."""
    loops: list[asyncio.AbstractEventLoop] = []

    async def callback() -> None:
        loops.append(asyncio.get_running_loop())

    def work() -> None:
        loop = asyncio.new_event_loop()
        asyncio.set_event_loop(loop)
        with sync_session_scope(sqlite):
            on_commit(callback)
        loops.append(asyncio.get_event_loop())
        assert loops[1] is loop
        assert loops[0] is not loop
        loop.close()

    with ThreadPoolExecutor(1) as thread:
        thread.submit(work).result()


@pytest.mark.parametrize("kind", ["coroutine", "future"])
async def test_async_callback_of_a_sync_scope_in_an_event_loop(
    sqlite: Database, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody there can await it; that is an error that says what to write."""

    async def callback() -> None:
        raise AssertionError("not to be called")

    with sync_session_scope(sqlite) as session:
        session.add(Note(text="a"))
        on_commit(callback if kind == "coroutine" else asyncio.Future)
    assert texts(sqlite) == ["a"]
    assert "async with session_scope()" in caplog.text


@pytest.mark.parametrize("fails", ["call", "await", "flush"])
async def test_failing_callback_undoes_its_own_work_only(
    database: Database, fails: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It is logged; what it waited for is committed, and the next callback runs."""

    async def awaits() -> None:
        session = current_session()
        session.add(Note(text="lost"))
        await session.flush()
        if fails == "flush":
            session.add(Note(text="lost"))
            return
        raise CallbackError

    def failing() -> Any:
        if fails == "call":
            raise CallbackError
        return awaits()

    async def next_one() -> None:
        current_session().add(Note(text="of the next"))

    async with session_scope(database) as session:
        session.add(Note(text="of the scope"))
        on_commit(failing)
        on_commit(next_one)
    assert texts(database) == ["of the scope", "of the next"]
    assert_nothing_open(database)
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert "failing" in record.getMessage()
    assert record.exc_info is not None


@pytest.mark.parametrize("fails", ["call", "await"])
def test_failing_callback_of_a_sync_scope_undoes_its_own_work_only(
    sqlite: Database, fails: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def awaits() -> None:
        current_session().add(Note(text="lost"))
        await current_session().flush()
        raise CallbackError

    def failing() -> Any:
        current_sync_session().add(Note(text="kept" if fails == "await" else "lost"))
        current_sync_session().flush()
        if fails == "await":
            return awaits()
        raise CallbackError

    with sync_session_scope(sqlite) as session:
        session.add(Note(text="of the scope"))
        on_commit(failing)
        on_commit(lambda: current_sync_session().add(Note(text="of the next")))
    kept = ["kept"] if fails == "await" else []
    assert texts(sqlite) == ["of the scope", *kept, "of the next"]
    assert [record.levelno for record in caplog.records] == [logging.ERROR]


async def test_failing_callback_does_not_hide_a_failed_commit(
    late_checking: Database, caplog: pytest.LogCaptureFixture
) -> None:
    def failing() -> None:
        raise CallbackError

    async def work() -> None:
        async with session_scope(late_checking) as session:
            on_rollback(failing)
            session.add(Late(note_id=77))

    with pytest.raises(IntegrityError):
        await work()
    assert "failing" in caplog.text


async def test_callback_may_decide_to_roll_its_own_work_back(sqlite: Database) -> None:
    async def callback() -> None:
        current_session().add(Note(text="lost"))
        current_scope().rollback_only()

    async with session_scope(sqlite) as session:
        session.add(Note(text="a"))
        on_commit(callback)
    assert texts(sqlite) == ["a"]


async def test_left_over_task_is_refused_while_callbacks_run(postgres: Database) -> None:
    """They have a transaction of their own, so nobody gets into the old session again."""
    callback_runs, left_over_done = asyncio.Event(), asyncio.Event()

    async def left_over(session: Any) -> None:
        await callback_runs.wait()
        try:
            await session.execute(insert(Note).values(text="left over"))
        finally:
            left_over_done.set()

    async def callback() -> None:
        current_session().add(Note(text="of the callback"))
        callback_runs.set()
        await left_over_done.wait()

    async with session_scope(postgres) as session:
        task = asyncio.create_task(left_over(session))
        on_commit(callback)
    with pytest.raises(ScopeClosedError):
        await task
    assert texts(postgres) == ["of the callback"]


async def test_callback_commits_nothing_that_a_sibling_has_begun(postgres: Database) -> None:
    """After an early commit the scope goes on, with work that may still fail."""
    callback_runs, sibling_wrote = asyncio.Event(), asyncio.Event()

    async def sibling() -> None:
        await callback_runs.wait()
        await current_session().execute(insert(Note).values(text="of the sibling"))
        sibling_wrote.set()

    async def callback() -> None:
        callback_runs.set()
        await sibling_wrote.wait()

    with suppress(ZeroDivisionError):
        async with session_scope(postgres):
            task = asyncio.create_task(sibling())
            on_commit(callback)
            await current_scope().commit()
            await task
            raise ZeroDivisionError
    assert texts(postgres) == []


async def test_cancelled_after_commit_tells_what_was_not_run(
    sqlite: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """The work is there, and whoever reads the log knows what is missing."""
    runs = asyncio.Event()

    async def hang() -> None:
        current_session().add(Note(text="lost"))
        runs.set()
        await asyncio.Event().wait()

    async def work() -> None:
        async with session_scope(sqlite) as session:
            session.add(Note(text="a"))
            on_commit(hang)
            on_commit(lambda: None)
            on_commit(lambda: None)

    task = asyncio.create_task(work())
    await runs.wait()
    task.cancel()
    await asyncio.wait((task,))
    assert task.cancelled()
    assert texts(sqlite) == ["a"]
    assert_nothing_open(sqlite)
    assert "2 callback(s) of session_scope() were not run: it was cancelled" in caplog.text


# --- several databases ----------------------------------------------------------------------------


@contextmanager
def scope_of(**given: Database) -> Iterator[SessionScope]:
    """A scope that knows databases by name, as the middleware makes it."""
    scope = new_scope()
    scope.options = scope.options._replace(databases=Databases(given))
    scope.enter()
    yield scope
    scope.leave()


async def in_scope(
    databases: dict[str, Database], work: Callable[[], Awaitable[None]]
) -> SessionScope:
    """Do `work` in such a scope, and commit it."""
    with scope_of(**databases) as scope:
        try:
            await work()
        except BaseException:
            await finish(scope, commit=False)
            raise
        await finish(scope, commit=True)
    return scope


async def test_databases_of_one_scope_commit_together(sqlite: Database, postgres: Database) -> None:
    async def work() -> None:
        for name in ("b", "a"):
            current_session(name).add(Note(text=name))

    await in_scope({"a": sqlite, "b": postgres}, work)
    assert (texts(sqlite), texts(postgres)) == (["a"], ["b"])


@pytest.mark.parametrize("opened", ["ab", "ba"])
async def test_databases_commit_in_the_order_in_which_they_were_given(
    sqlite: Database, postgres: Database, opened: str
) -> None:
    """Not in that in which they were opened, so the one to trust more can be the last."""

    async def work() -> None:
        for name in opened:
            await current_session(name).execute(select(Note))

    with scope_of(a=sqlite, b=postgres) as scope:
        await work()
        assert [participant.name for participant in scope.participants] == ["a", "b"]
        await scope.commit()
        scope.refuse_work()
        await finish(scope, commit=True)


async def test_all_flush_before_any_commits(sqlite: Database, postgres: Database) -> None:
    """What can fail does so while everything can still be undone."""

    async def work() -> None:
        current_session("a").add(Note(text="a"))
        current_session("b").add_all([Note(text="b"), Note(text="b")])

    with pytest.raises(IntegrityError):
        await in_scope({"a": sqlite, "b": postgres}, work)
    assert (texts(sqlite), texts(postgres)) == ([], [])
    assert_nothing_open(sqlite)
    assert_nothing_open(postgres)


async def test_a_doomed_transaction_is_refused_before_any_commits(
    sqlite: Database, postgres: Database
) -> None:
    """Also if there is nothing to flush in it any more."""

    async def work() -> None:
        current_session("a").add(Note(text="a"))
        session = current_session("b")
        session.add(Note(text="b"))
        await session.flush()
        doom(session.sync_session, "a sibling has changed what was flushed")

    with pytest.raises(ConcurrentSessionUse):
        await in_scope({"a": sqlite, "b": postgres}, work)
    assert (texts(sqlite), texts(postgres)) == ([], [])


async def test_partial_commit_says_what_is_committed(
    sqlite: Database, postgres: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """The second COMMIT failed: the first cannot be undone, the third has not happened."""
    calls: list[str] = []

    async def work() -> None:
        outcome(calls)
        current_session("a").add(Note(text="a"))
        current_session("b").add(Late(note_id=77))

    with pytest.raises(PartialCommitError) as caught:
        await in_scope({"a": sqlite, "b": postgres}, work)
    assert (caught.value.committed, caught.value.failed) == (["a"], "b")
    assert isinstance(caught.value.__cause__, IntegrityError)
    assert (texts(sqlite), texts(postgres)) == (["a"], [])
    assert_nothing_open(sqlite)
    assert_nothing_open(postgres)
    assert calls == []
    assert "2 callback(s) of session_scope() were not run" in caplog.text


async def test_lost_connection_of_one_database_leaves_no_other_open(
    sqlite: Database, postgres: Database, caplog: pytest.LogCaptureFixture
) -> None:
    async def work() -> None:
        current_session("a").add(Note(text="a"))
        await current_session("a").flush()
        session = current_session("b")
        pid = await session.scalar(text("select pg_backend_pid()"))
        async with session_scope(postgres) as other:
            await other.execute(text(f"select pg_terminate_backend({pid})"))
        raise ZeroDivisionError

    for order in ({"a": sqlite, "b": postgres}, {"b": postgres, "a": sqlite}):
        with pytest.raises(ZeroDivisionError):
            await in_scope(order, work)
        assert_nothing_open(sqlite)
        assert_nothing_open(postgres)
    assert texts(sqlite) == []


# --- closing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("ends", ["commit", "rollback", "failed commit"])
async def test_objects_stay_readable(late_checking: Database, ends: str) -> None:
    """What is loaded can be shown by code that runs after the end, an error page for instance."""
    notes: list[Note] = []

    async def work() -> None:
        async with session_scope(late_checking) as session:
            found = Note(id=100, text="found")
            session.add(found)
            await current_scope().commit()
            new = Note(text="new")
            found.remark = "changed"
            session.add(new)
            await session.flush()
            notes.extend((found, new))
            if ends == "rollback":
                raise ZeroDivisionError
            if ends == "failed commit":
                session.add(Late(note_id=77))

    with suppress(ZeroDivisionError, IntegrityError):
        await work()
    found, new = notes
    assert (found.id, found.text, found.remark) == (100, "found", "changed")
    assert new.to_dict() == {"id": new.id, "text": "new"}
    assert new.id is not None


async def test_sibling_in_flight_finishes_and_is_committed(postgres: Database) -> None:
    """The end waits for the statement that is running; the next one is refused."""
    running = asyncio.Event()

    async def sibling() -> None:
        session = current_session()
        running.set()
        await session.execute(text("insert into unit_note (text) select 'a' from pg_sleep(0.05)"))
        await session.execute(insert(Note).values(text="too late"))

    async with session_scope(postgres):
        task = asyncio.create_task(sibling())
        await running.wait()
    with pytest.raises(ScopeClosedError):
        await task
    assert texts(postgres) == ["a"]
    assert_nothing_open(postgres)


async def test_sibling_in_flight_is_rolled_back_with_the_rest(postgres: Database) -> None:
    running = asyncio.Event()

    async def sibling() -> None:
        running.set()
        await current_session().execute(insert(Note).values(text="a"))

    tasks = []
    with suppress(ZeroDivisionError):
        async with session_scope(postgres):
            tasks.append(asyncio.create_task(sibling()))
            await running.wait()
            raise ZeroDivisionError
    await asyncio.gather(*tasks)
    assert texts(postgres) == []
    assert_nothing_open(postgres)


@pytest.mark.parametrize("how", ["cancel", "cancel scope"])
async def test_cancelled_while_a_sibling_is_in_flight(postgres: Database, how: str) -> None:
    """The scope is closed all the same, and the left-over session refuses work."""
    running = asyncio.Event()
    sessions = []

    async def sibling() -> None:
        running.set()
        await current_session().execute(text("select pg_sleep(0.05)"))

    async def work() -> None:
        with anyio.CancelScope() as scope:
            async with session_scope(postgres) as session:
                sessions.append(session)
                tasks.append(asyncio.create_task(sibling()))
                await running.wait()
                (scope if how == "cancel scope" else task).cancel()
                await asyncio.Event().wait()

    tasks: list[asyncio.Task[None]] = []
    task = asyncio.create_task(work())
    await asyncio.wait((task,))
    assert task.cancelled() == (how == "cancel")
    await asyncio.gather(*tasks)
    with pytest.raises(ScopeClosedError):
        await sessions[0].execute(select(1))
    assert_nothing_open(postgres)


async def test_one_end_at_a_time(sqlite: Database) -> None:
    """A second end, such as that of an app that fails meanwhile, takes nothing from the first."""
    calls: list[str] = []
    with scope_of(default=sqlite) as scope:
        outcome(calls)
        current_session().add(Note(text="a"))
        await asyncio.gather(finish(scope, commit=True), finish(scope, commit=False))
        await finish(scope, commit=True)
    assert texts(sqlite) == ["a"]
    assert calls == ["committed"]
    assert checked_out(sqlite) == 0


async def test_commit_does_not_succeed_with_what_is_rolled_back(sqlite: Database) -> None:
    """Whoever asks for it meanwhile, or later, hears that the scope has ended."""
    with scope_of(default=sqlite) as scope:
        session = current_session()
        session.add(Note(text="a"))
        await session.flush()
        await scope.turn.take()  # somebody else's end is under way
        committing = asyncio.create_task(end(scope, commit=True))
        await asyncio.sleep(0)
        finishing = asyncio.create_task(finish(scope, commit=False))
        await asyncio.sleep(0)
        scope.turn.leave()
        with pytest.raises(ScopeClosedError):
            await committing
        await finishing
        with pytest.raises(ScopeClosedError):
            await end(scope, commit=True)
    assert texts(sqlite) == []
