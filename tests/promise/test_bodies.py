"""Bodies of all kinds: what the client has got to the last byte is true, what breaks off is undone.

One rule for every message: before the response starts, and before the message that completes its
body, what is open is committed, or the message does not leave. A body that is read from a cursor
keeps the transaction of its cursor, on every driver and however it is read. An application that
breaks the protocol, or ends in the middle, makes nobody believe what the database does not know.

More of this: tests/middleware/test_exchange_body.py (which message completes a body),
tests/middleware/test_policy.py (Content-Length, what cannot be sent), tests/test_cursors.py,
tests/middleware/test_exchange_tasks.py (responses sent from several tasks, cancelling),
tests/promise/test_layers.py (layers that change or forward a body).
"""

import asyncio
import contextlib
import http.client
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from fastapi import Depends, FastAPI
from sqlalchemy import select, text, update
from sqlalchemy.exc import IntegrityError, ResourceClosedError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from repom import Database, current_session, current_sync_session, session_scope
from repom.async_session import get_async_db_session
from repom.errors import OpenCursorError, ScopeClosedError
from repom.middleware import DatabaseSessionMiddleware
from tests.dialects.drivers import KINDS, Driver, open_driver
from tests.integration.test_servers import serving
from tests.integration.test_sockets import client_of
from tests.middleware.notes import (
    NOTE,
    NOWHERE,
    Sight,
    chunk,
    connections_in_use,
    create_notes,
    notes,
    notes_database,
    start,
    write,
    write_sync,
)
from tests.promise.breaking import BROKEN, WRITE, BreakingApp
from tests.support.asgi import ASGIApp, Message, ProtocolViolation, Receive, Scope, Send
from tests.support.asgi import request as send_request
from tests.support.polling import block_until, until
from tests.support.reader import execute, open_transactions, rows
from tests.support.sockets import serve


class Base(DeclarativeBase):
    pass


class Note(Base):
    __tablename__ = "note"
    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str]


def fill(url: str, count: int, size: int = 5) -> list[str]:
    """Write so many notes into the table; return their texts."""
    texts = [f"{number:05}".ljust(size, ".") for number in range(count)]
    execute(url, "INSERT INTO note (text) VALUES " + ", ".join(f"('{text}')" for text in texts))
    return texts


@pytest.fixture(params=["sqlite_url", "postgres_url"])
def deferring_url(request: pytest.FixtureRequest) -> str:
    """The URL of a database that finds a wrong parent of a note at COMMIT."""
    url: str = request.getfixturevalue(request.param)
    return url


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    """An empty table of notes, on each kind of database."""
    async with notes_database(database_url) as database:
        yield database


@asynccontextmanager
async def driver_of_notes(fixtures: pytest.FixtureRequest, name: str) -> AsyncIterator[Driver]:
    """An empty table of notes, for the driver of that name; its pool has one connection."""
    async with open_driver(fixtures, name) as driver:
        create_notes(driver.url)
        yield driver


def starlette(database: Database, endpoint: Any, *outside: Middleware) -> Starlette:
    """An application of one endpoint, which answers 409 for an `IntegrityError`."""

    def conflict(request: Request, error: Exception) -> Response:
        return JSONResponse({"detail": "conflict"}, 409)

    return Starlette(
        routes=[Route("/", endpoint, methods=["GET", "POST"])],
        middleware=[*outside, Middleware(DatabaseSessionMiddleware, database)],
        exception_handlers={IntegrityError: conflict},
    )


# --- read from a cursor ---------------------------------------------------------------------------

TEXTS = select(NOTE.c.text).order_by(NOTE.c.id)
ENTITIES = select(Note).order_by(Note.id)


async def stream(session: AsyncSession) -> AsyncIterator[str]:
    return (row.text async for row in await session.stream(TEXTS))


async def scalars(session: AsyncSession) -> AsyncIterator[str]:
    return (text async for text in await session.stream_scalars(TEXTS))


async def mappings(session: AsyncSession) -> AsyncIterator[str]:
    return (row["text"] async for row in (await session.stream(TEXTS)).mappings())


async def partitions(session: AsyncSession) -> AsyncIterator[str]:
    parts = (await session.stream(ENTITIES)).scalars().partitions(100)
    return ("".join(note.text for note in part) async for part in parts)


async def yield_per(session: AsyncSession) -> AsyncIterator[str]:
    notes = await session.stream_scalars(ENTITIES.execution_options(yield_per=100))
    return (note.text async for note in notes)


async def yield_per_for_one_call(session: AsyncSession) -> AsyncIterator[str]:
    notes = await session.stream_scalars(ENTITIES, execution_options={"yield_per": 100})
    return (note.text async for note in notes)


async def of_connection(session: AsyncSession) -> AsyncIterator[str]:
    return (row.text async for row in await (await session.connection()).stream(TEXTS))


def sync_stream(session: Session) -> Iterator[str]:
    rows = session.execute(TEXTS, execution_options={"stream_results": True})
    return (row.text for row in rows)


