"""`def` endpoints: what is promised for `await` holds for code in threads.

The transaction of `current_sync_session()` and of `Depends(get_db_session)` is ended before the
response like the async one, in a thread that is not one of the endpoints', so that requests which
wait for a connection never keep one from coming back. A thread cannot be cancelled: what it does
when its request is over is refused or rolled back, and its connection goes to nobody else before
it has let go of it.

More of this: tests/test_participant.py (time limits, threads of a scope), tests/test_gate.py
(`ThreadGate`), tests/test_session.py (`with`, `for`), tests/integration/test_fastapi.py.
"""

import asyncio
import contextvars
import http.client
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager, closing
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import anyio
import anyio.to_thread
import pytest
from fastapi import BackgroundTasks, Depends, FastAPI, HTTPException, Request, Response
from sqlalchemy import Connection, insert, make_url, text
from sqlalchemy.exc import IntegrityError, ResourceClosedError
from sqlalchemy.orm import DeclarativeBase, Session
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse

from repom import (
    Database,
    atomic,
    current_scope,
    current_session,
    current_sync_session,
    on_commit,
)
from repom.errors import MixedSessionsError, ScopeClosedError, TransactionAbortedError
from repom.middleware import DatabaseSessionMiddleware
from repom.session import get_db_session, get_db_transaction
from tests.middleware.held import held_commit
from tests.middleware.notes import NOTE, NOWHERE, create_notes, notes, write_sync
from tests.support.asgi import ASGIApp, Receive, Scope, Send, request
from tests.support.polling import until
from tests.support.reader import execute
from tests.support.sockets import serve

#: What a driver's name is to its kind of server.
DRIVERS = {
    "pysqlite": "sqlite_url",
    "psycopg": "postgres_url",
    "psycopg2": "postgres_url",
    "pymysql": "mysql_url",
}


class Base(DeclarativeBase):
    pass


class Note(Base):
    __table__ = NOTE


class Place(NamedTuple):
    """An empty table of notes: its URL with a sync driver, and without one."""

    url: str
    plain: str

    @property
    def checks_at_commit(self) -> bool:
        return not self.plain.startswith("mysql")


@pytest.fixture(params=DRIVERS)
def place(request: pytest.FixtureRequest) -> Place:
    """A database for each of the sync drivers."""
    plain = request.getfixturevalue(DRIVERS[request.param])
    create_notes(plain)
    url = make_url(plain)
    url = url.set(drivername=f"{url.get_backend_name()}+{request.param}")
    return Place(url.render_as_string(hide_password=False), plain)


@asynccontextmanager
async def database_at(place: Place, **pool: Any) -> AsyncIterator[Database]:
    database = Database(place.url, engine_kwargs=pool)
    try:
        yield database
    finally:
        await database.dispose()


def checked_out(database: Database) -> int:
    """How many connections of the sync pool are in use."""
    count: int = database.engine.pool.checkedout()  # type: ignore[attr-defined]
    return count


def app_at(database: Any, **options: Any) -> FastAPI:
    def conflict(request: Request, error: Exception) -> Response:
        return JSONResponse({"detail": "conflict"}, 409)

    app = FastAPI()
    app.add_exception_handler(IntegrityError, conflict)
    app.add_middleware(DatabaseSessionMiddleware, database, **options)
    return app


# --- what the client is told


def app_of_outcomes(url: str) -> FastAPI:
    app = app_at(url)

    @app.post("/current", status_code=201)
    def current() -> None:
        write_sync("a")

    @app.post("/depends", status_code=201)
    def depends(session: Session = Depends(get_db_session)) -> None:
        session.add(Note(text="a"))

    @app.post("/transaction", status_code=201)
    def transaction(session: Session = Depends(get_db_transaction)) -> None:
        session.add(Note(text="a"))

    @app.post("/threadpool", status_code=201)
    async def threadpool() -> None:
        await run_in_threadpool(write_sync, "a")

    @app.post("/returned", status_code=201)
    def returned(response: Response) -> None:
        write_sync("a")
        response.status_code = 422

    @app.post("/raised", status_code=201)
    def raised(session: Session = Depends(get_db_session)) -> None:
        session.add(Note(text="a"))
        session.flush()
        raise HTTPException(409)

    @app.post("/crash", status_code=201)
    def crash(session: Session = Depends(get_db_session)) -> None:
        session.add(Note(text="a"))
        session.flush()
        raise LookupError

    @app.post("/refused", status_code=201)
    def refused() -> None:
        write_sync("a", parent=NOWHERE)

    @app.post("/swallowed", status_code=201)
    def swallowed(session: Session = Depends(get_db_session)) -> None:
        write_sync("a")
        session.add_all([Note(text="b"), Note(text="b")])
        with pytest.raises(IntegrityError):
            session.flush()

    @app.post("/only", status_code=201)
    def rollback_only() -> None:
        write_sync("a")
        current_scope().rollback_only()

    return app


