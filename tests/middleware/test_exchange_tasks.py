"""A request that is cancelled, or has several tasks; what it costs and leaves behind."""

import asyncio
import contextlib
import gc
import logging
import sys
import weakref
from collections.abc import Iterator
from typing import Any

import anyio
import pytest
from sqlalchemy import event, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from repom import Database, current_scope, current_session, on_commit
from repom.errors import (
    ScopeClosedError,
    ScopeError,
)
from repom.middleware import DatabaseSessionMiddleware
from tests.middleware.held import HeldCommit
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
)
from tests.support.asgi import ASGIApp, Message, Receive, Scope, Send, request

START = "http.response.start"
BODY = "http.response.body"


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
    """COMMIT ends all the same, the message that tells of it leaves, with an empty chunk for who
    would keep it until the body begins, and then the cancellation: an outer layer that has not
    seen a response might otherwise answer with an error."""
    wire: list[Message] = []
    after_start: list[bool] = []

    async def respond(send: Send) -> None:
        await write("a")
        await send(start(201))
        after_start.append(True)

    await cancelled_during_commit(serve(held.database, respond), held, wire)
    assert wire == [start(201), chunk(more=True)]
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
    database: Database,
    database_url: str,
    caplog: pytest.LogCaptureFixture,
    after_disconnect: Any,
) -> None:
    """COMMIT had succeeded when the response could not be sent: it stays, nothing is leaked, and
    nobody says that it has failed."""

    async def respond(send: Send) -> None:
        await write("a")
        await answer(send, 201)

    response = await request(
        serve(database, respond), "POST", disconnect_after=0, after_disconnect=after_disconnect
    )
    assert isinstance(response.exception, OSError) is (after_disconnect == "raise")
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert notes(database_url) == ["a"]
    assert connections_in_use(database) == 0


@pytest.mark.parametrize("cancels", [1, 2])
async def test_cancelled_while_the_start_waits_for_a_congested_connection(
    database: Database, database_url: str, cancels: int
) -> None:
    """The start that tells of a COMMIT leaves all the same. Lost, the server would answer with an
    error of its own."""

    async def respond(send: Send) -> None:
        await write("a")
        await answer(send, 201)

    app = serve(database, respond)

    async def server(scope: Scope, receive: Receive, send: Send) -> None:
        task = asyncio.current_task()
        assert task is not None
        is_started = False

        async def congested(message: Message) -> None:
            nonlocal is_started
            if not is_started:
                drained = asyncio.Event()
                loop = asyncio.get_running_loop()
                for _ in range(cancels):
                    loop.call_soon(task.cancel)
                loop.call_later(0.01, drained.set)
                await drained.wait()
            await send(message)
            is_started = True

        try:
            await app(scope, receive, congested)
        finally:
            if not is_started:
                await answer(send, 500)

    response = await request(server, "POST")
    assert (response.status, notes(database_url)) == (201, ["a"])
    assert isinstance(response.exception, asyncio.CancelledError)
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


@pytest.mark.parametrize("ends", ["returns", "raises", "is cancelled"])
async def test_app_that_ends_while_a_task_of_it_is_about_to_answer(
    database: Database, database_url: str, ends: str
) -> None:
    """The work is committed, so that is what the client hears, and not of the end of the app."""
    going_on = asyncio.Event()
    tasks: list[asyncio.Task[None]] = []

    async def respond(send: Send) -> None:
        called = asyncio.Event()

        async def call_and_wait() -> None:
            called.set()
            await going_on.wait()

        await write("a")
        on_commit(call_and_wait)
        tasks.append(asyncio.create_task(answer(send, 201)))
        await called.wait()
        asyncio.get_running_loop().call_later(0.02, going_on.set)
        if ends == "raises":
            raise ZeroDivisionError
        if ends == "is cancelled":
            here = asyncio.current_task()
            assert here is not None
            here.cancel()
            await asyncio.sleep(0)

    response = await request(serve(database, respond), "POST")
    assert (response.status, notes(database_url)) == (201, ["a"])
    left = {"returns": type(None), "raises": ZeroDivisionError}
    assert type(response.exception) is left.get(ends, asyncio.CancelledError)
    await asyncio.wait(tasks)
    assert connections_in_use(database) == 0


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