def sync_yield_per(session: Session) -> Iterator[str]:
    notes = session.scalars(ENTITIES.execution_options(yield_per=100))
    return (note.text for note in notes)


def sync_partitions(session: Session) -> Iterator[str]:
    rows = session.execute(TEXTS.execution_options(yield_per=100))
    return ("".join(row.text for row in part) for part in rows.partitions())


def sync_of_connection(session: Session) -> Iterator[str]:
    connection = session.connection().execution_options(yield_per=100)
    return (row.text for row in connection.execute(TEXTS))


#: Each way to read in the loop on each async driver, each way in a thread on each sync one.
WAYS = [
    pytest.param(name, way, id=f"{name}-{way.__name__}")
    for name, kind in KINDS.items()
    for way in (
        [stream, scalars, mappings, partitions, yield_per, yield_per_for_one_call, of_connection]
        if kind.is_async
        else [sync_stream, sync_yield_per, sync_partitions, sync_of_connection]
    )
]


def exporting(driver: Driver, way: Callable[[Any], Any], body: Callable[[Any], Any]) -> ASGIApp:
    """An application that writes a note, and then answers with `body` of all notes, read in that
    way."""

    async def endpoint(request: Request) -> Response:
        await write("new")
        return StreamingResponse(body(await way(current_session())))

    def endpoint_in_thread(request: Request) -> Response:
        write_sync("new")
        return StreamingResponse(body(way(current_sync_session())))

    return starlette(driver.database, endpoint if driver.is_async else endpoint_in_thread)


def pool_of(driver: Driver) -> Any:
    database = driver.database
    return (database.async_engine if driver.is_async else database.engine).pool


@pytest.mark.parametrize(("name", "way"), WAYS)
async def test_transaction_lives_until_its_cursor_was_read(
    request: pytest.FixtureRequest, name: str, way: Callable[[Any], Any]
) -> None:
    """All rows arrive; what was written before them is committed with the last message, and not
    with the start. Then the connection is back in its pool."""
    async with driver_of_notes(request, name) as driver:
        texts = [*fill(driver.url, 500), "new"]
        told: list[bool] = []
        in_use: list[int] = []

        def look(message: Message) -> None:
            in_use.append(pool_of(driver).checkedout())
            if not message.get("body"):
                told.append("new" in notes(driver.url))

        app = exporting(driver, way, lambda texts: texts)
        answer = await send_request(app, "POST", on_message=look)
        assert (answer.complete, answer.exception) == (True, None)
        assert answer.body.decode() == "".join(texts)
        assert told == [False, True]
        assert (set(in_use[:-1]), in_use[-1]) == ({1}, 0)


async def objects_while_exporting(driver: Driver, way: Callable[[Any], Any]) -> int:
    """How many more objects than before are alive at the same time."""
    before = most = 0

    async def body(texts: AsyncIterator[str]) -> AsyncIterator[bytes]:
        nonlocal before, most
        before = most = sys.getallocatedblocks()
        async for _ in texts:
            most = max(most, sys.getallocatedblocks())
        yield b"."

    def body_in_a_thread(texts: Iterator[str]) -> Iterator[bytes]:
        nonlocal before, most
        before = most = sys.getallocatedblocks()
        for _ in texts:
            most = max(most, sys.getallocatedblocks())
        yield b"."

    app = exporting(driver, way, body if driver.is_async else body_in_a_thread)
    for _ in range(2):  # what is made once and cached does not count
        assert (await send_request(app, "GET")).complete
        execute(driver.url, "DELETE FROM note WHERE text = 'new'")
    return most - before


LAZY = (stream, partitions, yield_per, sync_stream, sync_yield_per)


@pytest.mark.parametrize(("name", "way"), [case for case in WAYS if case.values[1] in LAZY])
async def test_rows_are_fetched_while_they_are_sent(
    request: pytest.FixtureRequest, name: str, way: Callable[[Any], Any]
) -> None:
    """However many there are, only some of them are in memory at the same time."""
    async with driver_of_notes(request, name) as driver:
        fill(driver.url, 3000)
        assert await objects_while_exporting(driver, way) < 3000


async def without_yield_per(session: AsyncSession) -> AsyncIterator[str]:
    return (note.text async for note in await session.stream_scalars(ENTITIES))


async def test_orm_fetches_all_rows_at_once_if_nobody_says_how_many(
    request: pytest.FixtureRequest,
) -> None:
    """SQLAlchemy does, and so the docs say to write `yield_per`."""
    async with driver_of_notes(request, "aiosqlite") as driver:
        fill(driver.url, 3000)
        assert await objects_while_exporting(driver, without_yield_per) > 3000