OUTCOMES: dict[str, tuple[int, bool]] = {
    "/current": (201, True),
    "/depends": (201, True),
    "/transaction": (201, True),
    "/threadpool": (201, True),
    "/returned": (422, False),
    "/raised": (409, False),
    "/crash": (500, False),
    "/refused": (409, False),
    "/swallowed": (500, False),
    "/only": (201, False),
}


def test_what_the_client_is_told_is_true(place: Place) -> None:
    """Over a real server: with the status line in hand, a second connection sees what it tells
    of, and nothing of what failed, at COMMIT or before."""
    with serve(app_of_outcomes(place.url)) as base_url:
        parts = urlsplit(base_url)
        client = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=10)
        for path, (status, committed) in OUTCOMES.items():
            if path == "/refused" and not place.checks_at_commit:
                continue
            with closing(client):
                before = notes(place.plain)
                client.request("POST", path)
                response = client.getresponse()
                after = notes(place.plain)
                assert (path, response.status) == (path, status)
                assert (path, after[len(before) :]) == (path, ["a"] if committed else [])
                response.read()
            _forget(place)


def _forget(place: Place) -> None:
    execute(place.plain, "DELETE FROM note")


async def test_swallowed_statement(postgres_url: str) -> None:
    """What PostgreSQL has aborted is told by each of its drivers when it comes to COMMIT."""

    def endpoint() -> None:
        write_sync("a")
        with pytest.raises(IntegrityError):
            write_sync("a")

    create_notes(postgres_url)
    for driver in ("psycopg", "psycopg2"):
        url = postgres_url.replace("postgresql:", f"postgresql+{driver}:")
        async with database_at(Place(url, postgres_url)) as database:
            app = app_at(database)
            app.post("/", status_code=201)(endpoint)
            response = await request(app, "POST")
            assert response.status == 500
            assert isinstance(response.exception, TransactionAbortedError)
            assert isinstance(response.exception.__cause__, Exception)
    assert notes(postgres_url) == []


@pytest.mark.parametrize("first", ["sync", "async"])
async def test_sync_and_async_session_in_one_request(place: Place, first: str) -> None:
    """Whichever comes first, dependency or endpoint: the other is refused, nothing is left."""

    async def in_the_loop() -> None:
        await current_session().execute(insert(NOTE).values(text="async"))

    def in_a_thread(session: Session = Depends(get_db_session)) -> None:
        session.execute(insert(NOTE).values(text="sync"))

    dependency: Callable[..., Any] = in_a_thread if first == "sync" else in_the_loop
    endpoint: Callable[..., Any] = in_the_loop if first == "sync" else in_a_thread
    async with database_at(place) as database:
        app = app_at(database)
        app.post("/", dependencies=[Depends(dependency)])(endpoint)
        response = await request(app, "POST")
        assert response.status == 500
        assert isinstance(response.exception, MixedSessionsError)
        assert checked_out(database) == 0
    assert notes(place.plain) == []


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("where", ["background task", "dependency"])
async def test_work_after_the_response(place: Place, where: str, fails: bool) -> None:
    """A sync background task, and a `def` dependency after its `yield`, have a transaction of
    their own, which their success commits; the response has been committed by then."""

    def later() -> None:
        assert notes(place.plain) == ["a"]
        write_sync("later")
        if fails:
            raise LookupError

    def dependency() -> Iterator[None]:
        yield
        if where == "dependency":
            later()

    def endpoint(tasks: BackgroundTasks) -> None:
        write_sync("a")
        if where == "background task":
            tasks.add_task(later)

    async with database_at(place) as database:
        app = app_at(database)
        app.post("/", dependencies=[Depends(dependency)])(endpoint)
        response = await request(app, "POST")
        assert (response.status, response.complete) == (200, True)
        assert isinstance(response.exception, LookupError) is fails
        assert checked_out(database) == 0
    assert notes(place.plain) == (["a"] if fails else ["a", "later"])


