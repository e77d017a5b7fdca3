"""One rule for every message: what is open is ended before the body is complete."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from sqlalchemy import insert, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncResult

from repom import Database, current_scope, current_session
from repom.errors import ScopeError
from tests.middleware.notes import (
    NOTE,
    NOWHERE,
    Sight,
    chunk,
    connections_in_use,
    notes,
    notes_database,
    serve,
    start,
    write,
)
from tests.support.asgi import Message, ProtocolViolation, Send, request
from tests.support.patient import PatientServer

EXTENSIONS = ["http.response.trailers", "http.response.pathsend", "http.response.zerocopysend"]


def zero_copy(file: BinaryIO, **more: Any) -> Message:
    return {"type": "http.response.zerocopysend", "file": file, **more}


#: By name, for a file of 4 bytes: the start, what does not complete the response, what does.
RESPONSES: dict[str, Callable[[BinaryIO], tuple[Message, list[Message], Message]]] = {
    "last chunk": lambda _: (start(), [chunk(b"x", more=True)], chunk()),
    "no body": lambda _: (start(), [], chunk()),
    "chunk that reaches Content-Length": lambda _: (
        start(200, (b"content-length", b"3")),
        [chunk(b"ab", more=True)],
        chunk(b"c", more=True),
    ),
    "headers from an iterator": lambda _: (
        {**start(), "headers": iter([(b"content-length", b"3")])},
        [chunk(b"ab", more=True)],
        chunk(b"c", more=True),
    ),
    "pathsend": lambda file: (
        start(),
        [],
        {"type": "http.response.pathsend", "path": str(file.name)},
    ),
    "zerocopysend": lambda file: (
        start(),
        [zero_copy(file, count=2, more_body=True)],
        zero_copy(file),
    ),
    "zerocopysend that reaches Content-Length": lambda file: (
        start(200, (b"content-length", b"4")),
        [zero_copy(file, count=3, more_body=True)],
        zero_copy(file, count=1, more_body=True),
    ),
    "zerocopysend of a whole file": lambda file: (
        start(200, (b"content-length", b"4")),
        [],
        zero_copy(file, more_body=True),
    ),
    "trailers": lambda _: (
        start(200, trailers=True),
        [chunk(b"x", more=True), chunk()],
        {"type": "http.response.trailers", "headers": []},
    ),
    "204": lambda _: (start(204), [], chunk()),
    "304": lambda _: (start(304), [], chunk()),
}


@pytest.fixture
def body_file(tmp_path: Path) -> Iterator[BinaryIO]:
    """A file of 4 bytes."""
    path = tmp_path / "body"
    path.write_bytes(b"1234")
    with path.open("rb") as file:
        yield file


@pytest.mark.parametrize("kind", RESPONSES)
async def test_what_is_written_in_the_body_is_committed_before_the_body_is_complete(
    deferring: Database, deferring_url: str, kind: str, body_file: BinaryIO
) -> None:
    """A transaction begun after the start is committed before the message that completes the
    response, and not before; the connection is back in its pool by then. Of a response with
    trailers the client has to wait for the body, and for the trailers."""
    sight = Sight(deferring, deferring_url)
    begin, parts, last = RESPONSES[kind](body_file)

    async def respond(send: Send) -> None:
        await send(begin)
        await write("a")
        for part in parts:
            await send(part)
        await write("b")
        await send(last)

    app = serve(deferring, respond)
    await request(app, "POST", extensions=EXTENSIONS, on_message=sight)
    *before, (_, rows, in_use) = sight.seen
    assert [rows for _, rows, _ in before] == (
        [[], [], ["a"]] if kind == "trailers" else [[]] * len(before)
    )
    assert (rows, in_use) == (["a", "b"], 0)


@pytest.mark.parametrize("kind", RESPONSES)
async def test_commit_that_fails_in_the_body_leaves_it_unterminated(
    deferring: Database, deferring_url: str, kind: str, body_file: BinaryIO
) -> None:
    """The message that would complete the body is not sent, nor any other of the app after it,
    and the failure leaves; what was committed before the start stays. Where nothing of the body
    was sent, an empty chunk makes the server send the start."""
    begin, parts, last = RESPONSES[kind](body_file)
    raised: list[BaseException] = []

    async def respond(send: Send) -> None:
        await write("before")
        await send(begin)
        for part in parts:
            await send(part)
        await write("a", parent=NOWHERE)
        for message in (last, last, start(500)):
            try:
                await send(message)
            except Exception as error:
                raised.append(error)

    app = PatientServer(serve(deferring, respond))
    response = await request(app, "POST", extensions=EXTENSIONS)
    assert isinstance(response.exception, IntegrityError)
    assert raised == [response.exception] * 3
    assert not response.complete
    assert len(response.sent) == 1 + max(len(parts), 1)
    assert parts or response.messages[1] == chunk(more=True)
    assert notes(deferring_url) == ["before"]


@pytest.mark.parametrize("begin", [start(404, (b"x-a", b"1\n")), start(200, (b"x-a", b"1\n"))])
async def test_what_is_not_committed_is_not_checked(sqlite_url: str, begin: Message) -> None:
    """An error, or a response without work: what is wrong with it the server says."""

    async def respond(send: Send) -> None:
        if begin["status"] == 404:
            await write("a")
        await send(begin)

    async with notes_database(sqlite_url) as database:
        with pytest.raises(ProtocolViolation, match="line break"):
            await request(serve(database, respond), "POST")
    assert notes(sqlite_url) == []


async def test_length_is_not_checked_where_nothing_is_open(
    database: Database, database_url: str
) -> None:
    """What the start tells of is committed; that the body is too short the server says."""

    async def respond(send: Send) -> None:
        await write("a")
        await send(start(200, (b"content-length", b"3")))
        await send(chunk(b"12"))

    with pytest.raises(ProtocolViolation, match="Content-Length is 3"):
        await request(serve(database, respond), "POST")
    assert notes(database_url) == ["a"]


async def test_head(database: Database, database_url: str) -> None:
    """The response to HEAD is like any other: what is open is committed before its start, what
    follows before its last message."""
    sight = Sight(database, database_url)

    async def respond(send: Send) -> None:
        await write("a")
        await send(start(200, (b"content-length", b"9")))
        await write("b")
        await send(chunk())

    await request(serve(database, respond), "HEAD", on_message=sight)
    assert sight.seen == [("start", ["a"], 0), ("body", ["a", "b"], 0)]


@pytest.mark.parametrize("end", ["raise", "return"])
async def test_body_that_breaks_off(database: Database, database_url: str, end: str) -> None:
    """A body that ends by an exception, or is not ended at all, undoes what it has written, and
    nothing of what was committed before it."""
    error = LookupError()

    async def respond(send: Send) -> None:
        await write("before")
        await send(start(200))
        await write("a")
        await send(chunk(b"x", more=True))
        await write("b")
        if end == "raise":
            raise error

    response = await request(serve(database, respond), "POST")
    assert response.exception is (error if end == "raise" else None)
    assert (response.status, response.complete) == (200, False)
    assert notes(database_url) == ["before"]
    assert connections_in_use(database) == 0


async def test_body_of_an_error(database: Database, database_url: str) -> None:
    """What the body of an error response writes is rolled back with its last chunk."""

    async def respond(send: Send) -> None:
        await send(start(500))
        await write("a")
        await send(chunk())
        assert connections_in_use(database) == 0

    response = await request(serve(database, respond), "POST")
    assert (response.status, response.complete, response.exception) == (500, True, None)
    assert notes(database_url) == []


# --- open cursors


async def fill(database: Database, count: int) -> None:
    async with database.sessionmaker.begin() as session:
        await session.execute(insert(NOTE), [{"text": f"{n:05}"} for n in range(count)])


async def test_open_cursor_keeps_its_transaction_to_the_end_of_the_body(
    database: Database, database_url: str
) -> None:
    """Thousands of rows are read while they are sent; what was written before is committed
    before the last message, and not with the start."""
    await fill(database, 3000)
    in_use: list[int] = []

    def look(message: Message) -> None:
        in_use.append(connections_in_use(database))

    async def respond(send: Send) -> None:
        await write("written")
        rows = await current_session().stream(select(NOTE.c.text).order_by(NOTE.c.text))
        await send(start(200))
        assert "written" not in notes(database_url)
        async for part in rows.scalars().partitions(100):
            await send(chunk(b"".join(text.encode() for text in part), more=True))
        await send(chunk())

    response = await request(serve(database, respond), "POST", on_message=look)
    assert (response.complete, response.exception) == (True, None)
    expected = "".join(f"{n:05}" for n in range(3000)) + "written"
    assert response.body.decode() == expected
    assert in_use == [1] * 32 + [0]
    assert "written" in notes(database_url)


async def test_commit_that_fails_after_an_open_cursor(
    deferring: Database, deferring_url: str
) -> None:
    """A body that is read from a cursor is not terminated if COMMIT fails after it."""

    async def respond(send: Send) -> None:
        await write("a", parent=NOWHERE)
        rows = await current_session().stream(select(NOTE.c.text))
        await send(start(200))
        async for row in rows:
            await send(chunk(row.text.encode(), more=True))
        await send(chunk())

    response = await request(serve(deferring, respond), "POST")
    assert (response.status, response.body, response.complete) == (200, b"a", False)
    assert isinstance(response.exception, IntegrityError)
    assert notes(deferring_url) == []


async def exhaust(rows: AsyncResult[Any]) -> object:
    return [row async for row in rows]


async def close(rows: AsyncResult[Any]) -> object:
    await anext(rows)
    await rows.close()
    return rows


async def drop(rows: AsyncResult[Any]) -> object:
    await anext(rows)
    return None


@pytest.mark.parametrize("leave", [exhaust, close, drop], ids=lambda leave: leave.__name__)
async def test_cursor_that_nobody_can_read_keeps_nothing_open(
    database: Database, database_url: str, leave: Callable[[AsyncResult[Any]], Awaitable[object]]
) -> None:
    """A result that was read to its end, closed or let go does not delay COMMIT."""
    await fill(database, 100)
    sight = Sight(database, database_url)

    async def respond(send: Send) -> None:
        await write("a")
        kept = await leave(await current_session().stream(select(NOTE.c.text)))
        await send(start(200))
        del kept
        await send(chunk())

    await request(serve(database, respond), "POST", on_message=sight)
    assert [("a" in rows, used) for _, rows, used in sight.seen] == [(True, 0)] * 2


async def test_second_response_while_the_first_waits_for_its_cursor(
    database: Database, database_url: str
) -> None:
    """The start of a response to HEAD that has not left yet is the only one all the same."""
    await fill(database, 100)

    async def respond(send: Send) -> None:
        await write("a")
        rows = await current_session().stream(select(NOTE.c.text))
        await send(start(200))
        with pytest.raises(ScopeError, match="second response"):
            await send(start(500))
        await send(chunk())
        await rows.close()

    response = await request(serve(database, respond), "HEAD")
    assert response.messages == [start(200), chunk()]
    assert "a" in notes(database_url)


@pytest.mark.parametrize(
    "begin",
    [start(204), start(304), start(201, (b"content-length", b"0"))],
    ids=["204", "304", "Content-Length 0"],
)
async def test_cursor_does_not_keep_a_response_without_a_body_open(
    deferring: Database, deferring_url: str, begin: Message
) -> None:
    """A response that is complete with its start is committed before it, cursor or not."""
    await fill(deferring, 100)

    async def respond(send: Send) -> None:
        await write("a", parent=NOWHERE)
        rows = await current_session().stream(select(NOTE.c.text))
        await send(begin)
        await send(chunk())
        await rows.close()

    response = await request(serve(deferring, respond), "POST")
    assert isinstance(response.exception, IntegrityError)
    assert response.sent == []


@pytest.mark.parametrize("end", ["raise", "return", "cancel"])
async def test_body_that_breaks_off_before_it_has_begun(
    database: Database, database_url: str, end: str
) -> None:
    """A server that has waited for it with the start sends that, and does not answer 500 for
    what is committed."""

    async def respond(send: Send) -> None:
        await write("before")
        await send(start(201))
        await write("a")
        if end == "raise":
            raise LookupError
        if end == "cancel":
            task = asyncio.current_task()
            assert task is not None
            task.cancel()
            await asyncio.sleep(0)

    response = await request(PatientServer(serve(database, respond)), "POST")
    assert (response.status, response.complete) == (201, False)
    expected = {"raise": LookupError, "return": type(None), "cancel": asyncio.CancelledError}
    assert type(response.exception) is expected[end]
    assert notes(database_url) == ["before"]


@pytest.mark.parametrize("nothing", ["no session", "404", "rollback_only"])
async def test_start_that_tells_of_nothing_committed_is_left_to_the_server(
    database: Database, database_url: str, nothing: str
) -> None:
    """Its own 500 says more than a response that breaks off, and is as true."""

    async def respond(send: Send) -> None:
        if nothing != "no session":
            await write("a")
        if nothing == "rollback_only":
            current_scope().rollback_only()
        await send(start(404 if nothing == "404" else 200))
        raise LookupError

    response = await request(PatientServer(serve(database, respond)), "POST")
    assert (response.status, response.complete) == (500, True)
    assert notes(database_url) == []


async def test_body_that_breaks_off_when_the_client_is_gone(
    database: Database, database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The app's own error is the one that leaves; the other is for who looks for it."""
    caplog.set_level(logging.DEBUG, "repom.middleware")

    async def respond(send: Send) -> None:
        await write("a")
        await send(start(201))
        raise LookupError

    response = await request(serve(database, respond), "POST", disconnect_after=1)
    assert isinstance(response.exception, LookupError)
    assert "the response of POST / was not sent" in caplog.messages
    assert notes(database_url) == ["a"]