@pytest.mark.parametrize("name", ["asyncpg", "psycopg"])
async def test_rows_are_not_computed_before_they_are_sent(
    request: pytest.FixtureRequest, name: str
) -> None:
    """The server's cursor stands still while the client reads."""
    numbers = text("SELECT nextval('number') FROM generate_series(1, 5000)")
    computed: list[int] = []

    async def endpoint(request: Request) -> Response:
        return StreamingResponse(
            str(row[0]) async for row in await current_session().stream(numbers)
        )

    async with driver_of_notes(request, name) as driver:
        execute(driver.url, "CREATE SEQUENCE number")

        def look(message: Message) -> None:
            if len(computed) < 2:  # a sequence is outside of transactions
                computed.append(rows(driver.url, "SELECT last_value FROM number")[0][0])

        answer = await send_request(starlette(driver.database, endpoint), on_message=look)
        assert computed[1] < 100
        assert answer.body.endswith(b"5000")


class Kept:
    """Where an application may keep a result until it is read."""

    async def in_a_generator(self, rows: Any) -> AsyncIterator[str]:
        async for row in rows:
            yield row.text

    def in_a_closure(self, rows: Any) -> AsyncIterator[str]:
        async def body() -> AsyncIterator[str]:
            while row := await rows.fetchone():
                yield row.text

        return body()

    def in_an_iterator(self, rows: Any) -> AsyncIterator[str]:
        class Texts:
            def __init__(self) -> None:
                self.rows = rows

            def __aiter__(self) -> "Texts":
                return self

            async def __anext__(self) -> str:
                text: str = (await anext(self.rows)).text
                return text

        return Texts()

    def in_a_task(self, rows: Any) -> AsyncIterator[str]:
        async def produce() -> None:
            async for row in rows:
                await queue.put(row.text)
            await queue.put(None)

        async def body() -> AsyncIterator[str]:
            producing = asyncio.create_task(produce())
            while text := await queue.get():
                yield text
            await producing

        queue: asyncio.Queue[str | None] = asyncio.Queue(maxsize=10)
        return body()


@pytest.mark.parametrize("keep", ["in_a_generator", "in_a_closure", "in_an_iterator", "in_a_task"])
async def test_wherever_the_result_is_kept(
    database: Database, database_url: str, keep: str
) -> None:
    """Its transaction stays open as long as somebody may read it; below a layer with a task of
    its own, too."""
    texts = fill(database_url, 20)
    sight = Sight(database, database_url)

    async def endpoint(request: Request) -> Response:
        await write("new")
        return StreamingResponse(getattr(Kept(), keep)(await current_session().stream(TEXTS)))

    answer = await send_request(starlette(database, endpoint), "POST", on_message=sight)
    assert (answer.complete, answer.exception) == (True, None)
    assert answer.body.decode() == "".join([*texts, "new"])
    told = [("new" in committed, in_use) for _, committed, in_use in sight.seen]
    assert told == [(False, 1)] * 22 + [(True, 0)]


async def test_cursor_that_is_opened_in_the_body(database: Database, database_url: str) -> None:
    """What it reads and what was written with it is one transaction, which the last message of
    the body waits for."""
    texts = fill(database_url, 20)
    sight = Sight(database, database_url)

    async def body() -> AsyncIterator[str]:
        await write("new")
        async for each in await stream(current_session()):
            yield each

    async def endpoint(request: Request) -> Response:
        return StreamingResponse(body())

    answer = await send_request(starlette(database, endpoint), "POST", on_message=sight)
    assert answer.body.decode() == "".join([*texts, "new"])
    told = [("new" in committed, in_use) for _, committed, in_use in sight.seen]
    assert told == [(False, 0)] + [(False, 1)] * 21 + [(True, 0)]


@pytest.mark.parametrize("name", KINDS)
async def test_body_that_stops_reading(request: pytest.FixtureRequest, name: str) -> None:
    """The rows that it leaves in the database hinder neither COMMIT nor the next request."""
    kept: list[Any] = []

    def some(texts: Any) -> list[str]:
        kept.append(texts)
        return [next(texts)]

    async def some_of_async(texts: Any) -> AsyncIterator[str]:
        kept.append(texts)
        yield await anext(texts)

    async with driver_of_notes(request, name) as driver:
        fill(driver.url, 2000)
        app = exporting(
            driver,
            stream if driver.is_async else sync_stream,
            some_of_async if driver.is_async else some,
        )
        answer = await send_request(app, "POST")
        assert (answer.complete, answer.body, answer.exception) == (True, b"00000", None)
        assert notes(driver.url)[-1] == "new"
        assert pool_of(driver).checkedout() == 0
        execute(driver.url, "DELETE FROM note WHERE text = 'new'")
        assert (await send_request(app, "POST")).body == b"00000"
        with pytest.raises((ResourceClosedError, ScopeClosedError)):
            [each async for each in kept[0]] if driver.is_async else list(kept[0])


