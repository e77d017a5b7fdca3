"""The session that a scope hands out: shared by tasks, committed by its owner only."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import pytest
from sqlalchemy import event, insert, literal, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from repom import current_session, session_scope, sync_session_scope
from repom.database import Database
from repom.errors import ConcurrentSessionUse, InnerCommitError, ScopeClosedError
from repom.managed import InnerCommits, managed_class
from tests.support.units import (
    Line,
    Note,
    assert_nothing_open,
    database,
    postgres,
    prepared,
    remarks,
    sqlite,
    texts,
)

__all__ = ["database", "postgres", "sqlite"]


def by_text(text: str) -> Any:
    return select(Note).where(Note.text == text)


# --- siblings -------------------------------------------------------------------------------------


async def test_statements_of_siblings_queue(database: Database) -> None:
    """Twenty tasks execute on one session, and each gets its own answer."""

    async def ask(number: int) -> int | None:
        found: int | None = await current_session().scalar(select(Note.id).where(Note.id == number))
        return found

    async with session_scope(database) as session:
        session.add_all(Note(id=number, text=str(number)) for number in range(1, 21))
        assert await asyncio.gather(*map(ask, range(1, 21))) == list(range(1, 21))


async def test_siblings_add_and_flush(database: Database) -> None:
    """`add` is no statement; what one task adds during the flush of another is not lost."""

    async def write(number: int) -> None:
        session = current_session()
        session.add(Note(id=number, text=str(number)))
        await session.flush()

    async with session_scope(database):
        await asyncio.gather(*map(write, range(1, 21)))
    assert texts(database) == [str(number) for number in range(1, 21)]


Ask = Callable[[AsyncSession, Note], Awaitable[list[Line]]]


async def _awaitable_attrs(session: AsyncSession, note: Note) -> list[Line]:
    lines: list[Line] = await note.awaitable_attrs.lines
    return lines


async def _run_sync(session: AsyncSession, note: Note) -> list[Line]:
    return await session.run_sync(
        lambda sync: list(sync.scalars(select(Line).where(Line.note_id == note.id)))
    )


async def _lazy_load(session: AsyncSession, note: Note) -> list[Line]:
    return await session.run_sync(lambda _: note.lines)


async def _refresh(session: AsyncSession, note: Note) -> list[Line]:
    await session.refresh(note, ["lines"])
    return note.lines


@pytest.mark.parametrize("ask", [_awaitable_attrs, _run_sync, _lazy_load, _refresh])
async def test_every_way_to_the_database_queues(database: Database, ask: Ask) -> None:
    """The gate is below all that `AsyncSession` offers, and below the objects themselves."""
    async with session_scope(database) as session:
        session.add_all(Note(id=n, text=str(n), lines=[Line(id=n)]) for n in range(1, 6))
        await session.flush()
        session.expunge_all()
        notes = (await session.scalars(select(Note).order_by(Note.id))).all()
        lines = await asyncio.gather(*(ask(session, note) for note in notes))
        assert [[line.id for line in each] for each in lines] == [[n] for n in range(1, 6)]


class Traced(AsyncSession):
    """A session class of the application."""


class TracedSync(Session):
    """A sync session class of the application."""


async def test_sessions_are_of_the_class_of_the_application(sqlite_url: str) -> None:
    """They are subclasses of it, sync and async, and the gate is below it."""
    with prepared(sqlite_url, session_class=Traced, sync_session_class=TracedSync) as database:
        async with session_scope(database) as session:
            assert isinstance(session, Traced)
            answers = await asyncio.gather(*(session.scalar(select(literal(n))) for n in range(5)))
            assert answers == list(range(5))
        with sync_session_scope(database) as sync:
            assert isinstance(sync, TracedSync)


async def test_sync_class_below_the_async_session_is_kept(sqlite_url: str) -> None:
    """`session_kwargs={"sync_session_class": ...}` is SQLAlchemy's way to name one."""
    with prepared(sqlite_url, session_kwargs={"sync_session_class": TracedSync}) as database:
        async with session_scope(database) as session:
            assert isinstance(session.sync_session, TracedSync)


def test_one_managed_class_for_each_class() -> None:
    assert managed_class(Session) is managed_class(Session)
    assert managed_class(TracedSync) is not managed_class(Session)


