"""Who observes a unit of work learns what databases say in it, and what in it will stay."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
from sqlalchemy import event, insert, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.orm import Session

from repom import (
    atomic,
    current_scope,
    current_session,
    on_commit,
    on_rollback,
    run_transaction,
    session_scope,
    sync_session_scope,
)
from repom.conflicts import is_conflict
from repom.database import Database
from repom.errors import CommitOutcomeUnknown, TransactionAbortedError
from repom.finish import finish
from repom.observer import Observer
from repom.transaction import new_scope
from tests.support.faultproxy import FaultProxy
from tests.support.units import (
    Late,
    Note,
    database,
    late_checking,
    postgres,
    sqlite,
    texts,
    url_of,
)

__all__ = ["database", "late_checking", "postgres", "sqlite"]


class Recording(Observer):
    """Keeps what it learns."""

    def __init__(self) -> None:
        self.commits = 0
        self.errors: list[Exception] = []

    def committed(self) -> None:
        self.commits += 1

    def failed(self, error: Exception) -> None:
        self.errors.append(error)


@asynccontextmanager
async def observed(database: Database, **options: Any) -> AsyncIterator[Recording]:
    """A unit of work that is observed, and rolled back."""
    unit = new_scope(database, **options)
    unit.observer = observer = Recording()
    unit.enter()
    try:
        yield observer
    finally:
        await finish(unit, commit=False)
        unit.leave()


async def add(note: str) -> None:
    current_session().add(Note(text=note))
    await current_session().flush()


# --- what stays


async def in_a_scope(database: Database) -> None:
    async with session_scope():
        await add("a")


async def in_a_function_that_may_be_repeated(database: Database) -> None:
    await run_transaction(lambda: add("a"))


async def in_a_thread(database: Database) -> None:
    def work() -> None:
        with sync_session_scope() as session:
            session.add(Note(text="a"))

    await asyncio.to_thread(work)


async def in_a_task_and_two_scopes(database: Database) -> None:
    async def work() -> None:
        async with session_scope(), session_scope():
            await add("a")

    await asyncio.create_task(work())


async def early(database: Database) -> None:
    await add("a")
    await current_scope().commit()


async def early_in_a_scope_that_fails(database: Database) -> None:
    with suppress(LookupError):
        async with session_scope():
            await early(database)
            raise LookupError


async def in_a_session_made_by_hand(database: Database) -> None:
    async with database.sessionmaker() as session:
        session.add(Note(text="a"))
        await session.commit()


async def on_a_connection_made_by_hand(database: Database) -> None:
    async with database.async_engine.begin() as connection:
        await connection.execute(insert(Note).values(text="a"))


async def although_it_was_cancelled(database: Database) -> None:
    """By the first callback, so after COMMIT."""

    async def work() -> None:
        async with session_scope():
            await add("a")
            on_commit(lambda: task.cancel())
            on_commit(lambda: asyncio.sleep(1))

    task = asyncio.create_task(work())
    await asyncio.wait([task])
    assert task.cancelled()


STAYS: list[Callable[[Database], Any]] = [
    in_a_scope,
    in_a_function_that_may_be_repeated,
    in_a_thread,
    in_a_task_and_two_scopes,
    early,
    early_in_a_scope_that_fails,
    in_a_session_made_by_hand,
    on_a_connection_made_by_hand,
    although_it_was_cancelled,
]


@pytest.mark.parametrize("work", STAYS, ids=lambda work: work.__name__)
async def test_what_stays_although_the_unit_of_work_is_rolled_back(
    sqlite: Database, postgres: Database, work: Callable[[Database], Any]
) -> None:
    """Its observer is told."""
    for each in (sqlite, postgres):
        async with observed(each) as observer:
            await work(each)
        assert texts(each) == ["a"]
        assert (observer.commits, observer.errors) == (1, [])


async def test_inner_commit_that_is_allowed_stays(database: Database) -> None:
    async with observed(database, inner_commits="allow") as observer:
        await add("a")
        await current_session().commit()
        assert observer.commits == 1
    assert texts(database) == ["a"]


@pytest.mark.filterwarnings("ignore:transaction already deassociated")
async def test_commit_of_the_connection_stays(postgres: Database) -> None:
    """Where commits of other code are allowed."""
    async with observed(postgres, inner_commits="allow") as observer:
        await add("a")
        connection = await current_session().connection()
        await connection.commit()
    assert (texts(postgres), observer.commits) == (["a"], 1)


async def nothing_at_all(database: Database) -> None:
    async with session_scope():
        pass


async def what_only_reads(database: Database) -> None:
    modes: list[Any] = [True, "snapshot"]
    for read_only in modes:
        async with session_scope(read_only=read_only) as session:
            assert (await session.scalars(select(Note.id))).all() == []


async def what_is_rolled_back(database: Database) -> None:
    with suppress(LookupError):
        async with session_scope():
            await add("a")
            raise LookupError


async def a_dry_run(database: Database) -> None:
    async with session_scope():
        await add("a")
        current_scope().rollback_only()


async def a_savepoint(database: Database) -> None:
    async with atomic():
        await add("a")


async def a_commit_that_is_a_flush(database: Database) -> None:
    await add("a")
    await current_session().commit()


async def a_callback(database: Database) -> None:
    """What waits for a rollback comes after it, and is no part of what was rolled back."""

    async def audit() -> None:
        await add("a")
        async with session_scope():
            pass

    with suppress(LookupError):
        async with session_scope():
            await add("b")
            on_rollback(audit)
            raise LookupError


GOES: list[Callable[[Database], Any]] = [
    nothing_at_all,
    what_only_reads,
    what_is_rolled_back,
    a_dry_run,
    a_savepoint,
    a_commit_that_is_a_flush,
    a_callback,
]


@pytest.mark.parametrize("work", GOES, ids=lambda work: work.__name__)
async def test_what_is_no_commit(postgres: Database, work: Callable[[Database], Any]) -> None:
    """Nor does the observer hear of the end of the unit of work itself."""
    async with observed(postgres) as observer:
        await work(postgres)
    assert texts(postgres) == (["a"] if work is a_callback else [])
    assert (observer.commits, observer.errors) == (0, [])


async def test_early_commit_that_fails_is_no_commit(late_checking: Database) -> None:
    """It has failed for certain."""
    async with observed(late_checking) as observer:
        current_session().add(Late(note_id=4711))
        with pytest.raises(IntegrityError):
            await current_scope().commit()
        assert observer.commits == 0
        assert [type(error) for error in observer.errors] == [IntegrityError]


async def test_outcome_that_is_not_known_may_stay(postgres: Database) -> None:
    """Whose ever COMMIT it was."""
    async with FaultProxy(url_of(postgres)) as proxy:
        behind = Database(f"{proxy.url}?sslmode=disable")
        for work in (in_a_scope, in_a_session_made_by_hand):
            async with observed(behind) as observer:
                proxy.cut(b"COMMIT", "before")
                with pytest.raises(CommitOutcomeUnknown):
                    await work(behind)
            assert observer.commits >= 1
        await behind.dispose()
    assert texts(postgres) == []


# --- what databases say


async def test_error_that_was_swallowed(database: Database) -> None:
    """The observer learns of it, as SQLAlchemy has raised it; in a scope inside, too."""

    async def fail() -> None:
        with suppress(DBAPIError):
            await current_session().execute(text("SELECT * FROM ghost"))

    async with observed(database) as observer:
        await fail()
        await current_session().rollback()  # SQLite has one writer at a time
        async with session_scope():
            await fail()
            current_scope().rollback_only()
    assert len(observer.errors) == 2
    for error in observer.errors:
        assert isinstance(error, DBAPIError)
        assert "ghost" in str(error.orig)


async def test_commit_that_the_database_answers_by_a_rollback(postgres: Database) -> None:
    """Both are heard of: what has failed, and that nothing was committed."""
    async with observed(postgres) as observer:
        with suppress(DBAPIError):
            await current_session().execute(text("SELECT * FROM ghost"))
        with pytest.raises(TransactionAbortedError):
            await current_scope().commit()
    assert [isinstance(error, TransactionAbortedError) for error in observer.errors] == [
        False,
        True,
    ]


async def test_conflict_in_a_flush_that_was_swallowed(postgres: Database) -> None:
    """SQLAlchemy has rolled back for it. It is the cause of what COMMIT raises then, so that who
    may repeat the work knows it for a conflict."""
    conflict = "DO $$ BEGIN RAISE EXCEPTION 'lost' USING ERRCODE = '40001'; END $$"
    async with observed(postgres):
        session = current_session()

        def lose(sync_session: Session, *_: object) -> None:
            sync_session.execute(text(conflict))

        event.listen(session.sync_session, "after_flush", lose)
        with suppress(DBAPIError):
            await add("a")
        with pytest.raises(TransactionAbortedError) as refused:
            await current_scope().commit()
    assert is_conflict(refused.value)


async def test_error_of_a_connection_made_by_hand(postgres: Database) -> None:
    async with observed(postgres) as observer, postgres.async_engine.connect() as connection:
        with suppress(DBAPIError):
            await connection.execute(text("SELECT * FROM ghost"))
    assert len(observer.errors) == 1


async def test_who_is_not_asked_for_hears_nothing(postgres: Database) -> None:
    """What another unit of work does beside it."""
    async with observed(postgres) as observer:
        pass
    async with session_scope(postgres):
        with suppress(DBAPIError):
            await current_session().execute(text("SELECT * FROM ghost"))
        current_scope().rollback_only()
    assert (observer.commits, observer.errors) == (0, [])
