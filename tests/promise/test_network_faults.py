"""A network or a server that fails never makes a response lie, and the next request works.

A proxy before PostgreSQL and MariaDB cuts, stalls or refuses connections at a chosen moment of
a whole request; backends are terminated, a server is restarted, a pool is empty. Each time the
client's answer and the database agree; where COMMIT was in flight nobody can know, and that is
`CommitOutcomeUnknown`: an error, logged with its route, never retried. All pools here have one
connection, so one that was not given back would stop the next request.

Which error a driver raises is tested in `tests/dialects/test_base.py`, a failing end of several
databases in `tests/test_finish.py`, time limits of flushes and siblings in
`tests/test_participant.py`.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from repom import current_session, on_commit, on_rollback
from repom.database import Database
from repom.errors import CommitOutcomeUnknown, DatabaseUnreachableError
from tests.dialects.drivers import KINDS, Driver, in_clear
from tests.promise.entries import ASYNC_SERVERS, add, answering, prepare, serve, written
from tests.support.asgi import Response as Answer
from tests.support.asgi import request
from tests.support.faultproxy import FaultProxy, When
from tests.support.polling import block_until, until
from tests.support.private_postgres import PrivatePostgres, private_postgres
from tests.support.reader import connections, execute, is_postgres, open_transactions

__all__ = ["private_postgres"]

SERVERS = [name for name, kind in KINDS.items() if kind.fixture != "sqlite_url"]

#: Seconds that a stalled end may take here, and that a test allows for all that it waits for.
LIMIT, PATIENCE = 0.2, 10.0


class Line:
    """A driver whose connections go through a proxy.

    Attributes:
        url: of the database itself, for looking at it.
    """

    def __init__(self, url: str, proxy: FaultProxy, driver: Driver) -> None:
        self.url = url
        self.proxy = proxy
        self.driver = driver

    async def post(self, work: Callable[[Session], object], **kwargs: Any) -> Answer:
        """Let a request do that work."""
        async with asyncio.timeout(PATIENCE):
            return await request(answering(self.driver, work, **kwargs), "POST")

    async def assert_healthy(self) -> None:
        """Fail unless the next request works, and nothing is left of those before it."""
        answer = await self.post(partial(add, id_=99))
        assert (answer.status, answer.exception) == (201, None)
        assert 99 in written(self.url)
        database = self.driver.database
        engine = database.async_engine if self.driver.is_async else database.engine
        pool: Any = engine.pool
        assert pool.checkedout() == 0
        block_until(lambda: open_transactions(self.url) == 0)


@asynccontextmanager
async def faulty_line(fixtures: pytest.FixtureRequest, name: str) -> AsyncIterator[Line]:
    """A line that has been used, so that a connection waits in the pool."""
    pytest.importorskip(KINDS[name].module)
    url = fixtures.getfixturevalue(KINDS[name].fixture)
    prepare(url)
    async with FaultProxy(url) as proxy:
        driver = Driver(name, in_clear(name, proxy.url))
        line = Line(url, proxy, driver)
        try:
            assert (await line.post(partial(add, id_=10))).status == 201
            execute(url, "DELETE FROM entry WHERE id = 10")
            yield line
        finally:
            await driver.database.dispose()


def terminate(url: str) -> None:
    """End all connections to the database, on the server's side."""
    kill = "SELECT pg_terminate_backend(%s, 5000)" if is_postgres(url) else "KILL %s"
    for found in connections(url):
        execute(url, kill, found.id)
    block_until(lambda: not connections(url))


def conflict(request: Request, error: Exception) -> Response:
    """What many applications answer for any error of SQLAlchemy."""
    return Response(status_code=409)


# --- COMMIT -------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", SERVERS)
async def test_cut_in_commit(
    request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture, name: str, when: When
) -> None:
    """Whether the server has seen COMMIT or not, the client gets a 500, not what the application
    answers for database errors; the log names the route, no callback is told a guess, and COMMIT
    is not sent again."""
    async with faulty_line(request, name) as line:
        told: list[str] = []

        def work(session: Session) -> None:
            add(session)
            on_commit(lambda: told.append("commit"))
            on_rollback(lambda: told.append("rollback"))

        app = answering(line.driver, work)
        app.add_exception_handler(SQLAlchemyError, conflict)
        sent = line.proxy.sent(b"COMMIT")
        line.proxy.cut(b"COMMIT", when)
        answer = await post(app)
        assert line.proxy.sent(b"COMMIT") == sent + 1
        assert (answer.status, told) == (500, [])
        assert isinstance(answer.exception, CommitOutcomeUnknown)
        assert "COMMIT of POST / is unknown" in caplog.messages
        assert written(line.url) == ({2} if when == "after" else set())
        await line.assert_healthy()