@pytest.mark.parametrize("name", KINDS)
async def test_statement_in_the_middle_of_a_stream(
    request: pytest.FixtureRequest, name: str
) -> None:
    """It is executed, and the stream goes on; or, on MySQL, it is refused and the body breaks
    off. A complete response never has fewer rows than there are."""

    async def body(texts: AsyncIterator[str]) -> AsyncIterator[str]:
        async for each in texts:
            yield each
            await current_session().execute(select(NOTE.c.id).where(NOTE.c.text == each))

    def body_in_a_thread(texts: Iterator[str]) -> Iterator[str]:
        for each in texts:
            yield each
            current_sync_session().execute(select(NOTE.c.id).where(NOTE.c.text == each))

    async with driver_of_notes(request, name) as driver:
        texts = [*fill(driver.url, 300), "new"]
        way: Any = stream if driver.is_async else sync_stream
        app = exporting(driver, way, body if driver.is_async else body_in_a_thread)
        answer = await send_request(app, "POST")
        if KINDS[name].fixture == "mysql_url":
            assert isinstance(answer.exception, OpenCursorError)
            assert (answer.complete, answer.body) == (False, b"00000")
            assert "new" not in notes(driver.url)
        else:
            assert (answer.complete, answer.exception) == (True, None)
            assert answer.body.decode() == "".join(texts)
        assert pool_of(driver).checkedout() == 0


async def test_rows_of_a_thread_are_never_those_of_another_request(
    database: Database, database_url: str
) -> None:
    """A result of `current_sync_session()` that is read in the body is read in its own
    transaction: SQLite fetches it row by row whatever the options, and on a connection that was
    back in the pool it would see what another request may yet roll back."""
    texts = fill(database_url, 99)
    changed, go_on = threading.Event(), threading.Event()

    def export(request: Request) -> Response:
        rows = current_sync_session().execute(TEXTS)
        return StreamingResponse(f"{row.text} " for row in rows)

    def change(request: Request) -> Response:
        current_sync_session().execute(update(NOTE).values(parent=1, text=NOTE.c.text + "?"))
        changed.set()
        assert go_on.wait(10)
        return Response(status_code=404)

    async def look(message: Message) -> None:
        if len(sent) == 3:
            changing.append(asyncio.create_task(send_request(changing_app, "POST")))
            await until(changed.is_set)
        sent.append(message)

    sent: list[Message] = []
    changing: list[asyncio.Task[Any]] = []
    changing_app = starlette(database, change)
    answer = await send_request(starlette(database, export), on_message=look)
    go_on.set()
    assert answer.body.decode().split() == texts
    assert (await changing[0]).status == 404


# --- complete before the last message of the application ------------------------------------------

BODILESS: dict[str, tuple[str, Message]] = {
    "HEAD": ("HEAD", start(200, (b"content-length", b"999"))),
    "204": ("POST", start(204)),
    "304": ("POST", start(304, (b"content-length", b"999"))),
    "Content-Length 0": ("POST", start(200, (b"content-length", b"0"))),
}


@pytest.mark.parametrize("kind", BODILESS)
async def test_response_without_a_body_waits_for_the_cursor(
    database: Database, database_url: str, kind: str
) -> None:
    """The client has all of it when it starts; so it starts when the application has read what
    it reads for the body that is not sent, and after COMMIT."""
    texts = fill(database_url, 99)
    method, begin = BODILESS[kind]
    sight = Sight(database, database_url)
    read: list[str] = []

    async def respond(scope: Scope, receive: Receive, send: Send) -> None:
        await write("new")
        rows = await current_session().stream(TEXTS)
        await send(begin)
        async for row in rows:
            read.append(row.text)
            await send(chunk(more=True))
        await send(chunk())

    app = DatabaseSessionMiddleware(respond, database)
    answer = await send_request(app, method, on_message=sight)
    assert (answer.status, answer.complete, answer.exception) == (begin["status"], True, None)
    assert read == [*texts, "new"]
    assert [("new" in committed, in_use) for _, committed, in_use in sight.seen] == [(True, 0)] * 2


async def test_head_of_an_export_whose_commit_fails(deferring_url: str) -> None:
    """Starlette answers HEAD as it answers GET, and produces the body; the status that the client
    gets is that of the COMMIT at its end."""

    async def endpoint(request: Request) -> Response:
        await write("a", parent=NOWHERE)
        return StreamingResponse(await stream(current_session()))

    async with notes_database(deferring_url) as database:
        app = starlette(database, endpoint)
        answer = await send_request(app, "HEAD", drop_head_body=True)
        assert (answer.status, answer.complete, answer.exception) == (409, True, None)
        assert notes(deferring_url) == []
        answer = await send_request(app, "GET")
        assert (answer.status, answer.body, answer.complete) == (200, b"a", False)
        assert notes(deferring_url) == []
        assert connections_in_use(database) == 0