# --- threads


@pytest.fixture(params=["sqlite_url", "postgres_url"])
def deferring_url(request: pytest.FixtureRequest) -> str:
    """The URL of a database whose COMMIT can be held."""
    url: str = request.getfixturevalue(request.param)
    return url


async def test_ending_takes_no_thread_of_the_endpoints(deferring_url: str) -> None:
    """While COMMIT is under way, the request holds no thread that an endpoint could run in."""
    threads = anyio.to_thread.current_default_thread_limiter()
    threads.total_tokens = 1
    async with held_commit(deferring_url) as held:
        app = app_at(held.database)
        app.post("/")(lambda: write_sync("a"))
        app.get("/")(lambda: "free")
        committing = asyncio.create_task(request(app, "POST"))
        await held.reached()
        assert threads.borrowed_tokens == 0
        other = await request(app, "GET")
        assert (other.status, committing.done()) == (200, False)
        held.release()
        assert (await committing).status == 200
    assert notes(deferring_url) == ["a"]


async def test_pool_smaller_than_the_thread_pool(place: Place) -> None:
    """200 requests at once in 40 threads, with two connections: all of them are answered, and
    none has to wait for more than its turn."""
    assert anyio.to_thread.current_default_thread_limiter().total_tokens == 40

    def endpoint(number: int) -> None:
        write_sync(str(number))
        if number % 10 == 0:
            raise HTTPException(409)

    async with database_at(place, pool_size=2, max_overflow=0, pool_timeout=20) as database:
        app = app_at(database)
        app.post("/{number}", status_code=201)(endpoint)
        async with asyncio.timeout(15):  # a deadlock lasts until the pool's time-out
            responses = await asyncio.gather(
                *(request(app, "POST", f"/{number}") for number in range(200))
            )
        assert checked_out(database) == 0
    told = {str(number) for number, found in enumerate(responses) if found.status == 201}
    assert {found.status for found in responses} == {201, 409}
    assert told == {str(number) for number in range(200) if number % 10}
    assert set(notes(place.plain)) == told


async def test_pool_smaller_than_the_thread_pool_and_requests_of_several_steps(
    place: Place,
) -> None:
    """A request that holds a connection finds a thread for its next step, although all threads
    wait for connections (on SQLite for the write lock, too); afterwards there are as many as
    before."""
    threads = anyio.to_thread.current_default_thread_limiter()
    threads.total_tokens = 5

    def log(number: int) -> None:
        write_sync(f"log {number}")

    def endpoint(number: int) -> None:
        write_sync(str(number))

    async with database_at(place, pool_size=2, max_overflow=0, pool_timeout=20) as database:
        app = app_at(database)
        app.post("/{number}", status_code=201, dependencies=[Depends(log)])(endpoint)
        async with asyncio.timeout(15):  # a deadlock lasts until the pool's time-out
            responses = await asyncio.gather(
                *(request(app, "POST", f"/{number}") for number in range(50))
            )
        assert checked_out(database) == 0
    assert {found.status for found in responses} == {201}
    assert len(notes(place.plain)) == 100
    await until(lambda: threads.total_tokens == 5)


@pytest.mark.parametrize("status", [201, 409])
async def test_threads_of_one_request_share_its_transaction(place: Place, status: int) -> None:
    """Those of an executor with copies of the context, and those that async code starts."""
    sessions = set()

    def work(number: int) -> None:
        sessions.add(current_sync_session())
        write_sync(str(number))

    async def endpoint() -> None:
        with ThreadPoolExecutor(3) as pool:
            futures = [
                pool.submit(contextvars.copy_context().run, work, number) for number in range(3)
            ]
            await asyncio.gather(*map(asyncio.wrap_future, futures))
        await asyncio.gather(*(run_in_threadpool(work, number) for number in range(3, 6)))
        if status == 409:
            raise HTTPException(status)

    async with database_at(place, pool_size=1, max_overflow=0, pool_timeout=5) as database:
        app = app_at(database)
        app.post("/", status_code=201)(endpoint)
        response = await request(app, "POST")
        assert (response.status, len(sessions)) == (status, 1)
        assert checked_out(database) == 0
    assert sorted(notes(place.plain)) == (list("012345") if status == 201 else [])


