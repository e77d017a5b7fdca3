"""Work after the response, and tasks that outlive it: what was answered stays true.

Background tasks run in the request's scope, in one more transaction, which the return of the
application commits: not after an error response, not if one of them fails, and not at all if the
response could not be committed. A task that nobody awaits is a part of its unit of work for as
long as that lasts; from then on it is told to open its own. Connections are held while they are
used, and a server that stops leaves none.

More of this: tests/middleware/test_exchange.py and test_exchange_tasks.py (raw ASGI),
tests/middleware/test_starlette.py (after a failed COMMIT), tests/promise/test_sync_side.py
(sync tasks, threads that are left over), tests/test_gate.py (statements of sibling tasks).
"""

import asyncio
import contextvars
import logging
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import anyio
import anyio.to_thread
import pytest
from fastapi import BackgroundTasks, Depends, FastAPI, HTTPException, Response
from fastapi.responses import PlainTextResponse, StreamingResponse
from sqlalchemy import insert, select
from sqlalchemy.exc import IntegrityError
from starlette.concurrency import run_in_threadpool
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request

from repom import (
    Database,
    atomic,
    current_scope,
    current_session,
    current_sync_session,
    on_commit,
    session_scope,
    sync_session_scope,
)
from repom.async_session import get_async_db_session
from repom.errors import MixedSessionsError, NoScopeError, ScopeClosedError, WouldDeadlockError
from repom.middleware import DatabaseSessionMiddleware
from tests.middleware.notes import (
    NOTE,
    NOWHERE,
    connections_in_use,
    notes,
    notes_database,
    write,
    write_sync,
)
from tests.promise.served import notes_at, serving
from tests.support.asgi import Message, request
from tests.support.asgi import Response as Answer
from tests.support.polling import block_until, until
from tests.support.sockets import post

Work = Callable[[], Coroutine[Any, Any, object]]
Task = Callable[[], object]


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    """An empty table of notes, on each kind of database."""
    async with notes_database(database_url) as database:
        yield database


@pytest.fixture(params=["sqlite_url", "postgres_url"])
def deferring_url(request: pytest.FixtureRequest) -> str:
    """The URL of a database that finds a wrong parent of a note at COMMIT."""
    url: str = request.getfixturevalue(request.param)
    return url


async def conflict(request: Request, error: Exception) -> Response:
    return PlainTextResponse("conflict", 409)


def bare_app(database: Database) -> FastAPI:
    """An application with the middleware that answers 409 for an `IntegrityError`."""
    app = FastAPI(exception_handlers={IntegrityError: conflict})
    app.add_middleware(DatabaseSessionMiddleware, database)
    return app


# --- how an application gives a response its background tasks


def of_the_response(app: FastAPI, work: Work, tasks: list[Task], status: int) -> None:
    """Starlette's own way."""

    async def endpoint(request: Request) -> Response:
        await work()
        return PlainTextResponse("answer", status, background=in_order(tasks))

    app.add_route("/", endpoint, methods=["POST"])


def of_a_stream(app: FastAPI, work: Work, tasks: list[Task], status: int) -> None:
    """The same, for a body that comes in pieces."""

    async def endpoint(request: Request) -> Response:
        await work()
        return StreamingResponse(iter(["ans", "wer"]), status, background=in_order(tasks))

    app.add_route("/", endpoint, methods=["POST"])


def of_the_endpoint(app: FastAPI, work: Work, tasks: list[Task], status: int) -> None:
    """FastAPI's way."""

    async def endpoint(later: BackgroundTasks) -> str:
        await work()
        later.tasks.extend(in_order(tasks).tasks)
        return "answer"

    app.post("/", status_code=status, response_class=PlainTextResponse)(endpoint)


def behind_layers(app: FastAPI, work: Work, tasks: list[Task], status: int) -> None:
    """Starlette's, with a `BaseHTTPMiddleware` on either side of repom's middleware."""

    async def passing(request: Request, call_next: Any) -> Any:
        return await call_next(request)

    of_the_response(app, work, tasks, status)
    ours = app.user_middleware.pop()
    app.add_middleware(BaseHTTPMiddleware, dispatch=passing)
    app.user_middleware.insert(0, ours)
    app.add_middleware(BaseHTTPMiddleware, dispatch=passing)