@pytest.mark.parametrize("parent", [None, NOWHERE], ids=["", "COMMIT fails"])
async def test_content_length_is_reached_before_the_end_of_the_cursor(
    deferring_url: str, parent: int | None
) -> None:
    """The chunk that makes the body complete for the client is the last but one of Starlette's,
    and nobody has asked the cursor yet whether there are more rows."""
    seen: list[tuple[bytes, list[str]]] = []

    async def endpoint(request: Request) -> Response:
        await write("new", parent)
        texts = await stream(current_session())
        return StreamingResponse(texts, headers={"content-length": "8"})

    async with notes_database(deferring_url) as database:
        execute(deferring_url, "INSERT INTO note (text) VALUES ('old 1')")
        answer = await send_request(
            starlette(database, endpoint),
            "POST",
            on_message=lambda message: seen.append(
                (message.get("body", b""), notes(deferring_url))
            ),
        )
        assert connections_in_use(database) == 0
    if parent is None:
        assert (answer.complete, answer.exception) == (True, None)
        assert seen[2:] == [(b"new", ["old 1", "new"]), (b"", ["old 1", "new"])]
    else:
        assert (answer.complete, answer.body) == (False, b"old 1")
        assert isinstance(answer.exception, IntegrityError)
        assert notes(deferring_url) == ["old 1"]


# --- an application that breaks the protocol, or ends in the middle -------------------------------


@pytest.mark.parametrize("name", BROKEN)
async def test_application_that_breaks_the_protocol(
    database: Database, database_url: str, name: str
) -> None:
    """What is told is true, what was open is rolled back, the connection is back, an error leaves,
    and the next request is served as if nothing had been."""
    broken = BROKEN[name]
    app = DatabaseSessionMiddleware(BreakingApp(), database)
    wire: list[Message] = []
    error: BaseException | None
    complete = False
    try:
        answer = await send_request(app, "POST", f"/{name}", on_message=wire.append)
        error, complete = answer.exception, answer.complete
    except ProtocolViolation as violation:
        error = violation
    assert (wire[0]["status"] if wire else None) == broken.told
    assert notes(database_url) == [f"{name} {note}" for note in broken.committed]
    assert connections_in_use(database) == 0
    assert complete is broken.complete
    assert (error is None) is (name in ("nothing", "start-alone", "returns-in-body"))

    async def endpoint(request: Request) -> Response:
        await write("next")
        return Response(status_code=201)

    assert (await send_request(starlette(database, endpoint), "POST")).status == 201
    assert notes(database_url)[-1] == "next"


@pytest.mark.parametrize("name", BROKEN)
async def test_application_that_swallows_what_it_is_told_of_the_protocol(
    sqlite_url: str, name: str
) -> None:
    """It goes on, and still nothing false is told."""
    wire: list[Message] = []
    async with notes_database(sqlite_url) as database:
        app = DatabaseSessionMiddleware(BreakingApp(swallows=True), database)
        with contextlib.suppress(ProtocolViolation):
            await send_request(app, "POST", f"/{name}", on_message=wire.append)
        assert connections_in_use(database) == 0
    status = wire[0]["status"] if wire else None
    if status is None or status >= 400:
        assert notes(sqlite_url) == []
    else:
        assert f"{name} before" in notes(sqlite_url)
        if wire[-1] == chunk():
            assert len(notes(sqlite_url)) == 1 + (WRITE in BROKEN[name].steps)


# Not Daphne, which leaves the connection open whenever something is wrong.
@pytest.mark.parametrize(
    "server", ["uvicorn-h11-asyncio", "uvicorn-httptools-uvloop", "hypercorn-asyncio", "granian"]
)
def test_server_of_applications_that_break_the_protocol(server: str, sqlite_url: str) -> None:
    """On every server a client gets no error for what is committed, and no whole response for
    what is not. Some send the start of a response only with the first of its body, and answer
    with an error if that does not come; some check headers and Content-Length, some do not."""
    told: dict[str, tuple[int | None, bool]] = {}
    with serving(server, sqlite_url) as (base_url, _):
        for name in BROKEN:
            with client_of(base_url) as client:
                told[name] = ask_for(client, f"/broken-apps/{name}")
    committed = notes(sqlite_url)
    for name, (status, complete) in told.items():
        rows = [f"{name} {note}" for note in BROKEN[name].committed]
        assert [text for text in committed if text.startswith(f"{name} ")] == rows
        if status is not None and status >= 400:
            assert not rows, (name, told[name])
        elif complete:
            assert rows, (name, told[name])
    assert told["body-after-end"] == (200, True)
    assert told["raises-after-start"] == told["too-short"] == (200, False)


def ask_for(client: http.client.HTTPConnection, path: str) -> tuple[int | None, bool]:
    """The status that a client gets, and whether it gets the whole response."""
    client.request("POST", path)
    try:
        response = client.getresponse()
    except (OSError, http.client.HTTPException):
        return None, False
    try:
        response.read()
    except (OSError, http.client.HTTPException):
        return response.status, False
    return response.status, True


