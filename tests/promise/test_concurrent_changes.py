"""Changes of objects by several tasks in one request: none is lost while the client is told 201.

A change is no statement, so it waits for nothing. One that comes while another task's flush is
under way would be forgotten without a word, and so would one that comes while a block of another
task is open which is then rolled back. The first is refused at its place; both doom the
transaction. What can simply wait, or be left to the next flush, is not refused.

More of this: tests/promise/test_concurrency.py (statements), tests/test_lost_changes.py,
tests/promise/test_concurrent_blocks.py; docs/transactions.md, "Several tasks in one request", names
what cannot be noticed.
"""

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest
from sqlalchemy import event, insert, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import selectinload
from sqlalchemy.orm.attributes import flag_modified

from repom import Database, atomic, current_session, current_sync_session
from repom.errors import ConcurrentSessionUse, ScopeClosedError
from repom.middleware import DatabaseSessionMiddleware
from tests.middleware.notes import answer
from tests.promise.tasks import ONE_CONNECTION, app_of, post
from tests.support.asgi import Receive, Scope, Send, request
from tests.support.reader import rows
from tests.support.statements import sent
from tests.support.units import Line, Note, checked_out, prepared, remarks, texts, url_of


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    """Two notes and one connection, on each kind of database."""
    with prepared(database_url, engine_kwargs=ONE_CONNECTION) as database:
        with database.engine.begin() as connection:
            connection.execute(insert(Note), [{"text": "one"}, {"text": "two"}])
        yield database


async def both_notes() -> tuple[Note, Note]:
    notes = select(Note).options(selectinload(Note.lines)).order_by(Note.id)
    first, second = await current_session().scalars(notes)
    return first, second


def lines(database: Database) -> list[int]:
    """The notes of the lines that are committed."""
    return [note for (note,) in rows(url_of(database), "SELECT note_id FROM unit_line")]


Change = Callable[[AsyncSession, Note, Note], object]

#: What would be lost while `first` is flushed.
LOST: dict[str, Change] = {
    "another attribute": lambda session, first, second: setattr(first, "text", "changed"),
    "the same attribute": lambda session, first, second: setattr(first, "remark", "changed"),
    "another object": lambda session, first, second: setattr(second, "remark", "changed"),
    "a collection": lambda session, first, second: first.lines.append(Line()),
    "another collection": lambda session, first, second: second.lines.append(Line()),
    "flag_modified": lambda session, first, second: flag_modified(second, "remark"),
    "expire": lambda session, first, second: session.expire(first),
    "expire_all": lambda session, first, second: session.expire_all(),
}


@pytest.mark.parametrize("change", LOST.values(), ids=LOST)
@pytest.mark.parametrize("swallowed", [False, True])
async def test_change_in_the_middle_of_a_flush(
    database: Database, change: Change, swallowed: bool
) -> None:
    """Who makes it is told so, at its place and with both names. The request fails, also if
    somebody swallows that, and leaves nothing."""
    told: list[ConcurrentSessionUse] = []

    async def create() -> None:
        async def flush() -> None:
            first.remark = "flushed"
            await session.flush()

        async def sibling() -> None:
            await is_sent.wait()
            try:
                change(session, first, second)
            except ConcurrentSessionUse as error:
                told.append(error)
                if not swallowed:
                    raise

        session = current_session()
        first, second = await both_notes()
        with sent(database.async_engine, "UPDATE") as is_sent:
            await asyncio.gather(
                asyncio.create_task(flush(), name="the flush"),
                asyncio.create_task(sibling(), name="the sibling"),
            )

    error = await post(app_of(database, create), "create", 500)
    assert isinstance(error, ConcurrentSessionUse)
    for said in (str(error), str(told[0])):
        assert "'the flush'" in said
        assert "'the sibling'" in said
        assert "session_scope()" in said
    assert remarks(database) == [None, None]
    assert lines(database) == []
    assert checked_out(database) == 0


async def test_change_of_an_object_that_is_being_inserted(database: Database) -> None:
    """Its row is on the way, without the change."""

    async def create() -> None:
        async def sibling() -> None:
            await is_sent.wait()
            new.remark = "changed"

        session = current_session()
        session.add(new := Note(text="three"))
        with sent(database.async_engine, "INSERT") as is_sent:
            await asyncio.gather(session.flush(), sibling())

    error = await post(app_of(database, create), "create", 500)
    assert isinstance(error, ConcurrentSessionUse)
    assert texts(database) == ["one", "two"]


async def _merge(session: AsyncSession, first: Note, second: Note) -> None:
    await session.merge(Note(id=second.id, text="merged"))