def in_order(tasks: list[Task]) -> BackgroundTasks:
    later = BackgroundTasks()
    for task in tasks:
        later.add_task(task)
    return later


WAYS = [of_the_response, of_a_stream, of_the_endpoint, behind_layers]
EACH_WAY = pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
Way = Callable[[FastAPI, Work, list[Task], int], None]


def app_of(database: Database, way: Way, work: Work, *tasks: Task, status: int = 201) -> FastAPI:
    """An application that does `work`, answers, and then does the tasks."""
    app = bare_app(database)
    way(app, work, list(tasks), status)
    return app


async def write_a() -> None:
    await write("a")


# --- one transaction, after the one of the response


@EACH_WAY
async def test_tasks_share_one_transaction(database: Database, database_url: str, way: Way) -> None:
    """They begin when the client has the complete response, see what it tells of, and are
    committed together."""
    seen: list[list[str]] = []

    async def first() -> None:
        seen.append(notes(database_url))
        await write("first")

    async def second() -> None:
        seen.append(notes(database_url))
        found = await current_session().scalars(select(NOTE.c.text).order_by(NOTE.c.id))
        seen.append(list(found))
        await write("second")

    def look(message: Message) -> None:
        seen.append(notes(database_url))

    response = await request(app_of(database, way, write_a, first, second), "POST", on_message=look)
    assert (response.status, response.body, response.exception) == (201, b"answer", None)
    assert seen == [["a"]] * (len(response.messages) + 2) + [["a", "first"]]
    assert notes(database_url) == ["a", "first", "second"]
    assert connections_in_use(database) == 0


@EACH_WAY
async def test_task_that_fails(database: Database, database_url: str, way: Way) -> None:
    """Starlette does not run those after it, and what those before it have begun is undone. What
    has a transaction of its own stays, and so does the response."""

    async def own() -> None:
        async with session_scope():
            await write("own")

    async def first() -> None:
        await write("first")

    async def second() -> None:
        raise LookupError

    async def third() -> None:
        await write("third")

    app = app_of(database, way, write_a, own, first, second, third)
    response = await request(app, "POST")
    assert (response.status, response.body, response.complete) == (201, b"answer", True)
    assert isinstance(response.exception, LookupError)
    assert notes(database_url) == ["a", "own"]
    assert connections_in_use(database) == 0


@EACH_WAY
async def test_tasks_of_a_response_that_could_not_be_committed(
    deferring_url: str, way: Way
) -> None:
    """They do not run: it was not sent."""
    ran: list[str] = []

    async def refused() -> None:
        await write("a", parent=NOWHERE)

    async with notes_database(deferring_url) as database:
        app = app_of(database, way, refused, lambda: ran.append("sync"))
        response = await request(app, "POST")
        assert connections_in_use(database) == 0
    assert (response.status, response.body, response.exception) == (409, b"conflict", None)
    assert ran == []
    assert notes(deferring_url) == []


@EACH_WAY
async def test_tasks_that_cannot_be_committed(
    deferring_url: str, way: Way, caplog: pytest.LogCaptureFixture
) -> None:
    """The response stays, the failure is logged with the route."""

    async def refused() -> None:
        await write("later", parent=NOWHERE)

    async with notes_database(deferring_url) as database:
        response = await request(app_of(database, way, write_a, refused), "POST")
        assert connections_in_use(database) == 0
    assert (response.status, response.body, response.complete) == (201, b"answer", True)
    assert isinstance(response.exception, IntegrityError)
    assert "COMMIT of POST / failed" in caplog.messages
    assert notes(deferring_url) == ["a"]


@EACH_WAY
async def test_tasks_after_an_error_response(
    database: Database, database_url: str, way: Way, caplog: pytest.LogCaptureFixture
) -> None:
    """What they begin is rolled back, and a warning tells to write `session_scope()`, with which
    it stays."""

    async def own() -> None:
        async with session_scope():
            await write("audit")

    async def shared() -> None:
        await write("later")

    response = await request(app_of(database, way, write_a, own, shared, status=404), "POST")
    assert (response.status, response.body, response.exception) == (404, b"answer", None)
    assert notes(database_url) == ["audit"]
    (record,) = [record for record in caplog.records if record.name == "repom.middleware"]
    assert record.levelname == "WARNING"
    assert "POST / was answered by an error; " in record.getMessage()
    assert "`async with session_scope()`" in record.getMessage()
    assert connections_in_use(database) == 0


