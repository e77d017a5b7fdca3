"""A request that has lost a conflict is served again, and its client hears only of the end.

Conflicts are raised by PostgreSQL on demand: `lose()` in a statement, a note `LOST` at COMMIT. Real
ones, from many clients, are in tests/integration/test_retries.py and tests/cluster.
"""

import asyncio
import contextlib
import gc
import logging
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from sqlalchemy import event, insert, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.orm import Session
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from repom import (
    Database,
    atomic,
    current_scope,
    current_session,
    on_commit,
    on_rollback,
    session_scope,
)
from repom.conflicts import is_conflict
from repom.errors import (
    CommitOutcomeUnknown,
    PartialCommitError,
    ScopeClosedError,
    TransactionAbortedError,
)
from repom.middleware import DatabaseSessionMiddleware
from repom.middleware.failed_commit import raise_for
from tests.middleware.notes import (
    NOTE,
    NOWHERE,
    answer,
    chunk,
    connections_in_use,
    notes,
    notes_database,
    start,
    write,
    write_sync,
)
from tests.support.asgi import ASGIApp, Message, Receive, Scope, Send, request, websocket
from tests.support.asgi import Response as Answer
from tests.support.faultproxy import FaultProxy
from tests.support.polling import until
from tests.support.reader import execute

#: COMMIT of a note with this text loses a conflict.
LOST = "lost"

_LOSING = f"""
CREATE FUNCTION lose() RETURNS trigger LANGUAGE plpgsql AS
  $$ BEGIN RAISE EXCEPTION 'conflict' USING ERRCODE = '40001'; END $$;
CREATE CONSTRAINT TRIGGER lose AFTER INSERT ON note DEFERRABLE INITIALLY DEFERRED
  FOR EACH ROW WHEN (NEW.text = '{LOST}') EXECUTE FUNCTION lose()
"""
_CONFLICT = "DO $$ BEGIN RAISE EXCEPTION 'conflict' USING ERRCODE = '40001'; END $$"

Respond = Callable[[Send], Awaitable[object]]


@pytest.fixture
async def losing(postgres_url: str) -> AsyncIterator[Database]:
    """An empty table of notes on PostgreSQL, where COMMIT of `LOST` loses a conflict."""
    async with notes_database(postgres_url) as database:
        execute(postgres_url, _LOSING)
        yield database


async def lose() -> None:
    """Execute a statement that loses a conflict."""
    await current_session().execute(text(_CONFLICT))


async def lose_quietly() -> None:
    """The same, in code that swallows the error."""
    with contextlib.suppress(DBAPIError):
        await lose()


def attempt() -> int:
    return current_scope().attempt


class Attempts:
    """An application, with the numbers of the attempts in which it was called."""

    def __init__(self, app: ASGIApp) -> None:
        self.seen: list[int] = []
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.seen.append(attempt())
        await self._app(scope, receive, send)


async def post(
    app: ASGIApp, database: Any, *, retries: int = 3, method: str = "POST", **options: Any
) -> tuple[Answer, list[int]]:
    """Send a request; return what the client got, and the attempts it took."""
    own = {name: options.pop(name) for name in ("retry_on", "retry_body_limit") if name in options}
    attempts = Attempts(app)
    served = DatabaseSessionMiddleware(attempts, database, retries=retries, **own)
    response = await request(served, method, "/notes", **options)
    if isinstance(database, Database):
        assert connections_in_use(database) == 0
    return response, attempts.seen


def responding(respond: Respond) -> ASGIApp:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await respond(send)

    return app


def assert_created(response: Answer) -> None:
    """One response, a complete 201, and nothing has left the application."""
    assert (response.status, response.complete, response.exception) == (201, True, None)
    starts = [each for each in response.messages if each["type"] == "http.response.start"]
    assert len(starts) == 1


# --- what is repeated