# --- callbacks


async def test_callback_of_an_endpoint_keeps_no_request_waiting(place: Place) -> None:
    """It may block, and what it waits for goes on: it runs in a thread, as the endpoint did. What
    it writes is committed when the client has its answer."""
    called, may_go_on = threading.Event(), threading.Event()

    def callback() -> None:
        called.set()
        assert may_go_on.wait(10)
        write_sync("by the callback")

    def endpoint() -> None:
        write_sync("a")
        on_commit(callback)

    async def let_it_go_on() -> None:
        may_go_on.set()

    async with database_at(place, pool_size=1, max_overflow=0, pool_timeout=5) as database:
        app = app_at(database)
        app.post("/", status_code=201)(endpoint)
        app.post("/other", status_code=201)(let_it_go_on)
        task = asyncio.create_task(request(app, "POST"))
        await until(called.is_set)
        assert (await request(app, "POST", "/other")).status == 201
        assert (await task).status == 201
    assert notes(place.plain) == ["a", "by the callback"]


# --- threads that are left over


class LeftOver:
    """A thread that goes on when its request is over, with all that it has got hold of."""

    def __init__(self) -> None:
        self.may_go_on = threading.Event()
        self.executor = ThreadPoolExecutor(1)
        self.future: Future[list[BaseException]]

    def start(self) -> None:
        session = current_sync_session()
        connection = session.connection()
        context = contextvars.copy_context()
        self.future = self.executor.submit(context.run, self._work, session, connection)

    def _work(self, session: Session, connection: Connection) -> list[BaseException]:
        self.may_go_on.wait(10)
        statement = insert(NOTE).values(text="left over")
        errors: list[BaseException] = []
        for use in (
            lambda: session.execute(statement),
            lambda: session.add(Note(text="left over")),
            session.flush,
            session.rollback,
            session.connection,
            lambda: connection.execute(statement),
            lambda: connection.exec_driver_sql("DELETE FROM note"),
            connection.commit,
            connection.rollback,
            current_sync_session,
            atomic().__enter__,
            get_db_session().__enter__,
        ):
            try:
                use()
            except Exception as error:
                errors.append(error)
        return errors


@pytest.mark.parametrize("status", [201, 409])
async def test_thread_that_is_left_over(place: Place, status: int) -> None:
    """It is refused, whatever it has kept, and does nothing to the request that has got its
    connection meanwhile."""
    left_over = LeftOver()

    def first() -> None:
        write_sync("first")
        left_over.start()
        if status == 409:
            raise HTTPException(status)

    def second() -> None:
        write_sync("second")
        left_over.may_go_on.set()
        errors.extend(left_over.future.result(10))
        write_sync("third")

    errors: list[BaseException] = []
    # The other request works on the very same connection.
    async with database_at(place, pool_size=1, max_overflow=0, pool_timeout=5) as database:
        app = app_at(database)
        app.post("/first", status_code=201)(first)
        app.post("/second", status_code=201)(second)
        with left_over.executor:
            assert (await request(app, "POST", "/first")).status == status
            assert (await request(app, "POST", "/second")).status == 201
    assert len(errors) == 12
    assert {type(error) for error in errors} == {ScopeClosedError}
    assert notes(place.plain) == ["first"] * (status == 201) + ["second", "third"]