async def test_failed_statement_of_one_task_does_not_stop_the_others(sqlite: Database) -> None:
    async with session_scope(sqlite) as session:

        async def ask(number: int) -> Any:
            return await session.scalar(insert(Note) if number == 1 else select(literal(number)))

        answers = await asyncio.gather(*map(ask, range(4)), return_exceptions=True)
        assert isinstance(answers[1], IntegrityError)
        assert [answers[0], *answers[2:]] == [0, 2, 3]


async def test_savepoint_undoes_nothing_of_a_sibling(database: Database) -> None:
    """A sibling waits until the block is left, so what it writes is not part of it."""
    begun = asyncio.Event()

    async def sibling() -> None:
        await begun.wait()
        await current_session().execute(insert(Note).values(text="sibling"))

    async with session_scope(database) as session:
        task = asyncio.create_task(sibling())
        with suppress(ZeroDivisionError):
            async with session.begin_nested():
                session.add(Note(text="own"))
                await session.flush()
                begun.set()
                await asyncio.sleep(0.01)
                raise ZeroDivisionError
        await task
    assert texts(database) == ["sibling"]


async def test_changes_that_a_sibling_makes_during_a_flush_are_not_lost_silently(
    postgres: Database,
) -> None:
    """SQLAlchemy would forget them with a warning; here the transaction is doomed."""
    async with session_scope(postgres) as session:
        session.add_all([Note(id=1, text="one"), Note(id=2, text="two")])

    async def change(note: Note) -> None:
        note.remark = "changed"
        await current_session().flush()

    async def change_both() -> None:
        async with session_scope(postgres) as session:
            first, second = (await session.scalars(select(Note).order_by(Note.id))).all()
            await asyncio.gather(change(first), change(second))

    with pytest.raises(ConcurrentSessionUse, match=r"session_scope\(\)"):
        await change_both()
    assert remarks(postgres) == [None, None]


async def test_listener_that_changes_objects_is_not_taken_for_a_sibling(sqlite: Database) -> None:
    """Alone with its session, code gets SQLAlchemy's own warning and nothing else."""
    async with session_scope(sqlite) as session:
        session.add(other := Note(text="other"))
        await session.flush()

        def touch(*_: object) -> None:
            other.remark = "touched"

        event.listen(Line, "after_insert", touch)
        session.add(Note(text="note", lines=[Line()]))
        try:
            with pytest.warns(match="Attribute history events"):
                await session.flush()
        finally:
            event.remove(Line, "after_insert", touch)


# --- after the end --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "use",
    [
        lambda session: session.execute(select(1)),
        lambda session: session.flush(),
        lambda session: session.commit(),
        lambda session: session.rollback(),
        lambda session: session.get(Note, 1),
        lambda session: session.begin_nested().start(),
        lambda session: session.connection(),
        lambda session: session.run_sync(lambda sync: sync.add(Note(text="late"))),
    ],
    ids=["execute", "flush", "commit", "rollback", "get", "begin_nested", "connection", "add"],
)
async def test_kept_session_refuses_what_comes_after_the_end(
    sqlite: Database, use: Callable[[AsyncSession], Awaitable[Any]]
) -> None:
    """Its connection may serve somebody else by then."""
    async with session_scope(sqlite) as session:
        await session.execute(select(1))
    with pytest.raises(ScopeClosedError, match=r"session_scope\(\)"):
        await use(session)
    await session.close()
    assert_nothing_open(sqlite)


def test_kept_sync_session_refuses_what_comes_after_the_end(sqlite: Database) -> None:
    with sync_session_scope(sqlite) as session:
        pass
    for use in (lambda: session.execute(select(1)), lambda: session.add(Note(text="late"))):
        with pytest.raises(ScopeClosedError):
            use()


# --- commits by code that is not the owner --------------------------------------------------------


class Inner:
    """Other people's code, which ends transactions."""

    async def commit(self, session: AsyncSession) -> None:
        session.add(Note(text="kept"))
        await session.commit()

    async def begin(self, session: AsyncSession) -> None:
        async with session.begin():
            session.add(Note(text="kept"))

    async def commit_and_close(self, session: AsyncSession) -> None:
        async with session:
            session.add(Note(text="kept"))
            await session.commit()

    async def nested(self, session: AsyncSession) -> None:
        async with session.begin_nested():
            session.add(Note(text="kept"))

    async def rolled_back(self, session: AsyncSession) -> None:
        session.add(Note(text="kept"))
        await session.flush()
        await session.rollback()

    async def only_closed(self, session: AsyncSession) -> None:
        async with session:
            session.add(Note(text="kept"))