async def post(app: Starlette, path: str = "/") -> Answer:
    async with asyncio.timeout(PATIENCE):
        return await request(app, "POST", path)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", ASYNC_SERVERS)
async def test_stalled_in_commit(
    request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture, name: str, when: When
) -> None:
    """Past `end_timeout` the connection is given up, and the outcome is unknown."""
    async with faulty_line(request, name) as line:
        line.proxy.stall(b"COMMIT", when)
        answer = await line.post(add, end_timeout=LIMIT)
        assert answer.status == 500
        assert isinstance(answer.exception, CommitOutcomeUnknown)
        assert "COMMIT of POST / is unknown" in caplog.messages
        assert written(line.url) == ({2} if when == "after" else set())
        await line.proxy.cut_all()
        await line.assert_healthy()


# --- before COMMIT ------------------------------------------------------------------------------


def add_two(session: Session) -> None:
    add(session)
    with session.begin_nested():
        add(session, 3)


def add_two_and_swallow(session: Session) -> None:
    with contextlib.suppress(Exception):
        add(session)
    with contextlib.suppress(Exception), session.begin_nested():
        add(session, 3)
    with contextlib.suppress(Exception):
        add(session, 4)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", SERVERS)
async def test_cut_before_commit(request: pytest.FixtureRequest, name: str, when: When) -> None:
    """In BEGIN, in a statement, or in a savepoint: an error, and nothing is in the database. A
    handler that swallows it all cannot answer 201, and what it writes after that is not written
    in a transaction of its own."""
    async with faulty_line(request, name) as line:
        places = [b"BEGIN"] if is_postgres(line.url) else []
        for place in [*places, b"INSERT", b"SAVEPOINT", b"RELEASE"]:
            for work in (add_two, add_two_and_swallow):
                line.proxy.cut(place, when)
                answer = await line.post(work)
                assert line.proxy.struck.is_set(), place
                assert (answer.status, answer.exception is None) == (500, False), (place, work)
                assert written(line.url) == set(), (place, work)
        await line.assert_healthy()


@pytest.mark.parametrize("name", ASYNC_SERVERS)
async def test_a_new_connection_after_a_rollback_by_hand(
    request: pytest.FixtureRequest, name: str
) -> None:
    """A handler that rolls back after its connection was lost begins anew on another one, and
    that is committed."""
    async with faulty_line(request, name) as line:

        def work(session: Session) -> None:
            with contextlib.suppress(DBAPIError):
                add(session)
            session.rollback()
            add(session, 3)

        line.proxy.cut(b"INSERT", "after")
        answer = await line.post(work)
        assert (answer.status, answer.exception) == (201, None)
        assert written(line.url) == {3}
        await line.assert_healthy()


@pytest.mark.parametrize("fault", ["cut", "stall"])
@pytest.mark.parametrize("name", SERVERS)
async def test_fails_in_rollback(
    request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture, name: str, fault: str
) -> None:
    """An error response goes out all the same: the server undoes by itself what it is no longer
    connected to."""
    async with faulty_line(request, name) as line:
        if fault == "cut":
            line.proxy.cut(b"ROLLBACK", "before")
        else:
            line.proxy.stall(b"ROLLBACK", "before")
        answer = await line.post(add, status=404, end_timeout=LIMIT)
        assert (answer.status, answer.exception, answer.complete) == (404, None, True)
        assert line.proxy.struck.is_set()
        assert any(record.levelno >= logging.WARNING for record in caplog.records)
        await line.proxy.cut_all()
        assert written(line.url) == set()
        await line.assert_healthy()


