"""One request and its response, held against one unit of work: what decides."""

import asyncio
import contextlib
import contextvars
import logging
import threading
from typing import Any

import pytest
from sqlalchemy import insert, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from repom import Database, current_scope, current_session, finish, on_commit, session_scope
from repom.context import surroundings
from repom.errors import (
    CommitOutcomeUnknown,
    InvalidResponseError,
    ScopeError,
    TransactionAbortedError,
)
from repom.middleware import commits_on_2xx
from repom.scope import SessionScope
from tests.middleware.held import held_commit
from tests.middleware.notes import (
    NOTE,
    NOWHERE,
    Sight,
    answer,
    chunk,
    connections_in_use,
    notes,
    notes_database,
    serve,
    start,
    write,
    write_sync,
)
from tests.support.asgi import Message, Receive, Scope, Send, request

START = "http.response.start"
BODY = "http.response.body"
EXTENSIONS = ["http.response.trailers", "http.response.pathsend", "http.response.zerocopysend"]


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


@pytest.mark.parametrize("when", ["never", "before", "in the body", "in the background"])
async def test_own_rule_is_asked_once_about_a_session(
    database: Database, database_url: str, when: str
) -> None:
    """Requests without a session do not ask the rule; those that use one late ask it then."""
    asked: list[int] = []

    def commit_on(status: int, asgi_scope: Scope) -> bool:
        asked.append(status)
        return status == 418

    async def respond(send: Send) -> None:
        for moment in ("before", "in the body", "in the background"):
            if moment == when:
                await write("a")
            if moment == "before":
                await send({"type": "http.response.start", "status": 418, "headers": []})
            elif moment == "in the body":
                await send({"type": "http.response.body", "body": b"a"})

    response = await request(serve(database, respond, commit_on=commit_on))
    assert (response.status, response.complete) == (418, True)
    assert asked == ([] if when == "never" else [418])
    assert notes(database_url) == ([] if when == "never" else ["a"])


async def test_own_rule_that_fails_late(database: Database, database_url: str) -> None:
    """A rule that raises when it is first asked after the response commits nothing, and the
    error leaves."""

    def commit_on(status: int, asgi_scope: Scope) -> bool:
        raise LookupError("no rule")

    async def respond(send: Send) -> None:
        await answer(send)
        await write("a")

    response = await request(serve(database, respond, commit_on=commit_on))
    assert isinstance(response.exception, LookupError)
    assert notes(database_url) == []
    assert connections_in_use(database) == 0


async def test_own_rule_that_fails_without_a_session(database: Database) -> None:
    """It is not asked, so that a stream is not broken for it."""

    def commit_on(status: int, asgi_scope: Scope) -> bool:
        raise LookupError("no rule")

    async def respond(send: Send) -> None:
        await send(start(200))
        await send(chunk(b"a", more=True))
        await send(chunk(b"b"))

    response = await request(serve(database, respond, commit_on=commit_on))
    assert (response.exception, response.complete) == (None, True)


@pytest.mark.parametrize(("status", "committed"), [(200, True), (404, False)])
async def test_layer_outside_that_changes_the_start(
    database: Database, database_url: str, status: int, committed: bool
) -> None:
    """What the app has said decides about what it begins later, and not what was made of it."""

    async def respond(send: Send) -> None:
        await send(start(status))
        await write("a")
        await send(chunk())

    async def changing(scope: Scope, receive: Receive, send: Send) -> None:
        async def change(message: Message) -> None:
            await send(dict(message))
            if message["type"] == START:
                message.update(status=604 - status, headers=[(b"content-length", b"0")])

        await serve(database, respond)(scope, receive, change)

    response = await request(changing)
    assert (response.status, response.exception) == (status, None)
    assert notes(database_url) == (["a"] if committed else [])


