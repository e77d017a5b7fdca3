"""One request and its response, held against one unit of work: raw ASGI, on every database."""

import asyncio
import contextlib
import gc
import logging
import sys
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import anyio
import pytest
from sqlalchemy import event, insert, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncResult
from sqlalchemy.orm import Session

from repom import Database, current_scope, current_session, on_commit
from repom.errors import (
    CommitOutcomeUnknown,
    ScopeClosedError,
    ScopeError,
    TransactionAbortedError,
)
from repom.middleware import DatabaseSessionMiddleware, commits_on_2xx
from tests.middleware.held import HeldCommit, held_commit
from tests.middleware.notes import (
    NOTE,
    NOWHERE,
    answer,
    chunk,
    connections_in_use,
    notes,
    notes_database,
    responding,
    start,
    write,
)
from tests.support.asgi import ASGIApp, Message, Receive, Scope, Send, request

START = "http.response.start"
BODY = "http.response.body"
EXTENSIONS = ["http.response.trailers", "http.response.pathsend", "http.response.zerocopysend"]


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    """An empty table of notes, on each kind of database."""
    async with notes_database(database_url) as database:
        yield database


@pytest.fixture(params=["sqlite", "postgresql"])
def deferring_url(request: pytest.FixtureRequest) -> str:
    """The URL of a database that finds a wrong parent of a note at COMMIT."""
    name = {"sqlite": "sqlite_url", "postgresql": "postgres_url"}[request.param]
    url: str = request.getfixturevalue(name)
    return url


@pytest.fixture
async def deferring(deferring_url: str) -> AsyncIterator[Database]:
    """An empty table of notes, where COMMIT refuses one with the parent `NOWHERE`."""
    async with notes_database(deferring_url) as database:
        yield database


@pytest.fixture
async def held(deferring_url: str) -> AsyncIterator[HeldCommit]:
    """An empty table of notes, whose COMMIT waits until the test lets it go on."""
    async with held_commit(deferring_url) as held:
        yield held


def serve(
    database: Database, respond: Callable[[Send], Awaitable[object]], **options: Any
) -> ASGIApp:
    """An application behind the middleware that only has to know how to send."""
    return DatabaseSessionMiddleware(responding(respond), database, **options)


class Sight:
    """What a client and a second connection see, at each message that reaches the wire."""

    def __init__(self, database: Database, url: str) -> None:
        self.seen: list[tuple[str, list[str], int]] = []
        self._database = database
        self._url = url

    def __call__(self, message: Message) -> None:
        kind = message["type"].rpartition(".")[2]
        self.seen.append((kind, notes(self._url), connections_in_use(self._database)))


# --- what decides


@pytest.mark.parametrize(
    ("status", "committed"),
    [(200, True), (204, True), (303, True), (404, False), (500, False)],
)
async def test_status_decides_before_the_response_starts(
    database: Database, database_url: str, status: int, committed: bool
) -> None:
    """When the start reaches the wire all the world sees the row, or nobody ever will, and the
    connection is back in its pool."""
    sight = Sight(database, database_url)

    async def respond(send: Send) -> None:
        await write("a")
        await answer(send, status)

    response = await request(serve(database, respond), "POST", on_message=sight)
    rows = ["a"] if committed else []
    assert sight.seen == [("start", rows, 0), ("body", rows, 0)]
    assert (response.status, response.complete, response.exception) == (status, True, None)


class Unusual(BaseException):
    """What is neither an error nor a cancellation."""