@pytest.mark.parametrize(
    ("work", "told", "committed"),
    [
        ("written", (200, False), ["a"]),
        ("none", (500, True), []),
        ("read from a cursor", (500, True), []),
    ],
    ids=["written", "none", "read from a cursor"],
)
async def test_layer_that_keeps_the_start_until_the_body_begins(
    database: Database,
    database_url: str,
    work: str,
    told: tuple[int, bool],
    committed: list[str],
) -> None:
    """Starlette's GZip does, around all else, and for a body that fails at once its caller answers
    with an error then. Not if something is committed: the start that tells of that leaves."""

    async def body(texts: AsyncIterator[str] | None) -> AsyncIterator[str]:
        raise LookupError
        yield ""

    async def endpoint(request: Request) -> Response:
        if work != "none":
            await write("a")
        cursor = work == "read from a cursor"
        return StreamingResponse(body(await stream(current_session()) if cursor else None))

    app = starlette(database, endpoint, Middleware(GZipMiddleware))
    answer = await send_request(app, "POST")
    assert isinstance(answer.exception, LookupError)
    assert (answer.status, answer.complete) == told
    assert notes(database_url) == committed


# --- a body that breaks off, seen by a client -----------------------------------------------------


def breaking_off(url: str, length: str | None) -> Starlette:
    """An application whose body writes and then raises, with a Content-Length or in chunks."""

    async def endpoint(request: Request) -> Response:
        async def body() -> AsyncIterator[bytes]:
            yield b"first"
            await write("in the body")
            yield b"second"
            raise LookupError

        await write("before")
        return StreamingResponse(body(), headers={"content-length": length} if length else None)

    return starlette(Database(url), endpoint)


@pytest.mark.parametrize("protocol", ["h11", "httptools"])
@pytest.mark.parametrize("length", [None, "100"], ids=["chunked", "Content-Length"])
def test_client_sees_that_a_body_broke_off(
    database_url: str, protocol: str, length: str | None
) -> None:
    """A real client gets an error instead of a body that looks complete."""
    create_notes(database_url)
    app = breaking_off(database_url, length)
    with serve(app, http=protocol) as base_url, client_of(base_url) as client:
        client.request("POST", "/")
        response = client.getresponse()
        assert response.status == 200
        with pytest.raises(http.client.IncompleteRead) as caught:
            response.read()
    assert caught.value.partial in (b"first", b"firstsecond")
    assert notes(database_url) == ["before"]


@pytest.mark.parametrize("kind", ["async", "sync"])
def test_client_that_leaves_in_the_middle_of_an_export(database_url: str, kind: str) -> None:
    """However slow it was before: its transaction ends, with what it has written, and its
    connection is used by the next."""
    create_notes(database_url)
    fill(database_url, 2000, 100)
    database = Database(database_url, engine_kwargs={"pool_size": 1, "max_overflow": 0})

    async def in_the_loop(request: Request) -> Response:
        async def body(texts: AsyncIterator[str]) -> AsyncIterator[str]:
            async for each in texts:
                yield each * 1000
                await asyncio.sleep(0)  # or nobody could notice that the client is gone

        await write("new")
        return StreamingResponse(body(await stream(current_session())))

    def in_a_thread(request: Request) -> Response:
        write_sync("new")
        texts = sync_stream(current_sync_session())
        return StreamingResponse(each * 1000 for each in texts)

    app = starlette(database, in_the_loop if kind == "async" else in_a_thread)
    with serve(app) as base_url:
        for _ in range(2):
            with client_of(base_url) as client:
                client.request("POST", "/")
                response = client.getresponse()
                assert response.read(5) == b"00000"
                if not database.is_sqlite:
                    assert open_transactions(database_url) == 1
        if not database.is_sqlite:
            block_until(lambda: open_transactions(database_url) == 0)
        # On SQLite this waits until the write lock is given back.
        execute(database_url, "INSERT INTO note (text) VALUES ('next')")
    assert notes(database_url)[2000:] == ["next"]


# --- a body that has no end -----------------------------------------------------------------------


def events_of(database: Database, own: bool) -> Starlette:
    """Server-sent events of new notes, each read in a transaction of its own, or all in that of
    the request."""

    async def new_notes(after: int) -> list[Any]:
        query = select(NOTE.c.id, NOTE.c.text).where(NOTE.c.id > after).order_by(NOTE.c.id)
        return list(await current_session().execute(query))

    async def endpoint(request: Request) -> Response:
        async def body() -> AsyncIterator[str]:
            last = 0
            while True:
                async with session_scope(database) if own else contextlib.nullcontext():
                    found = await new_notes(last)
                for note in found:
                    last = note.id
                    yield f"data: {note.text}\n\n"
                await asyncio.sleep(0.005)

        return StreamingResponse(body(), media_type="text/event-stream")

    return starlette(database, endpoint)