@pytest.mark.parametrize("status", [201, 404])
async def test_task_that_begins_nothing_is_not_warned_of(
    database: Database, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    """A mail, or a transaction of its own, after whatever response."""

    async def own() -> None:
        async with session_scope():
            await write("own")

    app = app_of(database, of_the_response, write_a, own, lambda: None, status=status)
    assert (await request(app, "POST")).status == status
    assert caplog.messages == []


async def test_scope_of_its_own_while_the_shared_transaction_is_open(
    database: Database, database_url: str
) -> None:
    """It is independent. SQLite has one writer, which would wait for itself: there an error says
    so at once."""
    refused: list[WouldDeadlockError] = []

    async def shared() -> None:
        await write("shared")

    async def own() -> None:
        try:
            async with session_scope():
                await write("own")
        except WouldDeadlockError as error:
            refused.append(error)
        raise LookupError

    await request(app_of(database, of_the_response, write_a, shared, own), "POST")
    assert len(refused) == database.is_sqlite
    assert notes(database_url) == ["a"] + ["own"] * (not database.is_sqlite)
    assert connections_in_use(database) == 0


async def test_deliberate_commit_between_tasks(database: Database, database_url: str) -> None:
    """What it has committed is not undone by a task that fails after it."""

    async def first() -> None:
        await write("first")
        await current_scope().commit()
        await write("second")
        raise LookupError

    response = await request(app_of(database, of_the_response, write_a, first), "POST")
    assert isinstance(response.exception, LookupError)
    assert notes(database_url) == ["a", "first"]


async def test_task_that_is_a_dry_run(
    database: Database, database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """`rollback_only()` is for the transaction of the tasks, and is told of at INFO."""
    caplog.set_level(logging.INFO, logger="repom.middleware")

    async def dry_run() -> None:
        await write("later")
        current_scope().rollback_only()

    response = await request(app_of(database, of_the_response, write_a, dry_run), "POST")
    assert (response.status, response.exception) == (201, None)
    assert notes(database_url) == ["a"]
    assert caplog.messages == ["POST / was rolled back: rollback_only() was called"]


async def test_callbacks_of_tasks(database: Database, database_url: str) -> None:
    """`on_commit` in a task waits for the transaction of the tasks, and is dropped with it."""
    told: list[tuple[str, list[str]]] = []

    async def announces() -> None:
        await write("later")
        on_commit(lambda: told.append(("later", notes(database_url))))

    async def fails() -> None:
        raise LookupError

    await request(app_of(database, of_the_response, write_a, announces), "POST")
    assert told == [("later", ["a", "later"])]
    other = app_of(database, of_the_response, lambda: write("b"), announces, fails)
    await request(other, "POST")
    assert len(told) == 1


# --- sync tasks


@pytest.mark.parametrize("status", [201, 404])
async def test_sync_tasks(
    database: Database, database_url: str, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    """In a thread, `current_sync_session()` is the request's: the tasks share one transaction,
    also with an endpoint in a thread, under the same rules."""
    sessions = set()

    def later(text: str) -> None:
        sessions.add(current_sync_session())
        write_sync(text)

    async def work() -> None:
        await run_in_threadpool(later, "a")

    tasks = (lambda: later("first"), lambda: later("second"))
    response = await request(app_of(database, of_the_endpoint, work, *tasks, status=status), "POST")
    assert (response.status, response.exception, len(sessions)) == (status, None, 1)
    assert notes(database_url) == (["a", "first", "second"] if status == 201 else [])
    assert len(caplog.messages) == (status == 404)
    assert database.engine.pool.checkedout() == 0  # type: ignore[attr-defined]


async def test_sync_task_of_an_async_request(database: Database, database_url: str) -> None:
    """A request has one kind of session: the other is refused, and the error names the ways out,
    one of which is a unit of work of its own."""

    def shared() -> None:
        write_sync("shared")

    def own() -> None:
        with sync_session_scope():
            write_sync("own")

    response = await request(app_of(database, of_the_endpoint, write_a, own, shared), "POST")
    assert (response.status, response.complete) == (201, True)
    assert isinstance(response.exception, MixedSessionsError)
    assert "a unit of work of its own" in str(response.exception)
    assert notes(database_url) == ["a", "own"]
    assert connections_in_use(database) == 0


# --- over a real server


@EACH_WAY
def test_failing_task_of_a_served_application(
    database_url: str, way: Way, caplog: pytest.LogCaptureFixture
) -> None:
    """The client has its 201, the server's log the error; the next request is served."""
    ran: list[str] = []

    async def fails() -> None:
        ran.append("task")
        await write(f"later {len(ran)}")
        raise LookupError("of the task")

    async def work() -> None:
        await write(str(len(ran)))

    with (
        notes_at(database_url) as database,
        serving(database, app_of(database, way, work, fails)) as served,
    ):

        def post_again(rows: list[str]) -> None:
            assert post(served.base_url) == 201
            assert notes(database_url) == rows
            # Not `len(ran)`: the task may begin after the client has its response.
            block_until(lambda: len(errors_of(caplog)) == len(rows))
            served.assert_nothing_open()

        post_again(["0"])
        post_again(["0", "1"])
    assert errors_of(caplog) == ["of the task", "of the task"]
    assert notes(database_url) == ["0", "1"]


def errors_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the server has logged of exceptions that reached it."""
    return [
        str(record.exc_info[1])
        for record in caplog.records
        if record.name == "uvicorn.error" and record.exc_info
    ]


@EACH_WAY
def test_slow_task_of_a_served_application(database_url: str, way: Way) -> None:
    """The client has the response and goes; while the task waits, others are served with the one
    connection there is, which the task has only for as long as its transaction is open."""
    begun, may_write, may_end = threading.Event(), threading.Event(), threading.Event()

    async def slow() -> None:
        begun.set()
        await until(may_write.is_set)
        await write("slow")
        await current_scope().commit()
        may_write.clear()
        await until(may_end.is_set)
        await write("end")

    pool = {"pool_size": 1, "max_overflow": 0, "pool_timeout": 5}
    with notes_at(database_url, **pool) as database:
        app = app_of(database, way, write_a, slow)

        @app.post("/{text}", status_code=201)
        async def other(text: str) -> None:
            await write(text)

        with serving(database, app) as served:
            assert post(served.base_url) == 201
            assert begun.wait(10)
            served.assert_nothing_open()
            assert post(f"{served.base_url}/b") == 201
            may_write.set()
            block_until(lambda: not may_write.is_set())
            assert notes(database_url) == ["a", "b", "slow"]
            served.assert_nothing_open()
            assert post(f"{served.base_url}/c") == 201
            may_end.set()
            block_until(lambda: "end" in notes(database_url))
            block_until(lambda: served.in_use == 0)
    assert notes(database_url) == ["a", "b", "slow", "c", "end"]


def test_slow_task_that_holds_a_transaction(database_url: str) -> None:
    """Others are served beside it, on connections of their own."""
    may_end = threading.Event()

    async def slow() -> None:
        await write("slow")
        await until(may_end.is_set)

    with notes_at(database_url, pool_size=2, max_overflow=0, pool_timeout=5) as database:
        app = app_of(database, of_the_response, write_a, slow)

        @app.post("/count", status_code=201)
        async def count() -> None:
            async with session_scope(sqlite_begin="DEFERRED") as session:
                assert (await session.scalars(select(NOTE.c.text))).all() == ["a"]

        with serving(database, app) as served:
            assert post(served.base_url) == 201
            block_until(lambda: served.in_use == 1)
            assert post(f"{served.base_url}/count") == 201
            assert served.in_use == 1
            may_end.set()
            block_until(lambda: served.in_use == 0)
            served.assert_nothing_open()
    assert notes(database_url) == ["a", "slow"]


@pytest.mark.parametrize(
    ("kind", "rows"),
    [
        ("ends in time", ["a", "own", "shared"]),
        ("hangs", ["a"]),
        ("hangs in its own", ["a"]),
        ("left over", ["a"]),
    ],
)
def test_server_that_stops(database_url: str, kind: str, rows: list[str]) -> None:
    """It waits for a background task, and for a left-over one it does not. What ends in time is
    committed, what hangs is cancelled and rolled back; no connection is left."""
    begun = threading.Event()
    left: list[str] = []
    left_over: list[asyncio.Task[None]] = []

    async def own() -> None:
        async with session_scope():
            await write("own")
            begun.set()
            await (asyncio.sleep(0.3) if kind == "ends in time" else asyncio.Event().wait())

    async def slow() -> None:
        try:
            if kind != "hangs":
                await own()
            await write("shared")
            begun.set()
            if kind == "hangs":
                await asyncio.Event().wait()
        except asyncio.CancelledError:
            left.append("cancelled")
            raise

    async def work() -> None:
        await write("a")
        if kind == "left over":
            left_over.append(asyncio.create_task(slow()))

    tasks = [] if kind == "left over" else [slow]
    patience = 5 if kind == "ends in time" else 0.2
    with notes_at(database_url) as database:
        app = app_of(database, of_the_response, work, *tasks)
        with serving(database, app, timeout_graceful_shutdown=patience) as served:
            assert post(served.base_url) == 201
            assert begun.wait(10)
    assert left == ["cancelled"] * (kind != "ends in time")
    assert notes(database_url) == rows


# --- FastAPI's dependencies, after their `yield`

# What such code does; with the status, what is there when the response starts, and in the end.
AFTER_YIELD: dict[tuple[str, str], tuple[int, list[str], list[str]]] = {
    ("function", "writes"): (201, ["a", "after"], ["a", "after"]),
    ("function", "is refused by COMMIT"): (409, [], []),
    ("function", "fails"): (500, [], []),
    ("function", "writes, and the answer is a 404"): (404, [], []),
    ("function", "writes, for the endpoint has failed"): (404, [], []),
    ("request", "writes"): (201, ["a"], ["a", "after"]),
    ("request", "is refused by COMMIT"): (201, ["a"], ["a"]),
    ("request", "fails"): (201, ["a"], ["a"]),
    ("request", "writes, and the answer is a 404"): (404, [], []),
    ("request", "writes, for the endpoint has failed"): (404, [], []),
}


@pytest.mark.parametrize(("scope", "does"), AFTER_YIELD)
async def test_dependency_after_its_yield(
    deferring_url: str, scope: Any, does: str, caplog: pytest.LogCaptureFixture
) -> None:
    """At function scope it is a part of the request that the response tells of. At request scope
    it comes after that: a transaction of its own, under the rules of background tasks."""
    status, at_start, at_end = AFTER_YIELD[scope, does]

    async def dependency() -> AsyncIterator[None]:
        try:
            yield
        finally:
            await write("after", parent=NOWHERE if "refused" in does else None)
            if does == "fails":
                raise LookupError

    async def endpoint(response: Response) -> None:
        await write("a")
        response.status_code = status if "answer" in does else 201
        if "endpoint has failed" in does:
            raise HTTPException(404)

    seen: list[list[str]] = []
    async with notes_database(deferring_url) as database:
        app = bare_app(database)
        app.post("/", dependencies=[Depends(dependency, scope=scope)])(endpoint)
        response = await request(
            app, "POST", on_message=lambda _: seen.append(notes(deferring_url))
        )
        assert connections_in_use(database) == 0
    assert (response.status, response.complete) == (status, True)
    assert (seen[0], notes(deferring_url)) == (at_start, at_end)
    failed_late = scope == "request" and does in ("is refused by COMMIT", "fails")
    assert isinstance(response.exception, Exception) is (failed_late or status == 500)
    warned = "was answered by an error" in caplog.text
    assert warned is ((scope, does) == ("request", "writes, and the answer is a 404"))


@pytest.mark.parametrize("fails", [False, True])
async def test_dependency_after_background_tasks(
    database: Database, database_url: str, fails: bool
) -> None:
    """At request scope it comes after them and shares their transaction; the error of a task is
    thrown into it, and undoes what it then writes, too."""
    thrown: list[str] = []

    async def dependency() -> AsyncIterator[None]:
        try:
            yield
        except LookupError:
            thrown.append("task")
            raise
        finally:
            await write("after")

    async def later() -> None:
        await write("task")
        if fails:
            raise LookupError

    async def endpoint(tasks: BackgroundTasks) -> None:
        await write("a")
        tasks.add_task(later)

    app = bare_app(database)
    app.post("/", dependencies=[Depends(dependency)])(endpoint)
    response = await request(app, "POST")
    assert (response.status, response.complete) == (200, True)
    assert thrown == ["task"] * fails
    assert notes(database_url) == (["a"] if fails else ["a", "task", "after"])
    assert connections_in_use(database) == 0


# --- tasks that outlive their unit of work


async def refusals(session: Any, connection: Any) -> list[BaseException]:
    """What a task hears that tries all it can, when its unit of work is over."""
    statement = insert(NOTE).values(text="left over")
    uses: list[Callable[[], Any]] = [
        current_session,
        current_sync_session,
        lambda: on_commit(print),
        lambda: current_scope().commit(),
        lambda: session.execute(statement),
        lambda: session.stream(select(NOTE.c.text)),
        lambda: session.flush(),
        lambda: session.commit(),
        lambda: session.rollback(),
        lambda: session.connection(),
        lambda: session.begin_nested().start(),
        lambda: session.run_sync(lambda sync: sync.execute(statement)),
        lambda: connection.execute(statement),
        lambda: connection.exec_driver_sql("DELETE FROM note"),
        lambda: connection.commit(),
        lambda: connection.rollback(),
    ]
    heard: list[BaseException] = []
    for use in uses:
        try:
            result = use()
            if result is not None:
                await result
        except ScopeClosedError as error:
            heard.append(error)
    assert len(heard) == len(uses)
    return heard


class LeftOver:
    """A task that a unit of work starts and leaves behind, with all it has got hold of."""

    def __init__(self) -> None:
        self._over = asyncio.Event()
        self._task: asyncio.Task[list[BaseException]]

    async def start(self) -> None:
        """Let the task write in the unit of work; it then waits for the end of that."""
        written = asyncio.Event()
        self._task = asyncio.create_task(self._work(written))
        await written.wait()

    async def _work(self, written: asyncio.Event) -> list[BaseException]:
        session = current_session()
        connection = await session.connection()
        await write("of the task")
        written.set()
        await self._over.wait()
        return await refusals(session, connection)

    async def goes_on(self) -> list[BaseException]:
        """What it hears, now that its unit of work is over."""
        self._over.set()
        return await self._task


@pytest.mark.parametrize("status", [201, 409])
async def test_task_that_outlives_its_request(database_url: str, status: int) -> None:
    """What it has written before is a part of the request. From then on all that it has kept
    refuses, and says what to write; nor does it undo, commit or add anything in the next request,
    which works on the very same connection."""
    left_over = LeftOver()
    heard: list[BaseException] = []

    async def first() -> None:
        await write("first")
        await left_over.start()

    async def second() -> None:
        await write("second")
        heard.extend(await left_over.goes_on())
        await write("third")

    pool = {"pool_size": 1, "max_overflow": 0, "pool_timeout": 5}
    async with notes_database(database_url, engine_kwargs=pool) as database:
        response = await request(app_of(database, of_the_response, first, status=status), "POST")
        assert (response.status, response.exception) == (status, None)
        of_the_first = ["first", "of the task"] if status == 201 else []
        assert notes(database_url) == of_the_first
        assert connections_in_use(database) == 0
        response = await request(app_of(database, of_the_response, second), "POST")
        assert (response.status, response.exception) == (201, None)
    assert notes(database_url) == [*of_the_first, "second", "third"]
    assert len(heard) == 16
    assert all("`async with session_scope() as session:`" in str(error) for error in heard)


async def test_task_that_opens_its_own(database: Database, database_url: str) -> None:
    """On the database of the request that it has outlived, by the form that says so; the others
    would be a part of that request."""
    over = asyncio.Event()
    left_over: list[asyncio.Task[None]] = []

    def in_a_thread() -> None:
        with sync_session_scope():
            write_sync("thread")

    async def later() -> None:
        await over.wait()
        for part_of_the_request in (atomic(), get_async_db_session()):
            with pytest.raises(ScopeClosedError):
                await part_of_the_request.__aenter__()
        async with session_scope():
            await write("scope")
        await asyncio.to_thread(in_a_thread)

    async def work() -> None:
        left_over.append(asyncio.create_task(later()))
        await write("a")

    await request(app_of(database, of_the_response, work, status=409), "POST")
    over.set()
    await left_over[0]
    assert notes(database_url) == ["scope", "thread"]
    assert connections_in_use(database) == 0


async def test_task_started_on_commit(deferring_url: str) -> None:
    """It begins when the work that it builds on is there, and never if that fails."""
    started: list[asyncio.Task[None]] = []
    seen: list[list[str]] = []

    async def later() -> None:
        seen.append(notes(deferring_url))
        async with session_scope():
            await write("later")

    async def work(parent: int | None) -> None:
        await write("a", parent=parent)
        on_commit(lambda: started.append(asyncio.create_task(later())))

    async with notes_database(deferring_url) as database:
        for parent in (NOWHERE, None):
            await request(app_of(database, of_the_response, partial(work, parent)), "POST")
        await asyncio.gather(*started)
    assert seen == [["a"]]
    assert notes(deferring_url) == ["a", "later"]


# --- tasks of a `session_scope()`


async def test_child_of_a_scope(database: Database, database_url: str) -> None:
    """Awaited in the block it is a part of it; left behind, what it has written is, and from then
    on it is told to open its own."""
    left_over = LeftOver()
    async with session_scope(database):
        await asyncio.create_task(write("child"))
        await left_over.start()
        assert notes(database_url) == []
    assert notes(database_url) == ["child", "of the task"]
    assert connections_in_use(database) == 0
    heard = await left_over.goes_on()
    assert all("`async with session_scope() as session:`" in str(error) for error in heard)
    assert notes(database_url) == ["child", "of the task"]


async def test_child_of_a_scope_that_fails(database: Database, database_url: str) -> None:
    """Its error is that of the block which awaits it, and of nobody else's."""

    async def fails() -> None:
        await write("child")
        raise LookupError

    async def awaits_it() -> None:
        async with session_scope(database):
            await write("a")
            await asyncio.create_task(fails())

    with pytest.raises(LookupError):
        await awaits_it()
    async with session_scope(database):
        await write("b")
        task = asyncio.create_task(fails())
        await asyncio.wait({task})
    assert isinstance(task.exception(), LookupError)
    assert notes(database_url) == ["b", "child"]
    assert connections_in_use(database) == 0


@pytest.mark.parametrize("fails", [False, True])
async def test_task_group_in_a_scope(database: Database, database_url: str, fails: bool) -> None:
    """Its tasks share the transaction; the error of one undoes the work of all."""
    all_have_written = asyncio.Barrier(3)

    async def work(number: int) -> None:
        await write(str(number))
        await all_have_written.wait()
        if fails and number == 1:
            raise LookupError
        await write(f"{number}!")

    async def run() -> None:
        async with session_scope(database), asyncio.TaskGroup() as tasks:
            for number in range(3):
                tasks.create_task(work(number))

    if fails:
        with pytest.raises(ExceptionGroup):
            await run()
    else:
        await run()
    assert sorted(notes(database_url)) == ([] if fails else ["0", "0!", "1", "1!", "2", "2!"])
    assert connections_in_use(database) == 0


async def test_scopes_in_a_task_group(database: Database, database_url: str) -> None:
    """Each task that opens its own has its own: the one that fails and one that is cancelled for
    it are rolled back, one that has ended stays."""
    begun = asyncio.Event()

    async def ends() -> None:
        async with session_scope(database):
            await write("ends")
        tasks.create_task(fails())

    async def fails() -> None:
        async with session_scope(database):
            await write("fails")
            tasks.create_task(is_cancelled())
            await begun.wait()
            raise LookupError

    async def is_cancelled() -> None:
        async with session_scope(database):
            begun.set()
            await write("is cancelled")  # which on SQLite waits for its turn
            await asyncio.Event().wait()

    with pytest.raises(ExceptionGroup) as caught:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(ends())
    assert [type(error) for error in caught.value.exceptions] == [LookupError]
    assert notes(database_url) == ["ends"]
    assert connections_in_use(database) == 0


# --- where the context is copied, and where it is not


async def to_thread(work: Task) -> None:
    await asyncio.to_thread(work)


async def starlettes(work: Task) -> None:
    await run_in_threadpool(work)


async def anyios(work: Task) -> None:
    await anyio.to_thread.run_sync(work)


async def executor_with_a_copy(work: Task) -> None:
    loop = asyncio.get_running_loop()
    await loop.run_in_executor(None, contextvars.copy_context().run, work)


async def thread_of_a_thread(work: Task) -> None:
    def outer() -> None:
        context = contextvars.copy_context()
        thread = threading.Thread(target=context.run, args=(work,))
        thread.start()
        thread.join()

    await asyncio.to_thread(outer)


async def executor(work: Task) -> None:
    await asyncio.get_running_loop().run_in_executor(None, work)


async def own_executor(work: Task) -> None:
    with ThreadPoolExecutor(1) as pool:
        await asyncio.wrap_future(pool.submit(work))


async def empty_context(work: Task) -> None:
    await asyncio.get_running_loop().run_in_executor(None, contextvars.Context().run, work)


COPYING = [to_thread, starlettes, anyios, executor_with_a_copy, thread_of_a_thread]
NOT_COPYING = [executor, own_executor, empty_context]
WHEN = pytest.mark.parametrize("when", ["request", "background task"])


async def run_when(when: str, database: Database, work: Work) -> Answer:
    """Let a request do it, or its background task."""
    app = bare_app(database)

    async def nothing() -> None:
        pass

    works = (work, nothing) if when == "request" else (nothing, work)
    of_the_response(app, works[0], [works[1]], 201)
    return await request(app, "POST")


@WHEN
@pytest.mark.parametrize("where", COPYING, ids=lambda where: where.__name__)
async def test_thread_with_a_copy_of_the_context(
    database: Database, database_url: str, where: Callable[[Task], Awaitable[None]], when: str
) -> None:
    """It is a part of the unit of work: it writes in its transaction."""

    async def work() -> None:
        scope = current_scope()
        await where(lambda: write_sync("a") if current_scope() is scope else None)
        assert notes(database_url) == []

    response = await run_when(when, database, work)
    assert (response.status, response.exception) == (201, None)
    assert notes(database_url) == ["a"]
    assert database.engine.pool.checkedout() == 0  # type: ignore[attr-defined]


@WHEN
@pytest.mark.parametrize("where", NOT_COPYING, ids=lambda where: where.__name__)
async def test_thread_without_the_context(
    database: Database, where: Callable[[Task], Awaitable[None]], when: str
) -> None:
    """It is outside of the unit of work, and is told so: it does not write in a transaction that
    nobody commits."""

    async def work() -> None:
        with pytest.raises(NoScopeError, match="outside a unit of work") as caught:
            await where(lambda: write_sync("a"))
        assert "`with sync_session_scope()`" in str(caught.value)

    response = await run_when(when, database, work)
    assert (response.status, response.exception) == (201, None)


@WHEN
async def test_tasks_and_the_context(database: Database, database_url: str, when: str) -> None:
    """Whatever asyncio starts finds the unit of work, but for a task with an empty context."""
    loop = asyncio.get_running_loop()

    async def from_a_thread() -> None:
        asyncio.run_coroutine_threadsafe(write("threadsafe"), loop).result(10)

    async def later() -> None:
        called: asyncio.Future[object] = loop.create_future()
        loop.call_soon(lambda: called.set_result(current_scope()))
        assert await called is current_scope()

    async def work() -> None:
        await asyncio.create_task(write("task"))
        await asyncio.ensure_future(write("future"))
        await asyncio.wait_for(write("wait_for"), 10)
        await asyncio.gather(write("gather"))
        await asyncio.shield(write("shield"))
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(write("group"))
        async with anyio.create_task_group() as anyio_tasks:
            anyio_tasks.start_soon(write, "anyio")
        await asyncio.to_thread(lambda: asyncio.run(from_a_thread()))
        await later()
        with pytest.raises(NoScopeError, match="outside a unit of work"):
            await asyncio.create_task(write("empty"), context=contextvars.Context())
        assert notes(database_url) == []

    response = await run_when(when, database, work)
    assert (response.status, response.exception) == (201, None)
    assert notes(database_url) == [
        *("task", "future", "wait_for", "gather", "shield", "group", "anyio", "threadsafe")
    ]
    assert connections_in_use(database) == 0