async def _execute(session: AsyncSession, first: Note, second: Note) -> None:
    await session.execute(insert(Note).values(text="three"))


#: What is not lost, and so not refused; and the notes that are there in the end.
KEPT: dict[str, tuple[Change, list[str]]] = {
    "add": (
        lambda session, first, second: session.add(Note(text="three")),
        ["one", "two", "three"],
    ),
    "add_all": (
        lambda session, first, second: session.add_all([Note(text="three"), Note(text="four")]),
        ["one", "two", "three", "four"],
    ),
    "a new parent": (
        lambda session, first, second: session.add(Note(text="three", lines=[Line()])),
        ["one", "two", "three"],
    ),
    "delete": (lambda session, first, second: session.delete(second), ["one"]),
    "merge": (_merge, ["one", "merged"]),
    "execute": (_execute, ["one", "two", "three"]),
    "expunge": (lambda session, first, second: session.expunge(first), ["one", "two"]),
    "an attribute of an object that is not added yet": (
        lambda session, first, second: session.add(_changed(Note(text="three"))),
        ["one", "two", "four"],
    ),
}


def _changed(note: Note) -> Note:
    note.text = "four"
    return note


@pytest.mark.parametrize(("change", "expected"), KEPT.values(), ids=KEPT)
async def test_what_can_wait_for_the_flush(
    database: Database, change: Change, expected: list[str]
) -> None:
    """It is written with the next one."""

    async def create() -> None:
        async def flush() -> None:
            first.remark = "flushed"
            await session.flush()

        async def sibling() -> None:
            await is_sent.wait()
            changed = change(session, first, second)
            if asyncio.iscoroutine(changed):
                await changed

        session = current_session()
        first, second = await both_notes()
        with sent(database.async_engine, "UPDATE") as is_sent:
            await asyncio.gather(flush(), sibling())

    await post(app_of(database, create), "create")
    assert texts(database) == expected
    assert remarks(database)[0] == "flushed"


@pytest.mark.parametrize(
    ("names", "is_lost"), [(None, True), (["remark"], True), (["text"], False)]
)
async def test_change_of_what_is_being_refreshed(
    database: Database, names: list[str] | None, is_lost: bool
) -> None:
    """The rows that come would overwrite it; other attributes may be changed."""

    async def create() -> None:
        async def sibling() -> None:
            await is_sent.wait()
            first.remark = "changed"

        session = current_session()
        first, _ = await both_notes()
        with sent(database.async_engine, "SELECT") as is_sent:
            await asyncio.gather(session.refresh(first, names), sibling())

    error = await post(app_of(database, create), "create", 500 if is_lost else 201)
    assert isinstance(error, ConcurrentSessionUse) is is_lost
    assert remarks(database) == [None if is_lost else "changed", None]


async def test_change_in_the_middle_of_the_flush_of_commit(database: Database) -> None:
    """A task that the endpoint has not awaited changes what is just being committed: no client
    is told that its work is there."""
    left_over: list[asyncio.Task[None]] = []

    async def create() -> None:
        async def sibling() -> None:
            with sent(database.async_engine, "UPDATE") as is_sent:
                await is_sent.wait()
                first.text = "changed"

        first, _ = await both_notes()
        first.remark = "committed"
        left_over.append(asyncio.create_task(sibling()))
        await asyncio.sleep(0)

    error = await post(app_of(database, create), "create", 500)
    assert isinstance(error, ConcurrentSessionUse)
    assert isinstance(left_over[0].exception(), ConcurrentSessionUse)
    assert remarks(database) == [None, None]


async def test_change_that_comes_when_the_request_is_over(database: Database) -> None:
    """It is refused as everything of a left-over task is, and hurts nobody."""
    left_over: list[asyncio.Task[None]] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        async def sibling() -> None:
            with sent(database.async_engine, "UPDATE") as is_sent:
                await is_sent.wait()
                first.text = "changed"

        await answer(send, 201)
        first, _ = await both_notes()
        first.remark = "of a background task"
        left_over.append(asyncio.create_task(sibling()))
        await asyncio.sleep(0)

    assert (await request(DatabaseSessionMiddleware(app, database), "POST")).complete
    assert isinstance(left_over[0].exception(), ScopeClosedError)
    assert remarks(database) == ["of a background task", None]
    assert texts(database) == ["one", "two"]


# --- beside a block of another task


BESIDE: dict[str, Change] = {
    "add": lambda session, first, second: session.add(Note(text="beside")),
    "set": lambda session, first, second: setattr(second, "text", "beside"),
    "append": lambda session, first, second: second.lines.append(Line()),
}