@pytest.mark.parametrize("own", [True, False], ids=["a scope for each event", "of the request"])
def test_server_sent_events(database_url: str, own: bool) -> None:
    """With a scope for each look at the database every event sees what was committed before it,
    and nothing is open between them; in the request's one transaction PostgreSQL shows new rows,
    and the others those of its begin. When the client leaves, either is over."""
    create_notes(database_url)
    execute(database_url, "INSERT INTO note (text) VALUES ('first')")
    database = Database(database_url)
    with serve(events_of(database, own)) as base_url:
        with client_of(base_url) as client:
            client.request("GET", "/")
            response = client.getresponse()
            assert response.readline() == b"data: first\n"
            execute(database_url, "INSERT INTO note (text) VALUES ('second')")
            if own or database.url.get_backend_name() == "postgresql":
                assert response.readline() == b"\n"
                assert response.readline() == b"data: second\n"
            if not database.is_sqlite:
                block_until(lambda: open_transactions(database_url) == (0 if own else 1))
        if not database.is_sqlite:
            block_until(lambda: open_transactions(database_url) == 0)


# --- a client that is gone, an application that does not mind -------------------------------------


async def lets_it_pass(send: Send) -> None:
    await send(chunk(b"2", more=True))
    await write("after")
    await send(chunk())


async def gives_up(send: Send) -> None:
    with contextlib.suppress(OSError, asyncio.CancelledError):
        await lets_it_pass(send)


async def goes_on(send: Send) -> None:
    with contextlib.suppress(OSError, asyncio.CancelledError):
        await send(chunk(b"2", more=True))
    await write("after")
    with contextlib.suppress(OSError):
        await send(chunk())


@pytest.mark.parametrize("how", ["client", "cancelled"])
@pytest.mark.parametrize(
    ("react", "committed"),
    [
        (lets_it_pass, ["before"]),
        (gives_up, ["before"]),
        (goes_on, ["before", "in the body", "after"]),
    ],
    ids=["lets it pass", "gives up", "goes on"],
)
async def test_body_that_is_interrupted(
    database: Database,
    database_url: str,
    how: str,
    react: Callable[[Send], Awaitable[None]],
    committed: list[str],
) -> None:
    """By a client that is gone, or a cancellation: what the body has written is undone, unless it
    swallows that and goes on to its last message, which is as good as any."""
    in_the_body = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await write("before")
        await send(start())
        await write("in the body")
        await send(chunk(b"1", more=True))
        if how == "cancelled":
            in_the_body.set()
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                if react is lets_it_pass:
                    raise
                if react is gives_up:
                    return
        await react(send)

    managed = DatabaseSessionMiddleware(app, database)
    gone = 2 if how == "client" else None
    task = asyncio.create_task(send_request(managed, "POST", disconnect_after=gone))
    if how == "cancelled":
        await in_the_body.wait()
        task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    assert notes(database_url) == committed
    assert connections_in_use(database) == 0


# --- written in the body --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["async", "sync"])
async def test_what_a_generator_writes(database: Database, database_url: str, kind: str) -> None:
    """Between its chunks and after its last one: committed before the message that ends the body,
    which Starlette sends when the generator is at its end. A background task comes after that."""
    told: list[list[str]] = []

    async def body() -> AsyncIterator[bytes]:
        for number in range(3):
            await write(f"{number}")
            yield b"x"
        await write("after the last")

    def body_in_a_thread() -> Iterator[bytes]:
        for number in range(3):
            write_sync(f"{number}")
            yield b"x"
        write_sync("after the last")

    async def endpoint(request: Request) -> Response:
        content: Any = body() if kind == "async" else body_in_a_thread()
        task = BackgroundTask(write if kind == "async" else write_sync, "in the background")
        return StreamingResponse(content, background=task)

    def look(message: Message) -> None:
        told.append(notes(database_url))

    answer = await send_request(starlette(database, endpoint), "POST", on_message=look)
    assert (answer.body, answer.complete, answer.exception) == (b"xxx", True, None)
    written = ["0", "1", "2", "after the last"]
    assert told == [[]] * 4 + [written]
    assert notes(database_url) == [*written, "in the background"]


def generating(database: Database, *, fails: bool) -> FastAPI:
    """An application of endpoints that are generators."""

    async def write_some() -> AsyncIterator[str]:
        for number in range(3):
            await write(f"{number}")
            yield f"{number}"
        if fails:
            raise LookupError

    def write_some_in_a_thread() -> Iterator[str]:
        for number in range(3):
            write_sync(f"{number}")
            yield f"{number}"
        if fails:
            raise LookupError

    sse = pytest.importorskip("fastapi.sse")
    app = FastAPI()
    app.add_middleware(DatabaseSessionMiddleware, database)
    app.post("/lines")(write_some)
    app.post("/lines-in-a-thread")(write_some_in_a_thread)
    app.post("/chunks", response_class=StreamingResponse)(write_some)
    app.post("/events", response_class=sse.EventSourceResponse)(write_some)
    return app


