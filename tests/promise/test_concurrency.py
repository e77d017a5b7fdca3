"""Several tasks in one request share its session, and nothing of them gets into another request.

Statements on one session queue. What is in flight when the request ends is finished, and is a
part of what is committed or rolled back; what comes later is refused, by all that a task may have
kept. An `atomic()` or `begin_nested()` block is for the task that entered it and for those it
starts; the others wait, and so does COMMIT, so that no block is committed by half.

All of it with one pooled connection: whatever a left-over task still does would be a part of the
next request's transaction.

More of this: tests/promise/test_concurrent_changes.py (objects), tests/test_gate.py,
tests/test_blocks.py, tests/test_managed.py, tests/promise/test_sync_side.py (threads),
tests/middleware/test_exchange_tasks.py (who sends the response).
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import nullcontext, suppress
from typing import Any

import anyio
import anyio.from_thread
import anyio.to_thread
import httpx
import pytest
import sqlmodel
from fastapi import HTTPException, Request
from fastapi.responses import JSONResponse
from sqlalchemy import insert, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel.ext.asyncio.session import AsyncSession as SQLModelSession

from repom import (
    Database,
    atomic,
    current_scope,
    current_session,
)
from repom.errors import OpenCursorError, ScopeClosedError, TransactionAbortedError
from tests.middleware.notes import (
    NOTE,
    connections_in_use,
    create_notes,
    notes,
    notes_database,
    write,
)
from tests.promise.tasks import ONE_CONNECTION, Note, app_of, post, wait_in_the_database
from tests.support.asgi import request
from tests.support.polling import until
from tests.support.sockets import serve
from tests.support.statements import sent


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    """An empty table of notes and one connection, on each kind of database."""
    async with notes_database(database_url, engine_kwargs=ONE_CONNECTION) as database:
        yield database


class Hammering:
    """A task that writes again and again, whatever it is told, until the test stops it.

    Attributes:
        told: what it was told to be written.
        refusals: how often it was refused.
    """

    def __init__(self, name: str) -> None:
        self.told: list[str] = []
        self.refusals = 0
        self.task: asyncio.Task[None] | None = None
        self._name = name
        self._is_stopped = False

    def start(self) -> "asyncio.Task[None]":
        self.task = asyncio.create_task(self._run())
        return self.task

    async def _run(self) -> None:
        session = current_session()  # kept for ever
        number = 0
        while not self._is_stopped:
            number += 1
            note = f"{self._name} {number}"
            try:
                await session.execute(insert(NOTE).values(text=note))
            except ScopeClosedError:
                self.refusals += 1
                await asyncio.sleep(0.001)
            else:
                self.told.append(note)

    async def has_written(self, count: int = 2) -> None:
        await until(lambda: len(self.told) >= count)

    async def is_refused(self, count: int = 3) -> None:
        """Wait until it was refused so often from now on."""
        enough = self.refusals + count
        await until(lambda: self.refusals >= enough)

    async def stop(self) -> None:
        self._is_stopped = True
        if self.task is not None:
            await self.task


@pytest.fixture
async def siblings() -> AsyncIterator[list[Hammering]]:
    """Three of them, for a request to start."""
    siblings = [Hammering(f"sibling {number}") for number in range(3)]
    yield siblings
    for sibling in siblings:
        await sibling.stop()


# --- statements: they queue, and are finished or refused when the request ends


def rendered(request: Request, error: Exception) -> JSONResponse:
    return JSONResponse({}, 500)


@pytest.mark.parametrize("how", ["raised", "rendered", "returned"])
async def test_gather_that_fails(
    database: Database, database_url: str, siblings: list[Hammering], how: str
) -> None:
    """One of its tasks fails, the others write on: none of it is left, and nothing of it is in
    the transaction of the next request, on the same connection."""

    async def fail() -> None:
        await siblings[-1].has_written()
        raise LookupError

    async def first() -> Any:
        await write("first")
        try:
            await asyncio.gather(*(sibling.start() for sibling in siblings), fail())
        except LookupError:
            if how != "returned":
                raise
        return JSONResponse({}, 409)

    async def second() -> None:
        await write("second")
        for sibling in siblings:
            await sibling.is_refused()
        await write("third")

    app = app_of(database, first, second)
    if how == "rendered":
        app.add_exception_handler(LookupError, rendered)
    await post(app, "first", 409 if how == "returned" else 500)
    assert notes(database_url) == []
    await post(app, "second")
    assert notes(database_url) == ["second", "third"]


@pytest.mark.parametrize("status", [201, 409])
async def test_siblings_in_flight_when_the_response_is_sent(
    database: Database, database_url: str, siblings: list[Hammering], status: int
) -> None:
    """What they were told to be written is committed with the rest, or is undone with it."""

    async def first() -> Any:
        for sibling in siblings:
            sibling.start()
        await siblings[-1].has_written()
        return JSONResponse({}, status)

    async def second() -> None:
        for sibling in siblings:
            await sibling.is_refused()

    app = app_of(database, first, second)
    await post(app, "first", status)
    told = [note for sibling in siblings for note in sibling.told]
    assert sorted(notes(database_url)) == (sorted(told) if status == 201 else [])
    await post(app, "second")
    assert connections_in_use(database) == 0
    assert told == [note for sibling in siblings for note in sibling.told]


def test_requests_one_after_the_other_over_a_real_server(database_url: str) -> None:
    """uvicorn, one connection, and requests whose tasks are never awaited: each row that a
    client was told of is there, and none of a request that failed."""
    create_notes(database_url)
    left_over: set[asyncio.Task[None]] = set()

    async def create(text: str, fails: bool) -> None:
        async def go_on() -> None:
            for number in range(10_000):
                await write(f"{text} {number}")

        await write(text)
        task = asyncio.create_task(go_on())
        left_over.add(task)
        await asyncio.sleep(0.005)
        if fails:
            raise HTTPException(409)

    database = Database(database_url, engine_kwargs=ONE_CONNECTION)
    with serve(app_of(database, create)) as url, httpx.Client(base_url=url) as client:
        for number in range(20):
            response = client.post(
                "/create", params={"text": str(number), "fails": bool(number % 2)}
            )
            assert response.status_code == (409 if number % 2 else 201)
    written = [note for note in notes(database_url) if " " not in note]
    assert written == [str(number) for number in range(0, 20, 2)]
    assert {note.split()[0] for note in notes(database_url)} == set(written)
    assert {type(task.exception()) for task in left_over} == {ScopeClosedError}


@pytest.mark.parametrize("swallowed", [False, True])
async def test_task_group_that_cancels_a_statement(
    database: Database, database_url: str, swallowed: bool
) -> None:
    """SQLAlchemy throws the connection away in the middle of a statement, and with it all that
    was written before: nobody is told that this is committed."""

    async def first() -> None:
        async def fail() -> None:
            await is_sent.wait()
            raise LookupError

        await write("first")
        try:
            with sent(database.async_engine, "WITH", "SELECT") as is_sent:
                async with asyncio.TaskGroup() as group:
                    group.create_task(wait_in_the_database(database))
                    group.create_task(fail())
        except* LookupError:
            if not swallowed:
                raise

    async def second() -> None:
        await write("second")

    app = app_of(database, first, second)
    error = await post(app, "first", 500)
    assert isinstance(error, TransactionAbortedError if swallowed else BaseExceptionGroup)
    await post(app, "second")
    assert notes(database_url) == ["second"]


async def test_task_group_that_cancels_who_waits_for_a_turn(
    database: Database, database_url: str
) -> None:
    """No statement of it was sent yet, so the rest goes on."""

    async def create() -> None:
        async def fail() -> None:
            await is_sent.wait()
            await asyncio.sleep(0)  # until the other one waits
            raise LookupError

        with sent(database.async_engine, "WITH", "SELECT") as is_sent:
            slow = asyncio.create_task(wait_in_the_database(database))
            await is_sent.wait()
            with suppress(BaseExceptionGroup):
                async with asyncio.TaskGroup() as group:
                    group.create_task(write("cancelled"))
                    group.create_task(fail())
            await write("after")
            await slow

    await post(app_of(database, create), "create")
    assert notes(database_url) == ["after"]


@pytest.mark.parametrize("status", [201, 409])
async def test_siblings_that_open_the_session(
    database: Database, database_url: str, status: int
) -> None:
    """Each of them may be the first: it is one session, one connection, one transaction."""
    sessions: set[AsyncSession] = set()

    async def create() -> Any:
        async def sibling(number: int) -> None:
            session = current_session()
            sessions.add(session)
            session.add(Note(id=number, text=str(number)))
            await session.flush()

        await asyncio.gather(*map(sibling, range(1, 10)))
        return JSONResponse({}, status)

    await post(app_of(database, create), "create", status)
    assert len(sessions) == 1
    assert notes(database_url) == (list("123456789") if status == 201 else [])


class OwnSession(AsyncSession):
    """A session class of an application, with a method that it overrides and one of its own."""

    async def execute(self, *args: Any, **kwargs: Any) -> Any:
        return await super().execute(*args, **kwargs)

    async def names(self) -> list[str]:
        return list(await self.scalars(select(Note.text)))


class OwnSQLModelSession(SQLModelSession):
    async def names(self) -> list[str]:
        return list(await self.exec(sqlmodel.select(Note.text)))


@pytest.mark.parametrize("session_class", [OwnSession, OwnSQLModelSession])
async def test_any_session_class(database_url: str, session_class: type[AsyncSession]) -> None:
    """The gate is below it, so its own methods queue, and are refused, as all others are."""
    left_over: list[asyncio.Task[None]] = []
    others_turn = asyncio.Event()

    async def first() -> None:
        async def ask_later() -> None:
            await others_turn.wait()
            with pytest.raises(ScopeClosedError):
                await session.names()

        assert isinstance(current_session(), session_class)
        session: Any = current_session()  # with a method of its own
        session.add(Note(text="first"))
        assert await asyncio.gather(*(session.names() for _ in range(9))) == [["first"]] * 9
        left_over.append(asyncio.create_task(ask_later()))

    async def second() -> None:
        current_session().add(Note(text="second"))
        await current_session().flush()
        others_turn.set()
        await left_over[0]

    async with notes_database(
        database_url, engine_kwargs=ONE_CONNECTION, session_class=session_class
    ) as database:
        app = app_of(database, first, second)
        await post(app, "first")
        await post(app, "second")
    assert notes(database_url) == ["first", "second"]


# --- what a task has kept, when its request is over


class Kept:
    """All that a task has got hold of in its request, to be used after it."""

    async def take(self) -> None:
        self.session = current_session()
        self.scope = current_scope()
        self.connection = await self.session.connection()
        self.note = Note(text="kept")
        self.session.add(self.note)
        await self.session.flush()
        self.open_savepoint = await self.session.begin_nested()
        self.atomic = atomic()
        await self.atomic.__aenter__()

    def uses(self) -> list[Callable[[], Awaitable[Any]]]:
        session, connection = self.session, self.connection
        statement = insert(NOTE).values(text="left over")
        return [
            self.leave_the_block,
            lambda: session.execute(statement),
            lambda: session.scalar(select(NOTE.c.id)),
            lambda: session.stream(select(NOTE)),
            lambda: session.get(Note, 1),
            lambda: session.merge(Note(id=1, text="left over")),
            lambda: session.refresh(self.note),
            lambda: session.delete(self.note),
            session.flush,
            session.commit,
            session.rollback,
            session.connection,
            session.begin_nested().start,
            session.begin().start,
            lambda: session.run_sync(lambda sync: sync.execute(statement)),
            lambda: session.run_sync(lambda sync: sync.add(Note(text="left over"))),
            lambda: connection.execute(statement),
            lambda: connection.stream(select(NOTE)),
            lambda: connection.exec_driver_sql("DELETE FROM note"),
            connection.begin_nested().start,
            connection.commit,
            connection.rollback,
            self.scope.commit,
            self.ask_for_the_session,
            self.begin_an_atomic_block,
        ]

    async def leave_the_block(self) -> None:
        await self.atomic.__aexit__(None, None, None)

    async def ask_for_the_session(self) -> None:
        current_session()

    async def begin_an_atomic_block(self) -> None:
        async with atomic():  # no scope of its own: the request may have failed
            await current_session().execute(insert(NOTE).values(text="left over"))


@pytest.mark.parametrize("status", [201, 409])
async def test_left_over_task_is_refused_whatever_it_has_kept(
    database: Database, database_url: str, status: int
) -> None:
    """Each use is a `ScopeClosedError`, while the next request works on the same connection."""
    kept = Kept()
    tasks: list[asyncio.Task[None]] = []
    others_turn = asyncio.Event()
    answers: list[Any] = []

    async def go_on() -> None:
        await others_turn.wait()
        for use in kept.uses():
            try:
                answers.append(await use())
            except Exception as error:
                answers.append(error)

    async def first() -> Any:
        await kept.take()
        tasks.append(asyncio.create_task(go_on()))
        return JSONResponse({}, status)

    async def second() -> None:
        await write("second")
        others_turn.set()
        await tasks[0]
        await write("third")

    app = app_of(database, first, second)
    await post(app, "first", status)
    await post(app, "second")
    assert [type(answer) for answer in answers] == [ScopeClosedError] * len(kept.uses())
    await kept.session.close()  # is what everybody may call
    assert notes(database_url) == ["kept"] * (status == 201) + ["second", "third"]
    assert connections_in_use(database) == 0


# --- from threads, and rows that are read bit by bit


@pytest.mark.parametrize("status", [201, 409])
async def test_sync_endpoint_that_calls_back(
    database: Database, database_url: str, status: int
) -> None:
    """Async code that a `def` endpoint runs by `from_thread`, and what that runs in threads of
    its own, is a part of the request."""

    async def side_by_side(*names: str) -> None:
        await asyncio.gather(*map(write, names))

    def in_a_thread(name: str) -> None:
        anyio.from_thread.run(write, name)

    async def in_a_block(name: str) -> None:
        async with atomic():
            await write(name)
            # Started in the block, so a part of it, and does not have to wait for its end.
            await anyio.to_thread.run_sync(in_a_thread, f"{name} child")

    def create() -> Any:
        anyio.from_thread.run(write, "a")
        anyio.from_thread.run(side_by_side, "b", "c")
        anyio.from_thread.run(in_a_block, "d")
        return JSONResponse({}, status)

    await post(app_of(database, create), "create", status)
    expected = ["a", "b", "c", "d", "d child"]
    assert sorted(notes(database_url)) == (expected if status == 201 else [])


async def test_rows_are_read_while_a_sibling_executes(
    database: Database, database_url: str
) -> None:
    """Each fetch of `session.stream()` queues like a statement. MySQL sends the rows of one
    statement at a time, so there the sibling may be refused."""
    many = [f"{number:03}" for number in range(300)]
    told: list[str] = []

    async def create() -> list[str]:
        async def write_on() -> None:
            for number in range(20):
                await write(f"sibling {number}")
                told.append(f"sibling {number}")

        await current_session().execute(insert(NOTE), [{"text": each} for each in many])
        rows = await current_session().stream_scalars(select(NOTE.c.text).order_by(NOTE.c.id))
        writing = asyncio.create_task(write_on())
        read = [each async for each in rows]
        is_mysql = database.url.get_backend_name() == "mysql"
        with suppress(OpenCursorError) if is_mysql else nullcontext():
            await writing
        return read

    response = await request(app_of(database, create), "POST", "/create")
    assert response.json()[:300] == many
    assert notes(database_url) == many + told