async def test_first_used_when_the_app_has_returned(
    database: Database, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread that is left over gets in before the end, or not at all: what it has written
    without an error is committed with the 2xx."""
    close = finish.close_if_settled

    def use_before(unit: SessionScope) -> bool:
        context = contextvars.copy_context()
        thread = threading.Thread(target=context.run, args=(write_sync, "a"))
        thread.start()
        thread.join()
        monkeypatch.undo()
        return close(unit)

    async def respond(send: Send) -> None:
        await answer(send)
        monkeypatch.setattr(finish, "close_if_settled", use_before)

    response = await request(serve(database, respond))
    assert (response.status, response.exception) == (200, None)
    assert notes(database_url) == ["a"]
    assert connections_in_use(database) == 0


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


@pytest.mark.parametrize(
    ("sent", "error"),
    [
        ([start(200), chunk(), start(500)], ScopeError),
        ([start(200), start(500)], ScopeError),
        ([start(200), chunk(), chunk()], InvalidResponseError),
        ([start(200), chunk(more=True), chunk(), chunk()], InvalidResponseError),
    ],
    ids=["second response", "second start", "second body", "body after the last chunk"],
)
async def test_what_no_server_takes_without_a_session(
    database: Database, sent: list[Message], error: type[Exception]
) -> None:
    """It is refused there, too, and what came before has left."""

    async def respond(send: Send) -> None:
        for message in sent:
            await send(dict(message))

    response = await request(serve(database, respond))
    assert type(response.exception) is error
    assert [message["type"] for message in response.messages] == [
        message["type"] for message in sent[:-1]
    ]


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
        async with asyncio.timeout(10):  # the default limit is longer
            response = await request(app, "POST", "/slow")
        assert isinstance(response.exception, CommitOutcomeUnknown)
        assert response.sent == []
        assert "COMMIT of POST /slow is unknown" in caplog.messages


async def no_body() -> Message:
    return {"type": "http.request", "body": b"", "more_body": False}


class Failing(Session):
    """A session of an application whose end fails."""

    def close(self) -> None:
        super().close()
        raise LookupError("close")


async def test_a_session_that_fails_to_close(database_url: str) -> None:
    """Its error leaves, and the context is what it was: it may serve another request."""
    kwargs: dict[str, Any] = {"session_kwargs": {"sync_session_class": Failing}}
    async with notes_database(database_url, **kwargs) as database:
        units: list[SessionScope] = []

        async def respond(send: Send) -> None:
            units.append(current_scope())
            await write("a")
            await answer(send)

        app = serve(database, respond)
        scope = {"type": "http", "method": "POST", "path": "/", "headers": []}

        async def ignore(message: Message) -> None:
            pass

        with pytest.raises(LookupError, match="close"):
            await app(scope, no_body, ignore)
        assert surroundings.get() is None
        assert units[0].participants == ()
        assert notes(database_url) == ["a"]


# --- after the body


async def test_background_work_is_committed_when_the_app_returns(
    database: Database, database_url: str
) -> None:
    """What is begun after the body has a transaction of its own."""
    seen_in_background: list[list[str]] = []

    async def respond(send: Send) -> None:
        await write("a")
        await answer(send)
        await write("later")
        seen_in_background.append(notes(database_url))

    response = await request(serve(database, respond), "POST")
    assert response.exception is None
    assert seen_in_background == [["a"]]
    assert notes(database_url) == ["a", "later"]
    assert connections_in_use(database) == 0


async def test_what_is_written_after_an_error_response_is_rolled_back(
    database: Database, database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The client relies on it, be it a background task or an endpoint that a time-out has been
    answered for. A warning says what to write; what has its own transaction stays."""

    async def respond(send: Send) -> None:
        await answer(send, 504)
        async with session_scope():
            await write("audit")
        await write("later")

    response = await request(serve(database, respond), "POST", "/a")
    assert (response.status, response.exception) == (504, None)
    assert notes(database_url) == ["audit"]
    assert connections_in_use(database) == 0
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage().startswith("POST /a was answered by an error; ")
    assert "session_scope()" in record.getMessage()


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