@pytest.mark.parametrize("name", ASYNC_SERVERS)
async def test_cut_in_the_middle_of_a_stream(request: pytest.FixtureRequest, name: str) -> None:
    """The body breaks off, and what was written in the same transaction is not there."""
    async with faulty_line(request, name) as line:
        many = text(
            "WITH RECURSIVE numbers (n) AS"
            " (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < 900)"
            " SELECT repeat('x', 2000) FROM numbers"
        )

        async def endpoint(request: Request) -> Response:
            session = current_session()
            await session.run_sync(add)
            result = await session.stream(many, execution_options={"yield_per": 10})

            async def body() -> AsyncIterator[str]:
                async for (piece,) in result:
                    yield piece

            return StreamingResponse(body(), status_code=201)

        line.proxy.cut(b"repeat", "after", let_through=600_000)
        answer = await post(serve(line.driver.database, endpoint))
        assert (answer.status, answer.complete) == (201, False)
        assert answer.body
        assert answer.exception is not None
        assert written(line.url) == set()
        await line.assert_healthy()


@pytest.mark.parametrize("name", ASYNC_SERVERS)
async def test_a_client_that_does_not_wait_for_a_stalled_server(
    request: pytest.FixtureRequest, name: str
) -> None:
    """Cancelled while a statement hangs, the request ends within the time limit, and gives its
    connection up."""
    async with faulty_line(request, name) as line:
        # Not `add`, which asyncpg has prepared already: its text is not sent again.
        line.proxy.stall(b"INSERT", "before")
        insert = text("INSERT INTO entry (id, amount) VALUES (3, 0)")
        app = answering(line.driver, lambda session: session.execute(insert), end_timeout=LIMIT)
        task = asyncio.create_task(post(app))
        await line.proxy.struck.wait()
        started = time.monotonic()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        # asyncpg and psycopg first ask the server to cancel the statement, for some seconds.
        assert time.monotonic() - started < PATIENCE
        await line.proxy.cut_all()
        assert written(line.url) == set()
        await line.assert_healthy()


# --- the server ends the connection -------------------------------------------------------------


@pytest.mark.parametrize("name", SERVERS)
async def test_terminated_by_the_server(request: pytest.FixtureRequest, name: str) -> None:
    """While it waits in the pool, in the middle of a request, or just before COMMIT: the client
    is told of an error, nothing is in the database, and the next request works."""
    async with faulty_line(request, name) as line:

        def in_the_middle(session: Session) -> None:
            add(session)
            terminate(line.url)
            add(session, 3)

        def before_commit(session: Session) -> None:
            add(session)
            terminate(line.url)

        for work in (add, in_the_middle, before_commit):
            if work is add:
                terminate(line.url)
            answer = await line.post(work)
            assert (answer.status, answer.exception is None) == (500, False), work
            assert written(line.url) == set()
            await line.assert_healthy()
            execute(line.url, "DELETE FROM entry WHERE id = 99")


@pytest.mark.parametrize("name", ["asyncpg", "psycopg", "psycopg-sync"])
async def test_ended_for_being_idle(request: pytest.FixtureRequest, name: str) -> None:
    """PostgreSQL's idle_in_transaction_session_timeout ends a handler that thinks too long;
    its 201 is not sent."""
    async with faulty_line(request, name) as line:

        def work(session: Session) -> None:
            session.execute(text("SET LOCAL idle_in_transaction_session_timeout = '20ms'"))
            add(session)
            block_until(lambda: not connections(line.url))

        answer = await line.post(work)
        assert (answer.status, written(line.url)) == (500, set())
        assert isinstance(answer.exception, DBAPIError)
        await line.assert_healthy()


@pytest.mark.parametrize("how", ["stop", "crash"])
async def test_restarted(private_postgres: PrivatePostgres, how: str) -> None:
    """A request in which the server goes away is told so; while it is away the error says that
    it cannot be reached; when it is back, at most the pooled connection costs an error."""
    url = private_postgres.url
    prepare(url)
    database = Database(url, engine_kwargs={"pool_size": 1, "max_overflow": 0})

    async def endpoint(request: Request) -> Response:
        await current_session().run_sync(partial(add, id_=int(request.query_params["id"])))
        if "away" in request.query_params:
            getattr(private_postgres, how)()
        return Response(status_code=201)

    app = serve(database, endpoint)
    assert (await post(app, "/?id=2")).status == 201
    answer = await post(app, "/?id=3&away")
    assert answer.status == 500
    assert isinstance(answer.exception, (DBAPIError, CommitOutcomeUnknown))
    answer = await post(app, "/?id=4")
    assert answer.status == 500
    assert isinstance(answer.exception, DatabaseUnreachableError)
    private_postgres.start()
    assert written(url) == {2}
    assert (await post(app, "/?id=5")).status == 201
    # Now it is restarted while the connection waits in the pool.
    getattr(private_postgres, how)()
    private_postgres.start()
    assert (await post(app, "/?id=6")).status == 500
    assert (await post(app, "/?id=7")).status == 201
    assert written(url) == {2, 5, 7}
    await database.dispose()