async def test_conflict_at_commit(
    losing: Database, postgres_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The client gets the answer of the attempt that was committed, and nothing of those before;
    each of these has found out where it sent its answer, and is logged, but not as an error."""
    caplog.set_level(logging.INFO, "repom")
    told: list[str] = []

    async def respond(send: Send) -> None:
        await write(LOST if attempt() < 3 else "won")
        try:
            await send(start(201, (b"x-attempt", b"%d" % attempt())))
        except DBAPIError:
            told.append(f"{attempt()} refused")
            raise
        await send(chunk(b"%d" % attempt()))

    response, attempts = await post(responding(respond), losing)
    assert_created(response)
    assert (response.body, response.header("x-attempt")) == (b"3", "3")
    assert attempts == [1, 2, 3]
    assert told == ["1 refused", "2 refused"]
    assert notes(postgres_url) == ["won"]
    assert [(each.name, each.levelname) for each in caplog.records] == [("repom", "INFO")] * 2
    assert caplog.messages[1].startswith("POST /notes lost a conflict (")
    assert "; attempt 3 follows in 0.0" in caplog.messages[1]


async def leaves(send: Send) -> None:
    await lose()


async def is_answered_with_409(send: Send) -> None:
    await lose_quietly()
    await answer(send, 409)


async def is_answered_with_500_after_a_rollback(send: Send) -> None:
    """As the code of `get_db()` does that catches everything."""
    await lose_quietly()
    await current_session().rollback()
    await answer(send, 500)


async def leaves_as_another_error(send: Send) -> None:
    try:
        await lose()
    except DBAPIError as error:
        raise LookupError("the application's own") from error


async def leaves_in_a_group(send: Send) -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(lose())


async def is_swallowed_and_answered_with_201(send: Send) -> None:
    """Which is not true: PostgreSQL has aborted the transaction."""
    await lose_quietly()
    await answer(send, 201)


async def is_swallowed_and_not_answered(send: Send) -> None:
    await lose_quietly()


async def swallows_that_its_answer_is_refused(send: Send) -> None:
    await write(LOST)
    with contextlib.suppress(DBAPIError):
        await answer(send, 201)


async def answers_another_time(send: Send) -> None:
    """With an error, which after a failed COMMIT is let through otherwise."""
    await write(LOST)
    with contextlib.suppress(DBAPIError):
        await answer(send, 201)
    await answer(send, 500)


async def is_lost_in_a_scope_inside(send: Send) -> None:
    async with session_scope():
        await write(LOST)


LOSES: list[Respond] = [
    leaves,
    is_answered_with_409,
    is_answered_with_500_after_a_rollback,
    leaves_as_another_error,
    leaves_in_a_group,
    is_swallowed_and_answered_with_201,
    is_swallowed_and_not_answered,
    swallows_that_its_answer_is_refused,
    answers_another_time,
    is_lost_in_a_scope_inside,
]


@pytest.mark.parametrize("respond", LOSES, ids=lambda respond: respond.__name__)
async def test_whatever_becomes_of_the_conflict(
    losing: Database, postgres_url: str, respond: Respond
) -> None:
    """Unless it is a success that is true, the request is served again."""

    async def app(send: Send) -> None:
        if attempt() < 3:
            await write("of an attempt that has lost")
            await respond(send)
        else:
            await write("won")
            await answer(send, 201)

    response, attempts = await post(responding(app), losing)
    assert_created(response)
    assert attempts == [1, 2, 3]
    assert notes(postgres_url) == ["won"]


async def test_conflict_of_another_unit_of_work(losing: Database, postgres_url: str) -> None:
    """A request that has no session of its own can lose one, too, and answer with an error."""

    async def respond(send: Send) -> None:
        if attempt() < 3:
            with contextlib.suppress(DBAPIError):
                await is_lost_in_a_scope_inside(send)
            await answer(send, 409)
        else:
            await answer(send, 201)

    response, attempts = await post(responding(respond), losing)
    assert_created(response)
    assert attempts == [1, 2, 3]
    assert notes(postgres_url) == []


async def test_conflict_that_was_dealt_with(losing: Database, postgres_url: str) -> None:
    """In a savepoint it has hurt nothing else. The success is true, and goes out."""

    async def respond(send: Send) -> None:
        await write("a")
        with contextlib.suppress(DBAPIError):
            async with atomic():
                await lose()
        await answer(send, 201)

    response, attempts = await post(responding(respond), losing)
    assert_created(response)
    assert attempts == [1]
    assert notes(postgres_url) == ["a"]


@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_conflict_at_the_end_of_a_cursor(losing: Database, method: str) -> None:
    """A start that waits for the cursor has not been sent; one that does not has."""

    async def respond(send: Send) -> None:
        if attempt() == 1:
            await write(LOST)
        rows = await current_session().stream(select(NOTE.c.text))
        await send(start(200))
        await send(chunk(b"x", more=True))
        await rows.all()
        await send(chunk())

    response, attempts = await post(responding(respond), losing, method=method, drop_head_body=True)
    if method == "HEAD":
        assert (response.status, response.complete) == (200, True)
        assert attempts == [1, 2]
    else:
        assert (response.status, response.complete) == (200, False)
        assert attempts == [1]


async def test_own_rule(losing: Database, postgres_url: str) -> None:
    """`retry_on` says what is worth it, of errors of the application, too."""

    def retry_on(error: BaseException) -> bool:
        return isinstance(error, LookupError)

    async def respond(send: Send) -> None:
        await write(LOST if attempt() == 2 else "a")
        if attempt() == 1:
            raise LookupError
        await answer(send, 201)

    response, attempts = await post(responding(respond), losing, retry_on=retry_on)
    assert attempts == [1, 2]
    assert isinstance(response.exception, DBAPIError)
    assert notes(postgres_url) == []


async def test_several_databases(losing: Database, sqlite_url: str, postgres_url: str) -> None:
    """What one of them has lost is rolled back on all, and done again."""
    async with notes_database(sqlite_url) as other:

        async def respond(send: Send) -> None:
            await write("a" if attempt() == 2 else LOST)
            await current_session("other").execute(insert(NOTE).values(text="b"))
            await answer(send, 201)

        both = {"default": losing, "other": other}
        response, attempts = await post(responding(respond), both)
    assert_created(response)
    assert attempts == [1, 2]
    assert (notes(postgres_url), notes(sqlite_url)) == (["a"], ["b"])


async def test_database_of_the_request(losing: Database, postgres_url: str) -> None:
    """Each attempt has the one that was chosen for the request."""

    def choose(asgi_scope: Scope) -> Database:
        assert asgi_scope["path"] == "/notes"
        return losing

    async def respond(send: Send) -> None:
        await write(LOST if attempt() == 1 else "a")
        await answer(send, 201)

    response, attempts = await post(responding(respond), choose)
    assert_created(response)
    assert attempts == [1, 2]
    assert notes(postgres_url) == ["a"]


async def test_callbacks(losing: Database) -> None:
    """Those of a commit run for the one there is, those of a rollback for each. What they commit
    themselves is no obstacle."""
    ran: list[str] = []

    async def rolled_back() -> None:
        ran.append("rolled back")
        await write("audit")
        async with session_scope():
            await write("audit in a scope of its own")

    async def respond(send: Send) -> None:
        await write(LOST if attempt() == 1 else "a")
        on_commit(lambda: ran.append("committed"))
        on_rollback(rolled_back)
        await answer(send, 201)

    response, attempts = await post(responding(respond), losing)
    assert_created(response)
    assert attempts == [1, 2]
    assert ran == ["rolled back", "committed"]


def sync_endpoint(request: Request) -> Response:
    write_sync(LOST if attempt() == 1 else "a")
    return Response(status_code=201)


async def reading_endpoint(request: Request) -> Response:
    document = await request.json()
    await write(LOST if attempt() == 1 else document["text"])
    return JSONResponse({"text": document["text"]}, status_code=201)


async def streaming_endpoint(request: Request) -> Response:
    parts = [part async for part in request.stream()]
    await write(LOST if attempt() == 1 else b"".join(parts).decode())
    return StreamingResponse(iter(parts), status_code=201)


@pytest.mark.parametrize("endpoint", [sync_endpoint, reading_endpoint, streaming_endpoint])
async def test_endpoints_of_starlette(
    losing: Database, postgres_url: str, endpoint: Callable[[Request], Any]
) -> None:
    """In a thread, with a body at once, and with one piece by piece."""
    app = Starlette(routes=[Route("/notes", endpoint, methods=["POST"])])
    response, attempts = await post(app, losing, body=[b'{"text": ', b'"a"}'])
    assert_created(response)
    assert attempts == [1, 2]
    assert len(notes(postgres_url)) == 1


async def test_mounted_middleware(losing: Database, postgres_url: str) -> None:
    """The inner one joins, so the outer one repeats."""
    attempts: list[int] = []

    async def respond(send: Send) -> None:
        attempts.append(attempt())
        await write(LOST if attempt() == 1 else "a")
        await answer(send, 201)

    inner = DatabaseSessionMiddleware(responding(respond), losing, retries=9)
    for retries, expected in ((1, [1, 2]), (0, [1])):
        attempts.clear()
        response = await request(DatabaseSessionMiddleware(inner, losing, retries=retries), "POST")
        assert attempts == expected
    assert isinstance(response.exception, DBAPIError)
    assert notes(postgres_url) == ["a"]


# --- what is not


async def test_other_errors(losing: Database) -> None:
    """They are what they were."""

    async def refused(send: Send) -> None:
        await write("a", parent=NOWHERE)
        await answer(send, 201)

    async def not_found(send: Send) -> None:
        await write("a")
        await answer(send, 404)

    response, attempts = await post(responding(refused), losing)
    assert isinstance(response.exception, IntegrityError)
    assert attempts == [1]
    response, attempts = await post(responding(not_found), losing)
    assert (response.status, attempts) == (404, [1])


async def test_last_attempt(
    losing: Database, postgres_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It is answered as a request is that is not repeated at all: here the failure leaves, says
    how often it was tried, and is logged once."""

    async def respond(send: Send) -> None:
        await write(LOST)
        await answer(send, 201)

    response, attempts = await post(responding(respond), losing, retries=2)
    assert attempts == [1, 2, 3]
    assert response.sent == []
    assert isinstance(response.exception, DBAPIError)
    assert response.exception.__notes__ == ["It was attempt 3, the last one."]
    assert [each.getMessage() for each in caplog.records if each.levelname == "ERROR"] == [
        "COMMIT of POST /notes failed"
    ]
    assert notes(postgres_url) == []


async def test_last_attempt_that_the_application_answers(losing: Database) -> None:
    """Its 409 goes out, and so does the answer of its own handler for a failed COMMIT."""

    async def handled(send: Send) -> None:
        await lose_quietly()
        await answer(send, 409)

    response, attempts = await post(responding(handled), losing, retries=1)
    assert (response.status, response.complete, attempts) == (409, True, [1, 2])

    async def framework(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            raise_for(scope)
            await write(LOST)
        except DBAPIError:
            await answer(send, 503)
        else:
            await answer(send, 201)

    response, attempts = await post(framework, losing, retries=1)
    assert (response.status, response.exception) == (503, None)
    assert attempts == [1, 2, 2]  # with the call for the handler


async def test_off(losing: Database) -> None:
    """Without `retries` nothing is watched, kept or repeated."""

    async def respond(send: Send) -> None:
        assert current_scope().observer is None
        await write(LOST)
        await answer(send, 201)

    response, attempts = await post(responding(respond), losing, retries=0)
    assert attempts == [1]
    assert isinstance(response.exception, DBAPIError)


async def hints(send: Send) -> None:
    await send({"type": "http.response.early_hint", "links": [b"</a.css>; rel=preload"]})


async def streams(send: Send) -> None:
    await send(start(200))
    await send(chunk(b"x", more=True))
    await write("b")


async def commits_early(send: Send) -> None:
    await current_scope().commit()


async def commits_apart(send: Send) -> None:
    async with session_scope():
        await write("b")


async def commits_by_hand(send: Send) -> None:
    async with current_scope().databases["default"].sessionmaker.begin() as session:
        await session.execute(insert(NOTE).values(text="b"))


OBSTACLES: dict[Respond, str] = {
    hints: "a part of its response has been sent",
    streams: "a part of its response has been sent",
    commits_early: "something was committed apart from its transaction",
    commits_apart: "something was committed apart from its transaction",
    commits_by_hand: "something was committed apart from its transaction",
}


@pytest.mark.parametrize("ends", [leaves, answers_another_time], ids=["statement", "commit"])
@pytest.mark.parametrize("obstacle", OBSTACLES, ids=lambda obstacle: obstacle.__name__)
async def test_request_that_cannot_be_repeated(
    losing: Database,
    caplog: pytest.LogCaptureFixture,
    obstacle: Respond,
    ends: Respond,
) -> None:
    """What cannot be taken back has happened. The answer is what it is without retries, and the
    log says why."""
    caplog.set_level(logging.INFO, "repom.middleware")

    async def respond(send: Send) -> None:
        await write("a")
        await obstacle(send)
        if obstacle is streams and ends is answers_another_time:
            await write(LOST)
            await send(chunk())
        await ends(send)

    response, attempts = await post(
        responding(respond), losing, extensions=["http.response.early_hint"]
    )
    assert attempts == [1]
    why = f"POST /notes has lost a conflict, and is not repeated: {OBSTACLES[obstacle]}"
    if response.exception is None:
        assert (response.status, ends) == (500, answers_another_time)
    else:
        assert is_conflict(response.exception)
        assert caplog.messages.count(why) == 1


async def test_allowed_inner_commit(losing: Database, postgres_url: str) -> None:
    seen: list[int] = []

    async def respond(send: Send) -> None:
        seen.append(attempt())
        await write("a")
        await current_session().commit()
        await lose()

    app = DatabaseSessionMiddleware(responding(respond), losing, inner_commits="allow", retries=3)
    response = await request(app, "POST")
    assert isinstance(response.exception, DBAPIError)
    assert (seen, notes(postgres_url)) == ([1], ["a"])


async def test_background_task(losing: Database, postgres_url: str) -> None:
    """The client has its answer."""

    async def respond(send: Send) -> None:
        await write("a")
        await answer(send, 201)
        await lose()

    response, attempts = await post(responding(respond), losing)
    assert (response.status, response.complete, attempts) == (201, True, [1])
    assert isinstance(response.exception, DBAPIError)
    assert notes(postgres_url) == ["a"]


async def test_cancelled_request(losing: Database) -> None:
    """A cancellation is no conflict, though there was one."""

    async def respond(send: Send) -> None:
        await lose_quietly()
        raise asyncio.CancelledError

    response, attempts = await post(responding(respond), losing)
    assert isinstance(response.exception, asyncio.CancelledError)
    assert attempts == [1]


async def test_note_of_a_failure(losing: Database, postgres_url: str) -> None:
    """What the application commits when it has been refused its answer stays, so the request is
    not served again; its handler answers after all."""

    async def framework(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            raise_for(scope)
            await write(LOST)
        except DBAPIError:
            await answer(send, 409)
            return
        try:
            await answer(send, 201)
        except DBAPIError:
            async with session_scope():
                await write("audit")
            raise

    response, attempts = await post(framework, losing)
    assert (response.status, response.exception) == (409, None)
    assert attempts == [1, 1]
    assert notes(postgres_url) == ["audit"]


def always(error: BaseException) -> bool:
    return True


async def test_outcome_that_is_not_known(postgres_url: str) -> None:
    """Whatever `retry_on` says."""
    async with FaultProxy(postgres_url) as proxy, notes_database(postgres_url) as database:
        behind = Database(f"{proxy.url}?sslmode=disable")

        async def respond(send: Send) -> None:
            await lose_quietly()
            await current_session().rollback()
            await write("a")
            proxy.cut(b"COMMIT", "after")
            await answer(send, 201)

        response, attempts = await post(responding(respond), behind, retry_on=always)
        await behind.dispose()
    assert isinstance(response.exception, CommitOutcomeUnknown)
    assert (attempts, notes(postgres_url)) == ([1], ["a"])
    assert database


async def test_half_a_commit(losing: Database, sqlite_url: str) -> None:
    """One database has committed."""
    async with notes_database(sqlite_url) as other:

        async def respond(send: Send) -> None:
            await current_session("other").execute(insert(NOTE).values(text="b"))
            await write(LOST)
            await answer(send, 201)

        both = {"other": other, "default": losing}
        response, attempts = await post(responding(respond), both, retry_on=always)
    assert isinstance(response.exception, PartialCommitError)
    assert (attempts, notes(sqlite_url)) == ([1], ["b"])


async def test_websocket_is_left_alone(losing: Database) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope["type"])
        await receive()
        await send({"type": "websocket.accept"})
        async with session_scope(losing):
            await lose()

    seen: list[str] = []
    async with websocket(DatabaseSessionMiddleware(app, losing, retries=3), "/") as connection:
        pass
    assert isinstance(connection.exception, DBAPIError)
    assert seen == ["websocket"]


def test_less_than_never_is_refused(sqlite_url: str) -> None:
    with pytest.raises(ValueError, match="retries=-1"):
        DatabaseSessionMiddleware(responding(answer), sqlite_url, retries=-1)


# --- what an attempt finds


async def read_all(receive: Receive) -> list[bytes]:
    parts: list[bytes] = []
    more = True
    while more:
        message = await receive()
        parts.append(message["body"])
        more = message["more_body"]
        message.clear()  # it is this attempt's own
    return parts


@pytest.mark.parametrize("reads", [0, 1, 3])
async def test_body_is_given_again(losing: Database, reads: int) -> None:
    """From its beginning, in the same pieces, however much the attempt before has read."""
    bodies: list[list[bytes]] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if attempt() == 1:
            for _ in range(reads):
                await receive()
            await lose()
        bodies.append(await read_all(receive))
        await answer(send, 201)

    response, attempts = await post(app, losing, body=[b"a", b"b", b"c"])
    assert_created(response)
    assert (attempts, bodies) == ([1, 2], [[b"a", b"b", b"c"]])


@pytest.mark.parametrize("limit", [2, 3])
async def test_long_body(losing: Database, limit: int, caplog: pytest.LogCaptureFixture) -> None:
    """Is read by the one attempt there is; it is not kept."""
    caplog.set_level(logging.INFO, "repom.middleware")
    bodies: list[list[bytes]] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        bodies.append(await read_all(receive))
        await write(LOST if attempt() == 1 else "a")
        await answer(send, 201)

    body = [b"a", b"b", b"c"]
    response, attempts = await post(app, losing, body=body, retry_body_limit=limit)
    assert bodies == [body] * len(attempts)
    if limit == 3:
        assert_created(response)
        assert attempts == [1, 2]
    else:
        assert attempts == [1]
        assert isinstance(response.exception, DBAPIError)
        assert caplog.messages[-1].endswith("not repeated: its body has more than 2 bytes")


async def test_two_tasks_that_read(losing: Database) -> None:
    """Each message goes to one of them."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        messages = await asyncio.gather(receive(), receive())
        assert sorted(message["body"] for message in messages) == [b"a", b"b"]
        await write(LOST if attempt() == 1 else "a")
        await answer(send, 201)

    response, attempts = await post(app, losing, body=[b"a", b"b"])
    assert_created(response)
    assert attempts == [1, 2]


async def test_scope_is_as_it_was(losing: Database) -> None:
    """The same object in each attempt, with what was in it at first; what the last one has left
    there is seen by the layers outside."""
    seen: list[dict[str, Any]] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        del scope["repom.scope"]
        assert "route" not in scope
        assert scope["path"] == "/notes"
        seen.append({"state": {**scope["state"]}, "headers": list(scope["headers"])})
        scope["route"] = f"attempt {attempt()}"
        scope["path"] = "/mounted"
        scope["state"]["user"] = attempt()
        scope["headers"].append((b"x-added", b"1"))
        await write(LOST if attempt() == 1 else "a")
        await answer(send, 201)

    attempts = Attempts(app)
    served = DatabaseSessionMiddleware(attempts, losing, retries=3)

    async def outside(scope: Scope, receive: Receive, send: Send) -> None:
        state = scope["state"]

        async def sending(message: Message) -> None:
            assert scope["route"] == "attempt 2"
            await send(message)

        await served(scope, receive, sending)
        assert scope["route"] == "attempt 2"
        assert state is scope["state"]
        assert state == {"pool": 1, "user": 2}

    response = await request(outside, "POST", "/notes", state={"pool": 1})
    assert_created(response)
    assert attempts.seen == [1, 2]
    assert seen == [{"state": {"pool": 1}, "headers": seen[0]["headers"]}] * 2


# --- what an attempt leaves


async def test_tasks_of_an_attempt_that_has_lost(losing: Database, postgres_url: str) -> None:
    """They can neither answer nor use the database, and take nothing of what comes for the next
    attempt: for them the client is gone, also if they have been waiting all the time."""
    tasks: list[asyncio.Task[Any]] = []
    arriving: asyncio.Queue[Message] = asyncio.Queue()

    async def left_over(receive: Receive, send: Send) -> None:
        session = current_session()
        for message in await asyncio.gather(receive(), receive()):
            assert message == {"type": "http.disconnect"}
        assert await receive() == {"type": "http.disconnect"}
        with pytest.raises(ScopeClosedError):
            await session.execute(text("SELECT 1"))
        await answer(send, 200)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if attempt() == 1:
            assert (await receive())["body"] == b"a"
            tasks.append(asyncio.create_task(left_over(receive, send)))
            await asyncio.sleep(0)
            await lose()
        arriving.put_nowait({"type": "http.request", "body": b"b", "more_body": False})
        assert await read_all(receive) == [b"a", b"b"]
        with pytest.raises(ScopeClosedError, match=r"sent http\.response\.start after"):
            await tasks[0]
        await write("a")
        await answer(send, 201)

    attempts = Attempts(app)
    served = DatabaseSessionMiddleware(attempts, losing, retries=3)

    async def server(scope: Scope, receive: Receive, send: Send) -> None:
        arriving.put_nowait({"type": "http.request", "body": b"a", "more_body": True})
        await served(scope, arriving.get, send)

    response = await request(server, "POST")
    assert_created(response)
    assert attempts.seen == [1, 2]
    assert notes(postgres_url) == ["a"]


async def test_nothing_waits_for_the_garbage_collector(
    losing: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """No cycle keeps an attempt or its error alive."""
    caplog.set_level(logging.CRITICAL, "repom")  # the log would keep the errors
    await losing.ping()  # a connection keeps the context in which it was opened
    alive: list[weakref.ref[Any]] = []

    # Not an error of the driver: in those, SQLAlchemy itself leaves a cycle.
    class LostError(Exception):
        pass

    def fail(session: Session) -> None:
        raise LostError

    async def respond(send: Send) -> None:
        session = current_session()
        alive.extend(map(weakref.ref, (current_scope(), session, session.sync_session)))
        await write("a")
        if attempt() == 1:
            raise LostError
        if attempt() == 2:
            event.listen(session.sync_session, "before_commit", fail)
        await answer(send, 201)

    app = DatabaseSessionMiddleware(
        responding(respond), losing, retries=2, retry_on=lambda e: isinstance(e, LostError)
    )
    gc.collect()
    gc.disable()
    try:
        response = await request(app, "POST")
        assert [each() for each in alive] == [None] * 9
    finally:
        gc.enable()
    assert_created(response)


async def test_pooled_connection_keeps_no_request(losing: Database) -> None:
    """It keeps the context in which it was opened, and so the unit of work, but no more of it."""

    class Request(dict[str, Any]):
        """An ASGI scope that can be watched."""

    async def respond(send: Send) -> None:
        units.append(current_scope())
        await write("a")
        await answer(send, 201)

    async def receive() -> Message:
        raise AssertionError("nobody asks for the body")

    async def send(message: Message) -> None:
        sent.append(message)

    units: list[object] = []
    sent: list[Message] = []
    asgi_scope = Request(type="http", method="POST", path="/", headers=[])
    alive = weakref.ref(asgi_scope)
    await DatabaseSessionMiddleware(responding(respond), losing, retries=1)(
        asgi_scope, receive, send
    )
    del asgi_scope
    assert alive() is None
    assert len(units) == 1
    assert sent[0]["status"] == 201


class Layer(BaseHTTPMiddleware):
    """As many applications have: it reads the body, and answers for all errors."""

    async def dispatch(self, request: Request, call_next: Any) -> Response:
        assert await request.body() == b"ab"
        try:
            response: Response = await call_next(request)
        except DBAPIError:
            return Response(status_code=500)
        return response


@pytest.mark.parametrize("place", ["inside", "outside"])
@pytest.mark.parametrize("loses", ["in a statement", "at commit"])
async def test_base_http_middleware(
    losing: Database, postgres_url: str, place: str, loses: str
) -> None:
    """Around the application or around repom, it runs what is inside in a task of its own."""

    async def endpoint(request: Request) -> Response:
        await write(LOST if attempt() == 1 and loses == "at commit" else "a")
        if attempt() == 1 and loses == "in a statement":
            await lose()
        return Response(await request.body(), status_code=201)

    ours = Middleware(DatabaseSessionMiddleware, database=losing, retries=1)
    layers = [ours, Middleware(Layer)] if place == "inside" else [Middleware(Layer), ours]
    app = Starlette(routes=[Route("/", endpoint, methods=["POST"])], middleware=layers)
    response = await request(app, "POST", body=[b"a", b"b"])
    assert_created(response)
    assert (response.body, notes(postgres_url)) == (b"ab", ["a"])


# --- a client that leaves


async def test_client_that_has_left_before(
    losing: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """If the application has been told so."""
    caplog.set_level(logging.INFO, "repom.middleware")

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        assert (await receive())["type"] == "http.disconnect"
        await lose()

    response, attempts = await post(app, losing, disconnect_after=0)
    assert isinstance(response.exception, DBAPIError)
    assert attempts == [1]
    assert caplog.messages == [
        "POST /notes has lost a conflict, and is not repeated: the client is gone"
    ]


async def test_client_that_leaves_in_the_pause(
    losing: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody waits for another attempt. That is noticed at once."""
    monkeypatch.setattr("repom.retry.pause_before", lambda attempt: 30.0)
    has_lost, has_left = asyncio.Event(), asyncio.Event()
    messages = [{"type": "http.request", "body": b"", "more_body": False}]

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        has_lost.set()
        await lose()

    attempts = Attempts(app)
    served = DatabaseSessionMiddleware(attempts, losing, retries=3)

    async def server(scope: Scope, receive: Receive, send: Send) -> None:
        async def leaving() -> Message:
            if messages:
                return messages.pop()
            await has_left.wait()
            return {"type": "http.disconnect"}

        await served(scope, leaving, send)

    async with asyncio.timeout(10):
        task = asyncio.create_task(request(server, "POST"))
        await has_lost.wait()
        has_left.set()
        response = await task
    assert isinstance(response.exception, DBAPIError)
    assert attempts.seen == [1]


async def test_cancelled_in_the_pause(losing: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by a server whose client is gone: at once, and with nothing left open."""
    monkeypatch.setattr("repom.retry.pause_before", lambda attempt: 30.0)
    attempts = Attempts(responding(leaves))
    app = DatabaseSessionMiddleware(attempts, losing, retries=3)
    task = asyncio.create_task(request(app, "POST"))
    await until(lambda: attempts.seen == [1] and connections_in_use(losing) == 0)
    await asyncio.sleep(0.01)  # into the pause
    assert connections_in_use(losing) == 0
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert attempts.seen == [1]


async def test_swallowed_conflict_without_retries(losing: Database) -> None:
    """Stays what it is: an error that says that nothing was committed."""
    response, attempts = await post(
        responding(is_swallowed_and_answered_with_201), losing, retries=0
    )
    assert isinstance(response.exception, TransactionAbortedError)
    assert attempts == [1]