@pytest.mark.parametrize(
    "error",
    [
        ValueError("x"),
        ExceptionGroup("x", [ValueError("x")]),
        Unusual("x"),
        BaseExceptionGroup("x", [Unusual("x")]),
        asyncio.CancelledError(),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_exception_that_leaves_the_app(
    database: Database, database_url: str, error: BaseException
) -> None:
    """Whatever leaves the app rolls back and goes on as it is; nothing is sent."""

    async def respond(send: Send) -> None:
        await write("a")
        raise error

    left: BaseException | None
    try:
        left = (await request(serve(database, respond), "POST")).exception
    except (Unusual, BaseExceptionGroup) as unusual:
        left = unusual
    assert left is error
    assert notes(database_url) == []
    assert connections_in_use(database) == 0


async def test_app_that_never_responds(database: Database, database_url: str) -> None:
    """Without a response nothing is committed."""

    async def respond(send: Send) -> None:
        await write("a")

    response = await request(serve(database, respond), "POST")
    assert (response.sent, response.exception) == ([], None)
    assert notes(database_url) == []
    assert connections_in_use(database) == 0


async def test_rollback_only(
    database: Database, database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """`rollback_only()` rolls back, leaves the response as it is, and says so at INFO."""
    caplog.set_level(logging.INFO, logger="repom.middleware")

    async def respond(send: Send) -> None:
        await write("a")
        current_scope().rollback_only()
        await send(start(201))
        await write("in the body")
        await send(chunk())
        await write("after it")

    response = await request(serve(database, respond), "POST", "/dry-run")
    assert (response.status, response.complete, response.exception) == (201, True, None)
    assert notes(database_url) == []
    assert caplog.messages[0] == "POST /dry-run was rolled back: rollback_only() was called"
    assert caplog.records[0].levelno == logging.INFO


async def test_rollback_only_without_a_transaction_is_no_news(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing is logged where nothing was lost: no transaction, or an error status anyway."""
    caplog.set_level(logging.INFO, logger="repom.middleware")

    async def respond(send: Send) -> None:
        current_scope().rollback_only()
        await answer(send)

    async def fail(send: Send) -> None:
        await write("a")
        current_scope().rollback_only()
        await answer(send, 404)

    await request(serve(database, respond))
    await request(serve(database, fail), "POST")
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("status", "committed"), [(201, True), (303, False), (404, False), (418, True)]
)
async def test_own_rule(
    database: Database, database_url: str, status: int, committed: bool
) -> None:
    """`commit_on(status, asgi_scope)` replaces the rule, and sees the request."""

    def commit_on(status: int, asgi_scope: Scope) -> bool:
        return commits_on_2xx(status, asgi_scope) or asgi_scope["path"] == "/teapot"

    async def respond(send: Send) -> None:
        await write("a")
        await answer(send, status)

    app = serve(database, respond, commit_on=commit_on)
    await request(app, "POST", "/teapot" if status == 418 else "/")
    assert notes(database_url) == (["a"] if committed else [])


@pytest.mark.parametrize("failing", ["duplicate", "or rollback"])
async def test_swallowed_database_error(
    deferring: Database, deferring_url: str, failing: str
) -> None:
    """A 2xx after a swallowed database error that aborted the transaction is not sent:
    `TransactionAbortedError` leaves, and the first error is its cause."""
    if deferring.is_sqlite != (failing == "or rollback"):
        pytest.skip("SQLite goes on after an error, except for this one")
    statement = insert(NOTE).values(text="a")
    if failing == "or rollback":
        statement = statement.prefix_with("OR ROLLBACK")

    async def respond(send: Send) -> None:
        await write("a")
        with contextlib.suppress(IntegrityError):
            await current_session().execute(statement)
        await answer(send, 201)

    response = await request(serve(deferring, respond), "POST")
    assert isinstance(response.exception, TransactionAbortedError)
    assert response.exception.__cause__ is not None
    assert "UNIQUE" in str(response.exception.__cause__).upper()
    assert response.sent == []
    assert notes(deferring_url) == []
    assert connections_in_use(deferring) == 0


async def test_second_response_is_refused(database: Database, database_url: str) -> None:
    """One response, ever: after an error status a 2xx cannot commit what comes then."""
    refused: list[ScopeError] = []

    async def respond(send: Send) -> None:
        await send(start(500))
        await write("a")
        try:
            await send(start(200))
        except ScopeError as error:
            refused.append(error)
        await send(chunk())

    response = await request(serve(database, respond), "POST", "/twice")
    assert [message["type"] for message in response.messages] == [START, BODY]
    assert response.status == 500
    assert str(refused[0]).startswith("POST /twice started a second response.")
    assert notes(database_url) == []


# --- a COMMIT that fails


async def test_failed_commit_sends_nothing(
    deferring: Database, deferring_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The held message is never sent, what COMMIT raised leaves the middleware, no row is there,
    and the log has it at ERROR with the route."""

    async def respond(send: Send) -> None:
        await write("a")
        await write("b", parent=NOWHERE)
        await answer(send, 201)

    response = await request(serve(deferring, respond), "POST", "/articles?token=secret")
    assert isinstance(response.exception, IntegrityError)
    assert response.sent == []
    assert notes(deferring_url) == []
    assert connections_in_use(deferring) == 0
    errors = [record for record in caplog.records if record.name == "repom.middleware"]
    assert [(e.levelname, e.getMessage()) for e in errors] == [
        ("ERROR", "COMMIT of POST /articles failed")
    ]


@pytest.mark.parametrize(
    "later",
    [
        [start(200)],
        [start(302)],
        [start(201), chunk(b"x")],
        [chunk(b"x", more=True), chunk(b"y")],
        [{"type": "http.response.trailers", "headers": []}],
        [{"type": "http.response.pathsend", "path": "/etc/hostname"}],
    ],
    ids=lambda messages: messages[0]["type"].rpartition(".")[2],
)
async def test_after_a_failed_commit_every_message_is_refused(
    deferring: Database, deferring_url: str, later: list[Message]
) -> None:
    """An app that swallows the failure gets it again from every later message, and the failure
    leaves the middleware although the app returns."""
    raised: list[BaseException] = []

    async def respond(send: Send) -> None:
        await write("a", parent=NOWHERE)
        for message in [start(200), *later]:
            try:
                await send(message)
            except IntegrityError as error:
                raised.append(error)

    response = await request(serve(deferring, respond), "POST", extensions=EXTENSIONS)
    assert response.sent == []
    assert len(raised) == 1 + len(later)
    assert all(error is response.exception for error in raised)
    assert notes(deferring_url) == []


async def test_failure_counts_and_not_what_it_did_to_the_app(deferring: Database) -> None:
    """What leaves is the error of COMMIT, when the app made another one of it."""

    async def respond(send: Send) -> None:
        await write("a", parent=NOWHERE)
        try:
            await answer(send)
        except IntegrityError as error:
            raise RuntimeError("response already started") from error

    response = await request(serve(deferring, respond), "POST")
    assert isinstance(response.exception, IntegrityError)
    assert response.sent == []


async def test_cancellation_after_a_failed_commit(deferring: Database) -> None:
    """A cancellation that leaves the app is not taken for a consequence of the failure."""

    async def respond(send: Send) -> None:
        await write("a", parent=NOWHERE)
        with contextlib.suppress(IntegrityError):
            await answer(send)
        raise asyncio.CancelledError

    response = await request(serve(deferring, respond), "POST")
    assert isinstance(response.exception, asyncio.CancelledError)
    assert response.sent == []


async def test_inner_layer_answers_for_a_failed_commit(
    deferring: Database, deferring_url: str
) -> None:
    """An error response by a layer inside the middleware is let through, once; what that layer
    wrote for it is rolled back; what it raises then leaves as it is."""
    seen_by_answer: list[list[Any]] = []

    async def respond(send: Send) -> None:
        await write("a", parent=NOWHERE)
        try:
            await answer(send, 201)
        except IntegrityError:
            await write("b")
            found = await current_session().execute(select(NOTE.c.text))
            seen_by_answer.append(list(found.scalars()))
            await send({"type": "http.response.debug", "info": {}})
            await send(start(503))
            with pytest.raises(ScopeError, match="second response"):
                await send(start(200))
            await send(chunk(b"sorry"))
            raise LookupError from None

    response = await request(serve(deferring, respond), "POST", extensions=["http.response.debug"])
    assert (response.status, response.body, response.complete) == (503, b"sorry", True)
    assert isinstance(response.exception, LookupError)
    assert seen_by_answer == [["b"]], "a fresh transaction"
    assert notes(deferring_url) == []


async def test_answer_for_a_failed_commit_that_cannot_be_committed_either(
    deferring: Database, deferring_url: str
) -> None:
    """With a rule that commits error responses, one that fails too leaves no way for a 2xx."""

    async def respond(send: Send) -> None:
        await write("a", parent=NOWHERE)
        with contextlib.suppress(IntegrityError):
            await send(start(201))
        await write("b", parent=NOWHERE)
        with contextlib.suppress(IntegrityError):
            await send(start(500))
        await answer(send, 200)

    app = serve(deferring, respond, commit_on=lambda status, scope: True)
    response = await request(app, "POST")
    assert isinstance(response.exception, IntegrityError)
    assert response.sent == []
    assert notes(deferring_url) == []


@pytest.mark.leaves_connections("the server goes on with the COMMIT that was given up")
async def test_commit_whose_outcome_is_unknown(
    postgres_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A COMMIT past its time limit is answered with an error, and the log says that its
    outcome is unknown."""
    async with held_commit(postgres_url) as held:

        async def respond(send: Send) -> None:
            await write("a")
            await answer(send, 201)

        app = serve(held.database, respond, end_timeout=0.1)
        response = await request(app, "POST", "/slow")
        assert isinstance(response.exception, CommitOutcomeUnknown)
        assert response.sent == []
        assert "COMMIT of POST /slow is unknown" in caplog.messages


# --- one rule for every message


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
    response, and not before; the connection is back in its pool by then."""
    sight = Sight(deferring, deferring_url)
    begin, parts, last = RESPONSES[kind](body_file)

    async def respond(send: Send) -> None:
        await send(begin)
        await write("a")
        for part in parts:
            if begin.get("trailers") and not part["more_body"]:
                await current_scope().commit()  # so that this chunk has nothing to commit
                await send(part)
                await write("b")
            else:
                await send(part)
        await send(last)

    app = serve(deferring, respond)
    await request(app, "POST", extensions=EXTENSIONS, on_message=sight)
    *before, (_, rows, used) = sight.seen
    assert all("b" not in rows for _, rows, _ in before)
    if not begin.get("trailers"):
        assert [rows for _, rows, _ in before] == [[]] * len(before)
    assert rows == (["a", "b"] if begin.get("trailers") else ["a"])
    assert used == 0


@pytest.mark.parametrize("kind", RESPONSES)
async def test_commit_that_fails_in_the_body_leaves_it_unterminated(
    deferring: Database, deferring_url: str, kind: str, body_file: BinaryIO
) -> None:
    """The message that would complete the body is not sent, nor any other after it, and the
    failure leaves; what was committed before the start stays."""
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

    response = await request(serve(deferring, respond), "POST", extensions=EXTENSIONS)
    assert isinstance(response.exception, IntegrityError)
    assert raised == [response.exception] * 3
    assert not response.complete
    assert len(response.sent) == 1 + len(parts)
    assert notes(deferring_url) == ["before"]


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


# --- after the body


@pytest.mark.parametrize("status", [200, 404])
async def test_background_work_is_committed_when_the_app_returns(
    database: Database, database_url: str, status: int
) -> None:
    """What is begun after the body has a transaction of its own, whatever the status was."""
    seen_in_background: list[list[str]] = []

    async def respond(send: Send) -> None:
        await write("a")
        await answer(send, status)
        await write("later")
        seen_in_background.append(notes(database_url))

    response = await request(serve(database, respond), "POST")
    assert response.exception is None
    before = ["a"] if status == 200 else []
    assert seen_in_background == [before]
    assert notes(database_url) == [*before, "later"]
    assert connections_in_use(database) == 0


async def test_background_work_that_raises(database: Database, database_url: str) -> None:
    """It is rolled back; the response stays, and the error leaves."""
    error = LookupError()

    async def respond(send: Send) -> None:
        await write("a")
        await answer(send)
        await write("later")
        raise error

    response = await request(serve(database, respond), "POST")
    assert (response.complete, response.exception) == (True, error)
    assert notes(database_url) == ["a"]
    assert connections_in_use(database) == 0


async def test_background_work_that_cannot_be_committed(
    deferring: Database, deferring_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The failure is logged with the route, and leaves; there is no second response."""

    async def respond(send: Send) -> None:
        await write("a")
        await answer(send)
        await write("later", parent=NOWHERE)

    response = await request(serve(deferring, respond), "POST", "/articles")
    assert isinstance(response.exception, IntegrityError)
    assert [message["type"] for message in response.messages] == [START, BODY]
    assert "COMMIT of POST /articles failed" in caplog.messages
    assert notes(deferring_url) == ["a"]


async def test_on_commit_runs_before_the_response_leaves(
    database: Database, database_url: str
) -> None:
    """Callbacks see the committed row, and the client sees what they have done."""
    order: list[object] = []

    async def respond(send: Send) -> None:
        await write("a")
        on_commit(lambda: order.append(notes(database_url)))
        await answer(send)

    def look(message: Message) -> None:
        order.append(message["type"])

    await request(serve(database, respond), "POST", on_message=look)
    assert order == [["a"], START, BODY]


# --- cancellation, and a client that is gone


async def cancelled_during_commit(app: ASGIApp, held: HeldCommit, wire: list[Message]) -> None:
    """Cancel a request while its COMMIT is in flight, twice, and let COMMIT go on."""
    task = asyncio.create_task(request(app, "POST", on_message=wire.append))
    await held.reached()
    for _ in range(2):
        task.cancel()
        await asyncio.sleep(0)
    held.release()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_cancelled_before_commit(database: Database, database_url: str) -> None:
    """A request that is cancelled at work leaves nothing, in the database and in the pool."""
    at_work = asyncio.Event()

    async def respond(send: Send) -> None:
        await write("a")
        at_work.set()
        await asyncio.Event().wait()

    task = asyncio.create_task(request(serve(database, respond), "POST"))
    await at_work.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert notes(database_url) == []
    assert connections_in_use(database) == 0


async def test_cancelled_during_commit(held: HeldCommit, deferring_url: str) -> None:
    """COMMIT ends all the same, the message that tells of it leaves, and then the cancellation:
    an outer layer that has not seen a response might otherwise answer with an error."""
    wire: list[Message] = []
    after_start: list[bool] = []

    async def respond(send: Send) -> None:
        await write("a")
        await send(start(201))
        after_start.append(True)

    await cancelled_during_commit(serve(held.database, respond), held, wire)
    assert [message["type"] for message in wire] == [START]
    assert after_start == []
    assert notes(deferring_url) == ["a"]
    assert connections_in_use(held.database) == 0


async def test_cancelled_during_the_commit_of_the_body(
    held: HeldCommit, deferring_url: str
) -> None:
    """A body whose work is committed is not broken off, which would tell the client otherwise."""
    wire: list[Message] = []

    async def respond(send: Send) -> None:
        await send(start(200))
        await write("a")
        await send(chunk(b"x"))

    await cancelled_during_commit(serve(held.database, respond), held, wire)
    assert [message["type"] for message in wire] == [START, BODY]
    assert notes(deferring_url) == ["a"]


async def test_inner_timeout_during_commit(held: HeldCommit, deferring_url: str) -> None:
    """A layer inside that gives up during COMMIT cannot answer 504 for committed work; what
    tells of it goes out although the layer's time is over, and the wire takes a while."""
    given_up = asyncio.Event()

    async def respond(send: Send) -> None:
        await write("a")
        with anyio.CancelScope() as scope:
            asyncio.get_running_loop().call_soon(give_up, scope)
            await send(start(201))
        with pytest.raises(ScopeError, match="second response"):
            await send(start(504))
        await send(chunk())

    def give_up(scope: anyio.CancelScope) -> None:
        scope.cancel()
        given_up.set()

    async def app_on_a_slow_wire(scope: Scope, receive: Receive, send: Send) -> None:
        async def slow_send(message: Message) -> None:
            await asyncio.sleep(0.01)
            await send(message)

        await serve(held.database, respond)(scope, receive, slow_send)

    task = asyncio.create_task(request(app_on_a_slow_wire, "POST"))
    await given_up.wait()
    held.release()
    response = await task
    assert (response.status, response.complete, response.exception) == (201, True, None)
    assert notes(deferring_url) == ["a"]


async def test_cancelled_during_a_commit_that_fails(held: HeldCommit, deferring_url: str) -> None:
    """An app that swallows the cancellation cannot send its 2xx: the failure is known."""

    async def respond(send: Send) -> None:
        await write("a", parent=NOWHERE)
        with contextlib.suppress(asyncio.CancelledError):
            await send(start(201))
        await answer(send, 201)

    task = asyncio.create_task(request(serve(held.database, respond), "POST"))
    await held.reached()
    app_task = next(t for t in asyncio.all_tasks() if t.get_name() == "http /")
    app_task.cancel()
    await asyncio.sleep(0)
    held.release()
    response = await task
    assert isinstance(response.exception, IntegrityError)
    assert response.sent == []
    assert notes(deferring_url) == []
    assert connections_in_use(held.database) == 0


async def test_cancelled_in_the_body(database: Database, database_url: str) -> None:
    """What was committed before the start stays; what the body has written is undone."""
    at_work = asyncio.Event()

    async def respond(send: Send) -> None:
        await write("a")
        await send(start(200))
        await write("b")
        at_work.set()
        await asyncio.Event().wait()

    task = asyncio.create_task(request(serve(database, respond), "POST"))
    await at_work.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert notes(database_url) == ["a"]
    assert connections_in_use(database) == 0


@pytest.mark.parametrize("after_disconnect", ["raise", "ignore"])
async def test_client_that_is_gone(
    database: Database, database_url: str, after_disconnect: Any
) -> None:
    """COMMIT had succeeded when the response could not be sent: it stays, nothing is leaked."""

    async def respond(send: Send) -> None:
        await write("a")
        await answer(send, 201)

    response = await request(
        serve(database, respond), "POST", disconnect_after=0, after_disconnect=after_disconnect
    )
    assert isinstance(response.exception, OSError) is (after_disconnect == "raise")
    assert notes(database_url) == ["a"]
    assert connections_in_use(database) == 0


# --- several tasks


async def test_response_sent_by_a_child_task(database: Database, database_url: str) -> None:
    """Who sends does not matter."""
    sight = Sight(database, database_url)

    async def respond(send: Send) -> None:
        await asyncio.create_task(write("a"))
        await asyncio.create_task(answer(send, 201))

    response = await request(serve(database, respond), "POST", on_message=sight)
    assert sight.seen == [("start", ["a"], 0), ("body", ["a"], 0)]
    assert response.complete


async def test_messages_keep_their_order_while_commit_is_in_flight(
    held: HeldCommit, deferring_url: str
) -> None:
    """A body sent by another task does not overtake the start that waits for COMMIT."""

    async def respond(send: Send) -> None:
        await write("a")

        async def let_go() -> None:
            await held.reached()
            held.release()

        await asyncio.gather(
            send(start(201)), send(chunk(b"x", more=True)), send(chunk(b"y")), let_go()
        )

    response = await request(serve(held.database, respond), "POST")
    assert (response.status, response.body, response.complete) == (201, b"xy", True)
    assert response.exception is None
    assert notes(deferring_url) == ["a"]


async def test_two_responses_at_the_same_time(held: HeldCommit, deferring_url: str) -> None:
    """The first to be sent decides; the other is refused although COMMIT is still in flight."""

    async def respond(send: Send) -> None:
        await write("a")
        created = asyncio.create_task(answer(send, 201))
        await held.reached()
        failed = asyncio.create_task(answer(send, 500))
        await asyncio.sleep(0)
        held.release()
        await created
        with pytest.raises(ScopeError, match="second response"):
            await failed

    response = await request(serve(held.database, respond), "POST")
    assert (response.status, response.complete, response.exception) == (201, True, None)
    assert notes(deferring_url) == ["a"]


async def test_task_that_responds_when_the_app_has_returned(
    database: Database, database_url: str
) -> None:
    """The work is rolled back by then, so its 2xx is refused."""
    returned = asyncio.Event()
    left_over: list[asyncio.Task[None]] = []

    async def respond(send: Send) -> None:
        await write("a")

        async def later() -> None:
            await returned.wait()
            await answer(send, 201)

        left_over.append(asyncio.create_task(later()))

    response = await request(serve(database, respond), "POST", "/late")
    returned.set()
    with pytest.raises(ScopeClosedError, match="a task of POST /late sent"):
        await left_over[0]
    assert response.sent == []
    assert notes(database_url) == []


async def test_requests_side_by_side(database_url: str) -> None:
    """200 requests at once on a pool of 5: each one's rows, and no other's, are there or not."""
    kwargs = {"pool_size": 5, "max_overflow": 0}
    async with notes_database(database_url, engine_kwargs=kwargs) as database:

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            number = scope["path"].removeprefix("/")
            await write(f"{number} first")
            await asyncio.sleep(0)
            found = await current_session().execute(
                select(NOTE.c.text).where(NOTE.c.text.like(f"{number} %"))
            )
            assert found.scalars().all() == [f"{number} first"]
            await write(f"{number} second")
            await answer(send, 201 if int(number) % 2 else 409)

        middleware = DatabaseSessionMiddleware(app, database)
        responses = await asyncio.gather(
            *(request(middleware, "POST", f"/{number}") for number in range(200))
        )
        assert [response.status for response in responses] == [409, 201] * 100
        assert connections_in_use(database) == 0
    expected = [f"{n} {which}" for n in range(1, 200, 2) for which in ("first", "second")]
    assert sorted(notes(database_url)) == sorted(expected)


# --- what a request costs, and what it leaves


async def test_request_without_a_session(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It opens no connection, starts no task and no thread."""
    await database.ping()
    opened: list[str] = []
    engine = database.async_engine.sync_engine
    for name in ("checkout", "connect"):
        event.listen(engine.pool, name, lambda *_, name=name: opened.append(name))

    async def respond(send: Send) -> None:
        opened.clear()
        await answer(send)
        await asyncio.sleep(0)

    app = serve(database, respond)
    tasks: list[asyncio.Task[Any]] = []

    def task_factory(loop: Any, coro: Any, **kwargs: Any) -> asyncio.Task[Any]:
        tasks.append(task := asyncio.Task(coro, loop=loop, **kwargs))
        return task

    asyncio.get_running_loop().set_task_factory(task_factory)
    monkeypatch.setattr("threading.Thread.start", lambda thread: opened.append(thread.name))
    response = await request(app)
    asyncio.get_running_loop().set_task_factory(None)
    assert response.complete
    assert opened == []
    assert len(tasks) == 1, "the client's own, in which the app runs"


def calls_of(coroutine: Any) -> int:
    """How many Python functions are called by a coroutine that waits for nothing."""
    calls = 0

    def count(frame: Any, what: str, arg: object) -> None:
        nonlocal calls
        calls += what == "call"

    sys.setprofile(count)
    try:
        with contextlib.suppress(StopIteration):
            coroutine.send(None)
    finally:
        sys.setprofile(None)
    return calls


def test_request_without_a_session_costs_little(sqlite_url: str) -> None:
    """A bare app makes a handful of calls; the middleware adds a number that is known, so that
    a change which makes every request slower is seen."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(start(200))
        await send(chunk())

    async def ignore(*_: object) -> Any:
        return None

    middleware = DatabaseSessionMiddleware(app, Database(sqlite_url))

    def measure(app: ASGIApp) -> int:
        calls_of(app({"type": "http", "method": "GET", "path": "/"}, ignore, ignore))
        return calls_of(app({"type": "http", "method": "GET", "path": "/"}, ignore, ignore))

    assert measure(middleware) - measure(app) <= 50


@contextlib.contextmanager
def without_garbage_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@pytest.mark.parametrize("outcome", ["201", "404", "raise", "failed commit", "answered"])
async def test_request_leaves_no_cycle(
    database: Database, outcome: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The unit of work, its session and the request die with the last reference, and do not wait
    for the garbage collector; also after a failed COMMIT, whose traceback knows them all."""
    caplog.set_level(logging.CRITICAL, logger="repom.middleware")  # the log would keep the error
    await database.ping()  # a connection keeps the context in which it was opened
    alive: list[weakref.ref[Any]] = []

    class Request(dict[str, Any]):
        """An ASGI scope that can be watched."""

    # Not an error of the driver: in those, SQLAlchemy itself leaves a cycle.
    def fail(session: Session) -> None:
        raise LookupError

    async def respond(send: Send) -> None:
        session = current_session()
        alive.extend(map(weakref.ref, (current_scope(), session, session.sync_session)))
        await write("a")
        if outcome == "raise":
            raise LookupError
        if outcome.isdigit():
            await answer(send, int(outcome))
            return
        event.listen(session.sync_session, "before_commit", fail)
        try:
            await answer(send)
        except LookupError:
            if outcome == "failed commit":
                raise
            await answer(send, 500)

    app = serve(database, respond)
    sent: list[Message] = []

    async def receive() -> Message:
        raise AssertionError("nobody asks for the body")

    async def send(message: Message) -> None:
        sent.append(message)

    async def handle() -> bool:
        asgi_scope = Request(type="http", method="POST", path="/")
        alive.append(weakref.ref(asgi_scope))
        try:
            await app(asgi_scope, receive, send)
        except LookupError:
            return True
        return False

    with without_garbage_collector():
        failed = await handle()
        assert [reference() for reference in alive if reference() is not None] == []
    assert failed is (outcome in ("raise", "failed commit"))
    assert len(alive) == 4