# --- no connection to be had --------------------------------------------------------------------


@pytest.mark.parametrize("name", SERVERS)
async def test_refused(
    request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    """`DatabaseUnreachableError`, which is no error of SQLAlchemy and answered with 500; the
    password is in no message."""
    async with faulty_line(request, name) as line:
        caplog.set_level(logging.DEBUG, "repom")
        url = line.driver.database.url.set(password="s3cret-Pa55")
        stranger = Driver(name, url.render_as_string(hide_password=False))
        app = answering(stranger, add)
        app.add_exception_handler(SQLAlchemyError, conflict)
        line.proxy.refuses = True
        answer = await post(app)
        line.proxy.refuses = False
        await stranger.database.dispose()
        assert answer.status == 500
        assert isinstance(answer.exception, DatabaseUnreachableError)
        assert "s3cret" not in f"{answer.exception!r} {answer.exception} {caplog.text}"
        await line.assert_healthy()


def impatient(url: str, pool_timeout: float) -> Database:
    """A database with one connection."""
    pool = {"pool_size": 1, "max_overflow": 0, "pool_timeout": pool_timeout}
    # Without SQLite's line of writers, who wait there and not for a connection.
    return Database(url, engine_kwargs=pool, sqlite_begin="DEFERRED")


class Hall:
    """An application whose first request keeps the only connection until it is let go."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.has_it, self.go = asyncio.Event(), asyncio.Event()
        self.app = serve(database, self._endpoint)

    async def _endpoint(self, request: Request) -> Response:
        id_ = int(request.query_params["id"])
        await current_session().run_sync(partial(add, id_=id_))
        if id_ == 2:
            self.has_it.set()
            await self.go.wait()
        return Response(status_code=201)

    def post(self, id_: int) -> "asyncio.Task[Answer]":
        return asyncio.create_task(post(self.app, f"/?id={id_}"))

    async def assert_nothing_lost(self) -> None:
        """Fail unless the first request succeeds now, and then another one."""
        pool: Any = self.database.async_engine.pool
        self.go.set()
        assert (await self.first).status == 201
        assert (await self.post(9)).status == 201
        assert pool.checkedout() == 0
        await self.database.dispose()

    async def open(self) -> None:
        self.first = self.post(2)
        await self.has_it.wait()


async def test_an_exhausted_pool(database_url: str) -> None:
    """Who waits for a connection for longer than `pool_timeout` gets an error that says so; the
    request that has it suffers nothing, and the next one finds it."""
    prepare(database_url)
    hall = Hall(impatient(database_url, pool_timeout=0.05))
    await hall.open()
    answers = await asyncio.gather(*(hall.post(id_) for id_ in (3, 4, 5)))
    for answer in answers:
        assert answer.status == 500
        assert isinstance(answer.exception, PoolTimeout)
        assert "QueuePool limit of size 1" in str(answer.exception)
    await hall.assert_nothing_lost()
    assert written(database_url) == {2, 9}


async def test_clients_that_give_up_while_they_wait_for_the_pool(database_url: str) -> None:
    """They take no place in the queue with them: who waits behind them gets the connection."""
    prepare(database_url)
    hall = Hall(impatient(database_url, pool_timeout=PATIENCE))
    await hall.open()
    waiting = [hall.post(id_) for id_ in (3, 4, 5)]
    await until(lambda: all(task.get_stack() for task in waiting))
    for task in waiting[:2]:
        task.cancel()
    given_up = await asyncio.gather(*waiting[:2], return_exceptions=True)
    assert [type(result) for result in given_up] == [asyncio.CancelledError] * 2
    await hall.assert_nothing_lost()
    assert (await waiting[2]).status == 201
    assert written(database_url) == {2, 5, 9}