@pytest.mark.parametrize("change", BESIDE.values(), ids=BESIDE)
@pytest.mark.parametrize("flushes", [False, True])
@pytest.mark.parametrize("fails", [False, True])
async def test_change_beside_a_block(
    database: Database, change: Change, flushes: bool, fails: bool
) -> None:
    """It becomes a part of the block, with which it is undone. Then the request fails; if the
    block does not, nothing is lost and nothing is refused."""

    async def create() -> None:
        async def block() -> None:
            with suppress(LookupError):
                async with atomic():
                    session.add(Note(text="block"))
                    await session.flush()
                    begun.set()
                    await changed.wait()
                    if fails:
                        raise LookupError

        async def beside() -> None:
            await begun.wait()
            change(session, first, second)
            changed.set()
            if flushes:
                await session.flush()  # waits until the block is left

        session = current_session()
        first, second = await both_notes()
        begun, changed = asyncio.Event(), asyncio.Event()
        await asyncio.gather(block(), beside())

    error = await post(app_of(database, create), "create", 500 if fails else 201)
    assert isinstance(error, ConcurrentSessionUse) is fails
    if fails:
        assert texts(database) == ["one", "two"]
    else:
        assert ("beside" in texts(database)) or lines(database) == [2]
        assert "block" in texts(database)


async def test_object_added_in_the_flush_at_the_beginning_of_a_block(database: Database) -> None:
    """It is not written by that flush, so it is in the savepoint, with which it is undone."""

    async def create() -> None:
        async def block() -> None:
            first.remark = "before the block"
            with suppress(LookupError):
                async with atomic():
                    raise LookupError

        async def beside() -> None:
            await is_sent.wait()
            session.add(Note(text="beside"))

        session = current_session()
        first, _ = await both_notes()
        with sent(database.async_engine, "UPDATE") as is_sent:
            await asyncio.gather(block(), beside())

    error = await post(app_of(database, create), "create", 500)
    assert isinstance(error, ConcurrentSessionUse)
    assert texts(database) == ["one", "two"]


async def test_failed_block_of_one_task_alone(database: Database) -> None:
    """What it has changed itself, by its children and by listeners, is undone and forgotten: that
    is what it is for."""

    def audit(session: Any, *_: Any) -> None:
        session.add(Note(text="audit"))

    async def create() -> None:
        async def child(note: Note) -> None:
            note.remark = "child"
            session.add(Note(text="child"))

        session = current_session()
        first, second = await both_notes()
        first.remark = "before the block"
        event.listen(session.sync_session, "after_flush", audit, once=True)
        with suppress(LookupError):
            async with atomic():
                first.text = "block"
                session.add(Note(text="block"))
                await asyncio.gather(child(second))
                raise LookupError

    await post(app_of(database, create), "create")
    assert texts(database) == ["one", "two"]
    assert remarks(database) == ["before the block", None]


# --- what is no other task


async def test_listener_of_the_flush_may_change_what_is_flushed(database: Database) -> None:
    """It belongs to the flush, whose statement takes the change along."""

    def touch(mapper: Any, connection: Any, note: Note) -> None:
        note.remark = "touched"

    async def create() -> None:
        async def read() -> None:  # a sibling that changes nothing
            await current_session().execute(select(Note.id))

        first, _ = await both_notes()
        first.text = "changed"
        await asyncio.gather(current_session().flush(), read())

    event.listen(Note, "before_update", touch)
    try:
        await post(app_of(database, create), "create")
    finally:
        event.remove(Note, "before_update", touch)
    assert (texts(database)[0], remarks(database)[0]) == ("changed", "touched")


def test_threads_of_a_sync_session(database: Database) -> None:
    """They are siblings like tasks, and are told the same."""

    def create() -> None:
        def change(*_: Any) -> None:
            if not told:
                with pytest.raises(ConcurrentSessionUse) as caught:
                    thread.submit(setattr, first, "text", "changed").result(10)
                told.append(caught.value)

        session = current_sync_session()
        first = session.scalars(select(Note).order_by(Note.id).limit(1)).one()
        first.remark = "flushed"
        event.listen(session.get_bind(), "before_cursor_execute", change)
        try:
            session.flush()
        finally:
            event.remove(session.get_bind(), "before_cursor_execute", change)

    told: list[BaseException] = []
    with ThreadPoolExecutor(1, thread_name_prefix="the sibling") as thread:
        error = asyncio.run(post(app_of(database, create), "create", 500))
    assert isinstance(error, ConcurrentSessionUse)
    assert "'the sibling_0'" in str(told[0])
    assert remarks(database) == [None, None]