@pytest.mark.parametrize("fails", [False, True], ids=["", "fails"])
@pytest.mark.parametrize("path", ["/lines", "/lines-in-a-thread", "/chunks", "/events"])
async def test_endpoint_that_is_a_generator(
    database: Database, database_url: str, path: str, fails: bool
) -> None:
    """FastAPI's, one of which runs it in a task of its own: what it writes is committed before
    the message that ends the body, or it breaks off, and nothing of it stays."""
    told: list[list[str]] = []
    answer = await send_request(
        generating(database, fails=fails),
        "POST",
        path,
        on_message=lambda _: told.append(notes(database_url)),
    )
    assert (answer.status, answer.complete) == (200, not fails)
    assert (answer.exception is not None) is fails
    written = [] if fails else ["0", "1", "2"]
    assert (told[0], told[-1]) == ([], written)
    assert notes(database_url) == written
    assert connections_in_use(database) == 0


@pytest.mark.parametrize("scope", ["function", "request"])
async def test_stream_of_a_dependency(
    database: Database, database_url: str, scope: Literal["function", "request"]
) -> None:
    """FastAPI leaves the dependency before the response, or after it; the cursor of its session is
    read to its end either way."""
    app = FastAPI()
    app.add_middleware(DatabaseSessionMiddleware, database)

    @app.post("/")
    async def export(
        session: Annotated[AsyncSession, Depends(get_async_db_session, scope=scope)],
    ) -> StreamingResponse:
        await write("new")
        return StreamingResponse(await stream(session))

    texts = fill(database_url, 1000)
    answer = await send_request(app, "POST")
    assert (answer.complete, answer.exception) == (True, None)
    assert answer.body.decode() == "".join([*texts, "new"])
    assert "new" in notes(database_url)


# --- files, and messages of extensions ------------------------------------------------------------


@pytest.mark.parametrize("pathsend", [False, True], ids=["", "pathsend"])
@pytest.mark.parametrize(
    ("method", "headers", "status", "body"),
    [
        ("GET", {}, 200, b"0123456789" * 10000),
        ("HEAD", {}, 200, b""),
        ("GET", {"range": "bytes=2-4"}, 206, b"234"),
        ("GET", {"range": "bytes=999999-"}, 416, b""),
    ],
    ids=["GET", "HEAD", "206", "416"],
)
async def test_file_response(
    database: Database,
    database_url: str,
    tmp_path: Path,
    pathsend: bool,
    method: str,
    headers: dict[str, str],
    status: int,
    body: bytes,
) -> None:
    """A file is sent by the server or in chunks, whole or in part: after COMMIT."""
    file = tmp_path / "file"
    file.write_bytes(b"0123456789" * 10000)
    sight = Sight(database, database_url)

    async def endpoint(request: Request) -> Response:
        await write("a")
        return FileResponse(file)

    answer = await send_request(
        starlette(database, endpoint),
        method,
        headers=headers,
        extensions=["http.response.pathsend"] if pathsend else [],
        on_message=sight,
    )
    assert (answer.status, answer.complete, answer.exception) == (status, True, None)
    assert status == 416 or answer.body == body
    told = ["a"] if status < 400 else []
    assert {(tuple(rows), in_use) for _, rows, in_use in sight.seen} == {(tuple(told), 0)}
    assert ("pathsend" in sight.seen[-1][0]) is (pathsend and (method, status) == ("GET", 200))


async def test_file_that_is_missing(database: Database, database_url: str, tmp_path: Path) -> None:
    """It is an error, which nothing is committed for."""

    async def endpoint(request: Request) -> Response:
        await write("a")
        return FileResponse(tmp_path / "missing")

    answer = await send_request(starlette(database, endpoint), "POST")
    assert (answer.status, notes(database_url)) == (500, [])
    assert isinstance(answer.exception, RuntimeError)


async def test_messages_of_extensions_pass_through(
    database: Database, database_url: str, tmp_path: Path
) -> None:
    """Each as it is and in its place, before, in and after the body, with work in between."""
    path = tmp_path / "file"
    path.write_bytes(b"0123456789")
    with path.open("rb") as file:
        zero_copy = {"type": "http.response.zerocopysend", "file": file, "offset": 2, "count": 3}
        messages: list[Message] = [
            {"type": "http.response.debug", "info": {"template": "a.html"}},
            {"type": "http.response.early_hint", "links": [b"</a.css>; rel=preload"]},
            start(200, (b"trailer", b"x-sum"), trailers=True),
            {"type": "http.response.early_hint", "links": [b"</b.css>; rel=preload"]},
            {"type": "http.response.push", "path": "/c.css", "headers": []},
            chunk(b"ab", more=True),
            {**zero_copy, "more_body": True},
            {**zero_copy, "more_body": False},
            {"type": "http.response.trailers", "headers": [], "more_trailers": True},
            {"type": "http.response.trailers", "headers": [(b"x-sum", b"8")]},
        ]

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            for number, message in enumerate(messages):
                await write(f"{number}")
                await send({**message})

        answer = await send_request(
            DatabaseSessionMiddleware(app, database),
            "POST",
            extensions={message["type"] for message in messages[:2] + messages[3:]},
        )
    assert answer.exception is None
    assert answer.messages == messages
    assert (answer.body, answer.complete) == (b"ab234234", True)
    assert notes(database_url) == [str(number) for number in range(10)]
    assert connections_in_use(database) == 0