class InnerSync:
    """The same, sync."""

    def commit(self, session: Session) -> None:
        session.add(Note(text="kept"))
        session.commit()

    def begin(self, session: Session) -> None:
        with session.begin():
            session.add(Note(text="kept"))

    def commit_and_close(self, session: Session) -> None:
        with session:
            session.add(Note(text="kept"))
            session.commit()

    def nested(self, session: Session) -> None:
        with session.begin_nested():
            session.add(Note(text="kept"))

    def rolled_back(self, session: Session) -> None:
        session.add(Note(text="kept"))
        session.flush()
        session.rollback()

    def only_closed(self, session: Session) -> None:
        with session:
            session.add(Note(text="kept"))


RULES = pytest.mark.parametrize(
    ("policy", "inner", "after_success", "after_error"),
    [
        ("defer", "commit", ["kept"], []),
        ("defer", "begin", ["kept"], []),
        ("defer", "commit_and_close", ["kept"], []),
        ("defer", "nested", ["kept"], []),
        ("defer", "rolled_back", [], []),
        ("defer", "only_closed", ["kept"], []),
        ("allow", "commit", ["kept"], ["kept"]),
        ("allow", "begin", ["kept"], ["kept"]),
        ("allow", "commit_and_close", ["kept"], ["kept"]),
        ("allow", "nested", ["kept"], []),
        ("allow", "rolled_back", [], []),
        ("allow", "only_closed", [], []),
        ("forbid", "commit", InnerCommitError, []),
        ("forbid", "begin", InnerCommitError, []),
        ("forbid", "commit_and_close", InnerCommitError, []),
        ("forbid", "nested", ["kept"], []),
        ("forbid", "rolled_back", [], []),
        ("forbid", "only_closed", ["kept"], []),
    ],
)


@RULES
async def test_inner_commits(
    sqlite: Database, policy: InnerCommits, inner: str, after_success: Any, after_error: list[str]
) -> None:
    """What is in the database afterwards, if the owner's block succeeds, and if it fails."""
    code = getattr(Inner(), inner)

    async def work() -> None:
        async with session_scope(sqlite, inner_commits=policy) as session:
            await code(session)
            raise ZeroDivisionError

    with refused() if after_success is InnerCommitError else pytest.raises(ZeroDivisionError):
        await work()
    assert texts(sqlite) == after_error
    if after_success is not InnerCommitError and not after_error:
        async with session_scope(sqlite, inner_commits=policy) as session:
            await code(session)
        assert texts(sqlite) == after_success
    assert_nothing_open(sqlite)


@RULES
def test_inner_commits_of_sync_code(
    sqlite: Database, policy: InnerCommits, inner: str, after_success: Any, after_error: list[str]
) -> None:
    code = getattr(InnerSync(), inner)

    def work() -> None:
        with sync_session_scope(sqlite, inner_commits=policy) as session:
            code(session)
            raise ZeroDivisionError

    with refused() if after_success is InnerCommitError else pytest.raises(ZeroDivisionError):
        work()
    assert texts(sqlite) == after_error
    if after_success is not InnerCommitError and not after_error:
        with sync_session_scope(sqlite, inner_commits=policy) as session:
            code(session)
        assert texts(sqlite) == after_success


def refused() -> Any:
    """An error that says what to write instead."""
    return pytest.raises(InnerCommitError, match=r"flush\(\).*current_scope\(\)\.commit\(\)")


async def test_deferred_commit_is_on_all_databases_undone_by_a_later_error(
    database: Database,
) -> None:
    """The row is there for the code that goes on, and gone with the transaction."""
    with suppress(ZeroDivisionError):
        async with session_scope(database) as session:
            await Inner().commit(session)
            assert (await session.scalars(by_text("kept"))).one()
            raise ZeroDivisionError
    assert texts(database) == []


async def test_begin_block_whose_error_is_caught_is_undone_alone(database: Database) -> None:
    """Deferred, a plain `begin()` is a savepoint."""
    async with session_scope(database) as session:
        session.add(Note(text="before"))
        with suppress(ZeroDivisionError):
            async with session.begin():
                session.add(Note(text="inside"))
                raise ZeroDivisionError
    assert texts(database) == ["before"]