@pytest.mark.parametrize("status", [201, 409])
async def test_thread_at_work_on_a_kept_connection_when_its_request_ends(
    place: Place, status: int
) -> None:
    """The end waits for its statement and refuses the next: neither is COMMIT disturbed, nor
    does one of them become part of another request."""
    executed: list[str] = []
    running = threading.Event()

    def work(connection: Connection) -> None:
        for number in range(100_000):
            try:
                connection.execute(insert(NOTE).values(text=str(number)))
            except (ResourceClosedError, ScopeClosedError):  # of the transaction, of the request
                return
            executed.append(str(number))
            running.set()

    executor = ThreadPoolExecutor(1)

    def first() -> Any:
        connection = current_sync_session().connection()
        left_over.append(executor.submit(work, connection))
        running.wait(10)
        if status == 409:
            raise HTTPException(status)

    left_over: list[Future[None]] = []
    async with database_at(place, pool_size=1, max_overflow=0, pool_timeout=5) as database:
        app = app_at(database)
        app.post("/first", status_code=201)(first)
        app.post("/second", status_code=201)(lambda: write_sync("second"))
        with executor:
            assert (await request(app, "POST", "/first")).status == status
            rows = notes(place.plain)
            assert (await request(app, "POST", "/second")).status == 201
            left_over[0].result(10)
    assert rows == (executed if status == 201 else [])
    assert notes(place.plain) == [*rows, "second"]


# --- requests that are cancelled


class Cancelled:
    """A layer outside of an app, by which a test cancels the request."""

    def __init__(self, app: ASGIApp, how: str) -> None:
        self.cancel: Callable[[], object]
        self._app = app
        self._how = how

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        task = asyncio.current_task()
        assert task is not None
        if self._how == "cancel":  # as a server does that has no more time to stop
            self.cancel = task.cancel
            await self._app(scope, receive, send)
        else:
            with anyio.CancelScope() as cancel_scope:
                self.cancel = cancel_scope.cancel
                await self._app(scope, receive, send)


@pytest.mark.parametrize("how", ["cancel", "cancel scope"])
async def test_cancelled_while_an_endpoint_runs(place: Place, how: str) -> None:
    """The thread goes on. If the request does not wait for it, as after `Task.cancel()`, what it
    has done is rolled back and what it does later is refused; if it does, as anyio's cancel
    scopes do, the status that still comes is true."""
    running, may_go_on = threading.Event(), threading.Event()
    refused: list[BaseException] = []

    def endpoint() -> None:
        write_sync("before")
        running.set()
        may_go_on.wait(10)
        try:
            write_sync("after")
        except ScopeClosedError as error:
            refused.append(error)
            raise

    async with database_at(place, pool_size=1, max_overflow=0, pool_timeout=5) as database:
        app = app_at(database)
        app.post("/", status_code=201)(endpoint)
        outermost = Cancelled(app, how)
        task = asyncio.create_task(request(outermost, "POST"))
        await until(running.is_set)
        outermost.cancel()
        if how == "cancel":
            response = await task
            assert isinstance(response.exception, asyncio.CancelledError)
            assert response.sent == []
            assert checked_out(database) == 0
            may_go_on.set()
            await until(lambda: len(refused) == 1)
        else:
            may_go_on.set()
            response = await task
        assert checked_out(database) == 0
    assert notes(place.plain) == (["before", "after"] if response.status == 201 else [])


SLEEP = {
    "postgresql": "SELECT pg_sleep(0.3)",
    "mysql": "SELECT sleep(0.3)",
    "sqlite": (
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT 1000000)"
        " SELECT count(*) FROM n"
    ),
}


@pytest.mark.parametrize("end_timeout", [10, 0.05], ids=["in time", "too late"])
async def test_cancelled_in_a_statement(place: Place, end_timeout: float) -> None:
    """Its connection comes back when the statement has ended, and not before: in time, or after
    the request, which does not wait for ever."""
    running = threading.Event()

    def endpoint() -> None:
        write_sync("before")
        session = current_sync_session()
        running.set()
        session.execute(text(SLEEP[session.get_bind().dialect.name]))

    async with database_at(place, pool_size=1, max_overflow=0, pool_timeout=5) as database:
        app = app_at(database, end_timeout=end_timeout)
        app.post("/", status_code=201)(endpoint)
        app.post("/next", status_code=201)(lambda: write_sync("next"))
        outermost = Cancelled(app, "cancel")
        task = asyncio.create_task(request(outermost, "POST"))
        await until(running.is_set)
        outermost.cancel()
        response = await task
        assert isinstance(response.exception, asyncio.CancelledError)
        assert (await request(app, "POST", "/next")).status == 201
        await until(lambda: checked_out(database) == 0)
    assert notes(place.plain) == ["next"]
