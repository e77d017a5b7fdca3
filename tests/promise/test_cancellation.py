"""Cancelled at every await, a request is whole or it never was.

Each shape of work is done again and again and cancelled one suspension later each time, until it
has run to its end once; the ways of `CANCELLING` take turns. After every run nothing is checked
out and no transaction is open; exactly that is there of which COMMIT was answered; and no answer
says otherwise, although the server answers 500 by itself where it has seen nothing of a response.

More of this: tests/test_transaction.py (every way of cancelling a scope at every await),
tests/middleware/test_exchange_tasks.py (a COMMIT that is held, layers that give up),
tests/promise/test_sync_side.py (what a thread does when its request was cancelled),
tests/test_shield.py, and for `dispose()` and the lifespan tests/test_loops.py and
tests/middleware/test_lifespan.py.
"""

import asyncio
import contextlib
import gc
import itertools
import math
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from fastapi import Depends, FastAPI
from sqlalchemy import insert, make_url, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
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
from repom.async_session import get_async_db_session
from repom.middleware import DatabaseSessionMiddleware
from tests.dialects.drivers import KINDS, in_clear
from tests.middleware.notes import (
    NOTE,
    NOWHERE,
    answer,
    connections_in_use,
    create_notes,
    notes,
    write,
    write_sync,
)
from tests.promise import entries
from tests.promise.entries import ASYNC_SERVERS
from tests.support.asgi import (
    ASGIApp,
    ClientDisconnected,
    Message,
    Receive,
    Scope,
    Send,
    request,
)
from tests.support.asgi import Response as Answer
from tests.support.cancelling import (
    CANCELLING,
    Cancelling,
    Interruption,
    Moment,
    answered_commits,
    cancelled_at,
    counted_turns,
)
from tests.support.faultproxy import FaultProxy, When
from tests.support.patient import PatientServer
from tests.support.polling import block_until
from tests.support.reader import ask, connect, execute, other_connections
from tests.support.units import Note, assert_nothing_open, prepared

DRIVERS = ("aiosqlite", "asyncpg", "psycopg", "aiomysql", "asyncmy")

#: What writers of both kinds wait for in SQLite.
LINES = ("the write lock", "the write lock, in a thread")

#: Turns of the event loop that one request may take; the longest takes about 70.
MAX_TURNS = 300

#: Seconds that a stalled end may take here, and that one request may take in all.
LIMIT, PATIENCE = 0.1, 20.0

# psycopg leaves it to the garbage collector to close what a cancellation has interrupted.
pytestmark = pytest.mark.filterwarnings("ignore:<psycopg.AsyncServerCursor:ResourceWarning")


class Site:
    """A database by one of the drivers, a second one in SQLite, and a view of both from outside."""

    def __init__(self, name: str, url: str, other_url: str, **pool: Any) -> None:
        kwargs = {"pool_size": 3, "max_overflow": 0, "pool_timeout": PATIENCE, **pool}
        self.name = name
        drivername = KINDS[name].drivername
        self.database = Database(make_url(url).set(drivername=drivername), engine_kwargs=kwargs)
        self.other = Database(other_url)
        self.databases = {"default": self.database, "other": self.other}
        # It connects by `asyncio.wait_for()`, which did so before Python 3.12.
        self.forgets_cancellations = name == "asyncmy" and sys.version_info < (3, 12)
        self._readers = [connect(url), connect(other_url)]
        self._known: list[list[str]] = [[], []]

    async def begin_anew(self, connection: str) -> None:
        """Let there be a "pooled" connection, or only a "new" one to be had.

        The first statement of most work is prepared on the pooled one, as it is in the long run:
        with asyncpg BEGIN travels with it then.
        """
        if connection == "new":
            await self.database.dispose()
            return
        async with session_scope(self.database) as session:
            await write("undone")
            await session.rollback()

    def written(self) -> list[str]:
        """The notes that have been committed since the last call, of both databases."""
        new: list[str] = []
        for index, reader in enumerate(self._readers):
            texts = [text for (text,) in ask(reader, "SELECT text FROM note ORDER BY id")]
            known = self._known[index]
            assert texts[: len(known)] == known
            new += texts[len(known) :]
            self._known[index] = texts
        return new

    def assert_nothing_open(self) -> None:
        """Fail if a connection is out of its pool, or a transaction is open."""
        assert self.database.engine.pool.checkedout() == 0  # type: ignore[attr-defined]
        assert_nothing_open(self.other)
        if self.database.is_sqlite:
            assert_nothing_open(self.database)
            return
        assert connections_in_use(self.database) == 0
        reader = self._readers[0]
        block_until(lambda: not any(found.in_transaction for found in other_connections(reader)))

    async def close(self) -> None:
        for database in self.databases.values():
            await database.dispose()
        for reader in self._readers:
            reader.close()


@asynccontextmanager
async def open_site(
    fixtures: pytest.FixtureRequest, name: str, tmp_path: Path, **pool: Any
) -> AsyncIterator[Site]:
    pytest.importorskip(KINDS[name].module)
    urls = fixtures.getfixturevalue(KINDS[name].fixture), f"sqlite:///{tmp_path / 'other.sqlite3'}"
    for url in urls:
        create_notes(url)
    site = Site(name, *urls, **pool)
    try:
        yield site
    finally:
        await site.close()
        gc.collect()  # psycopg's connections, cancelled while they were made


def way(number: int) -> Cancelling:
    return CANCELLING[number % len(CANCELLING)]


async def interrupted(app: ASGIApp, interruption: Interruption) -> tuple[Answer, bool]:
    """What the client gets of an application that is cancelled, and whether it was."""
    was_cancelled = False

    async def cancelled_app(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal was_cancelled
        was_cancelled = await interruption.run(app(scope, receive, send))

    async with asyncio.timeout(PATIENCE):
        client = await request(PatientServer(cancelled_app), "POST", body=b"x")
    return client, was_cancelled or isinstance(client.exception, asyncio.CancelledError)


# --- the shapes of work ---------------------------------------------------------------------------
#
# Each gives the application that does it once. What it writes begins with `run`, and then says
# which COMMIT it belongs to.


def starlette(site: Site, endpoint: Any, *layers: Middleware, **kwargs: Any) -> Starlette:
    ours = Middleware(DatabaseSessionMiddleware, site.databases)
    routes = [Route("/", endpoint, methods=["POST"])]
    return Starlette(routes=routes, middleware=[ours, *layers], **kwargs)


async def read() -> None:
    await current_session().execute(select(NOTE.c.id).limit(2))


def created(site: Site, run: str) -> ASGIApp:
    async def endpoint(request: Request) -> Response:
        await request.body()
        await write(run + "a")
        await read()
        return Response(status_code=201)

    return starlette(site, endpoint)


def conflict(site: Site, run: str) -> ASGIApp:
    async def endpoint(request: Request) -> Response:
        on_rollback(lambda: write(run + "b"))
        await write(run + "a")
        return Response(status_code=409)

    return starlette(site, endpoint)


def failure(site: Site, run: str) -> ASGIApp:
    async def endpoint(request: Request) -> Response:
        await write(run + "a")
        raise LookupError

    return starlette(site, endpoint)


def refused_by_commit(site: Site, run: str) -> ASGIApp:
    """Or by the INSERT, in MariaDB; the handler finds nothing of what is refused."""

    async def endpoint(request: Request) -> Response:
        await write(run + "a")
        await write(run + "b", parent=NOWHERE)
        if KINDS[site.name].fixture == "mysql_url":  # which has no deferred checks
            await current_session().execute(insert(NOTE).values(text=run + "a"))
        return Response(status_code=201)

    async def handler(request: Request, error: Exception) -> Response:
        await read()
        return Response(status_code=409)

    return starlette(site, endpoint, exception_handlers={IntegrityError: handler})


def streaming(site: Site, run: str) -> ASGIApp:
    async def endpoint(request: Request) -> Response:
        async def body() -> AsyncIterator[str]:
            await write(run + "b")
            yield "x"
            await write(run + "c")
            yield "y"

        await write(run + "a")
        return StreamingResponse(body(), 201)

    return starlette(site, endpoint)


def streaming_in_a_task(site: Site, run: str) -> ASGIApp:
    """As Starlette does on servers that speak ASGI 2.3, beside the task that listens."""
    app = streaming(site, run)

    async def older(scope: Scope, receive: Receive, send: Send) -> None:
        asgi = {"version": "3.0", "spec_version": "2.3"}
        await app({**scope, "asgi": asgi}, receive, send)

    return older


def cursor(site: Site, run: str) -> ASGIApp:
    async def endpoint(request: Request) -> Response:
        await write(run + "a")
        result = await current_session().stream(select(NOTE.c.text).limit(2))
        return StreamingResponse((row.text async for row in result), 201)

    return starlette(site, endpoint)


def background(site: Site, run: str) -> ASGIApp:
    async def endpoint(request: Request) -> Response:
        await write(run + "a")
        return Response(status_code=201, background=BackgroundTask(write, run + "b"))

    return starlette(site, endpoint)


def callback(site: Site, run: str) -> ASGIApp:
    async def endpoint(request: Request) -> Response:
        on_commit(lambda: write(run + "b"))
        await write(run + "a")
        return Response(status_code=201)

    return starlette(site, endpoint)


def early_commit(site: Site, run: str) -> ASGIApp:
    async def endpoint(request: Request) -> Response:
        await write(run + "a")
        await current_scope().commit()
        await write(run + "b")
        return Response(status_code=201)

    return starlette(site, endpoint)


def second_scope(site: Site, run: str) -> ASGIApp:
    async def endpoint(request: Request) -> Response:
        async with session_scope():
            await write(run + "a")
        await write(run + "b")
        return Response(status_code=201)

    return starlette(site, endpoint)


def savepoints(site: Site, run: str) -> ASGIApp:
    async def endpoint(request: Request) -> Response:
        async with atomic():
            await write(run + "a")
            with contextlib.suppress(LookupError):
                async with atomic():
                    await write(run + "undone")
                    raise LookupError
        return Response(status_code=201)

    return starlette(site, endpoint)


def siblings(site: Site, run: str) -> ASGIApp:
    async def writer() -> None:
        async with atomic():
            await write(run + "a")

    async def reader() -> None:
        async with atomic():
            await read()

    async def endpoint(request: Request) -> Response:
        await asyncio.gather(writer(), read(), reader())
        return Response(status_code=201)

    return starlette(site, endpoint)


def layers(site: Site, run: str) -> ASGIApp:
    async def passing(request: Request, call_next: RequestResponseEndpoint) -> Response:
        return await call_next(request)

    async def endpoint(request: Request) -> Response:
        await request.body()
        await write(run + "a")
        return Response(status_code=201)

    return starlette(site, endpoint, Middleware(BaseHTTPMiddleware, dispatch=passing))


def dependency(site: Site, run: str) -> ASGIApp:
    app = FastAPI()
    app.add_middleware(DatabaseSessionMiddleware, site.databases)

    @app.post("/", status_code=201)
    async def endpoint(session: AsyncSession = Depends(get_async_db_session)) -> None:
        await session.execute(insert(NOTE).values(text=run + "a"))

    return app


def thread(site: Site, run: str) -> ASGIApp:
    def endpoint(request: Request) -> Response:
        write_sync(run + "a")
        return Response(status_code=201, background=BackgroundTask(write_sync, run + "b"))

    return starlette(site, endpoint)


def two_databases(site: Site, run: str) -> ASGIApp:
    async def endpoint(request: Request) -> Response:
        await current_session("other").execute(insert(NOTE).values(text=run + "b"))
        await write(run + "a")
        return Response(status_code=201)

    return starlette(site, endpoint)


def on_its_own(work: Callable[[Site, str], Coroutine[Any, Any, None]]) -> Any:
    """A shape without the middleware: the client is told when `work` is done."""

    def shape(site: Site, run: str) -> ASGIApp:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await work(site, run)
            await answer(send, 201)

        return app

    return shape


@on_its_own
async def scope_alone(site: Site, run: str) -> None:
    async with session_scope(site.database):
        await write(run + "a")
        await read()
    async with session_scope(site.database):
        on_commit(lambda: write(run + "c"))
        await write(run + "b")


@on_its_own
async def atomic_alone(site: Site, run: str) -> None:
    @atomic(site.database)
    async def work() -> None:
        await write(run + "a")

    await work()


@on_its_own
async def generator_alone(site: Site, run: str) -> None:
    async with get_async_db_session(site.database) as session:
        await session.execute(insert(NOTE).values(text=run + "a"))


class Shape(NamedTuple):
    """What is known of a shape of work.

    Attributes:
        commits: what each COMMIT commits, in order.
        told: what a complete success tells of.
        stays: what may be there although the client was told of an error.
        status: what a client gets that waits.
        at_once: how many of the COMMITs happen all or not at all.
    """

    app: Callable[[Site, str], ASGIApp]
    commits: tuple[str, ...]
    told: str
    stays: str = ""
    status: int = 201
    at_once: int = 1


SHAPES = {
    "created": Shape(created, ("a",), "a"),
    "conflict": Shape(conflict, ("b",), "", stays="b", status=409),
    "failure": Shape(failure, (), "", status=500),
    "refused by COMMIT": Shape(refused_by_commit, (), "ab", status=409),
    "streaming": Shape(streaming, ("a", "bc"), "abc"),
    "streaming in a task": Shape(streaming_in_a_task, ("a", "bc"), "abc"),
    "cursor": Shape(cursor, ("a",), "a"),
    "background": Shape(background, ("a", "b"), "a"),
    "callback": Shape(callback, ("a", "b"), "a"),
    "early commit": Shape(early_commit, ("a", "b"), "ab", stays="a"),
    "second scope": Shape(second_scope, ("a", "b"), "ab", stays="a"),
    "savepoints": Shape(savepoints, ("a",), "a"),
    "siblings": Shape(siblings, ("a",), "a"),
    "layers": Shape(layers, ("a",), "a"),
    "dependency": Shape(dependency, ("a",), "a"),
    "thread": Shape(thread, ("a", "b"), "a"),
    "two databases": Shape(two_databases, ("a", "b"), "ab", at_once=2),
    "scope alone": Shape(scope_alone, ("a", "b", "c"), "ab", stays="abc"),
    "atomic alone": Shape(atomic_alone, ("a",), "a", stays="a"),
    "generator alone": Shape(generator_alone, ("a",), "a", stays="a"),
}


async def cancel_at_every_await(
    site: Site, shape: Shape, connection: str, shift: int, label: str = ""
) -> None:
    """Do such work until it is not cancelled any more; fail if a run breaks the promise."""
    counts = set()
    for number in itertools.count(1):
        run = f"{connection} {label}{number} "
        await site.begin_anew(connection)
        interruption = Interruption(number, way(number + shift))
        with answered_commits(site.database, site.other) as commits, counted_turns() as turns:
            client, was_cancelled = await interrupted(shape.app(site, run), interruption)
        site.assert_nothing_open()
        done = "".join(text.removeprefix(run) for text in site.written())
        assert done == "".join(shape.commits[: len(commits)]), run
        assert len(commits) % shape.at_once == 0, run
        if client.complete and client.status < 400:  # type: ignore[operator]
            assert set(done) >= set(shape.told), run
        elif client.complete:
            assert set(done) <= set(shape.stays), run
        assert turns[0] < MAX_TURNS, run
        if not interruption.happened:
            break
        counts.add(len(commits))
        assert was_cancelled or site.forgets_cancellations, run
    assert (client.status, client.complete) == (shape.status, True)
    assert {0} < counts or not shape.commits  # cancelled before a COMMIT, and after one


@pytest.mark.parametrize("name", DRIVERS)
@pytest.mark.parametrize("shape", SHAPES)
async def test_work_cancelled_at_every_await(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    shape: str,
    name: str,
) -> None:
    """With a connection from the pool, and with one that is made by the first statement."""
    shift = DRIVERS.index(name) + list(SHAPES).index(shape)
    async with open_site(request, name, tmp_path) as site:
        for number, connection in enumerate(("pooled", "new")):
            await cancel_at_every_await(site, SHAPES[shape], connection, shift + 2 * number)
    assert complaints(caplog) == []


def complaints(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What asyncio says of errors that nobody has seen, but for what is asyncpg's own."""
    said = [record.getMessage() for record in caplog.records if record.name == "asyncio"]
    return [each for each in said if "unexpected connection_lost() call" not in each]


@pytest.mark.parametrize("name", ["aiosqlite", "asyncpg", "psycopg", "aiomysql"])
def test_work_cancelled_at_every_await_on_uvloop(
    request: pytest.FixtureRequest, tmp_path: Path, name: str
) -> None:
    """The same, on the loop that is not asyncio's."""
    uvloop = pytest.importorskip("uvloop")

    async def main() -> None:
        async with open_site(request, name, tmp_path) as site:
            for number, shape in enumerate(("callback", "streaming", "thread")):
                await cancel_at_every_await(site, SHAPES[shape], "new", number, f"{shape} ")

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


# --- what a request needs is with others ----------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "needs"),
    [*((name, "the connection") for name in DRIVERS), *(("aiosqlite", what) for what in LINES)],
)
async def test_cancelled_while_it_waits_for_others(
    request: pytest.FixtureRequest, tmp_path: Path, name: str, needs: str
) -> None:
    """For the only connection of the pool, or in SQLite's line of writers: the others go on, and
    what they give back finds its way to those who come next."""

    def endpoint_in_thread(request: Request) -> Response:
        write_sync(f"{run} a")
        return Response(status_code=201)

    async def endpoint(request: Request) -> Response:
        await write(f"{run} a")
        return Response(status_code=201)

    async def other() -> None:
        async with session_scope(site.database):
            await write(f"{run} other")
            has_it.set()
            await lets_go.wait()

    pool = {"pool_size": 1} if needs == "the connection" else {}
    async with open_site(request, name, tmp_path, **pool) as site:
        app = starlette(site, endpoint_in_thread if "thread" in needs else endpoint)
        for run in itertools.count(1):
            await site.begin_anew("pooled")
            has_it, lets_go = asyncio.Event(), asyncio.Event()
            rival = asyncio.create_task(other())
            await has_it.wait()
            interruption = Interruption(run, way(run))
            asyncio.get_running_loop().call_later(0.002, lets_go.set)
            client, _ = await interrupted(app, interruption)
            await rival
            site.assert_nothing_open()
            written = site.written()
            if client.complete and client.status == 201:
                assert f"{run} a" in written
            assert set(written) - {f"{run} a"} == {f"{run} other"}
            if not interruption.happened:
                break
    assert client.status == 201


# --- a part of a request is given up --------------------------------------------------------------


@pytest.mark.parametrize("then", ["answers", "goes on"])
@pytest.mark.parametrize("connection", ["pooled", "new"])
@pytest.mark.parametrize("name", DRIVERS)
async def test_part_of_a_request_given_up_at_every_await(
    request: pytest.FixtureRequest, tmp_path: Path, name: str, connection: str, then: str
) -> None:
    """An endpoint that gives it up after a time, and answers 201 all the same: what it knows to
    be written is committed, or it does not get to say so."""

    async def part() -> None:
        await write(f"{run} a")
        known.append("a")
        await read()
        async with atomic():
            await write(f"{run} b")
        known.append("b")

    async def endpoint(request: Request) -> Response:
        with contextlib.suppress(asyncio.CancelledError):
            await interruption.run(part())
        if then == "goes on":
            await write(f"{run} c")
            known.append("c")
        return Response(status_code=201)

    async with open_site(request, name, tmp_path) as site:
        shift, app = DRIVERS.index(name), starlette(site, endpoint)
        for run in itertools.count(1):
            known: list[str] = []
            await site.begin_anew(connection)
            interruption = Interruption(run, way(run + shift))
            client = await post(app)
            site.assert_nothing_open()
            written = [text.removeprefix(f"{run} ") for text in site.written()]
            assert written == (known if client.status == 201 else []), run
            if not interruption.happened:
                break
    assert client.status == 201


async def post(app: ASGIApp) -> Answer:
    async with asyncio.timeout(PATIENCE):
        return await request(app, "POST", body=b"x")


# --- the client leaves ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", DRIVERS)
@pytest.mark.parametrize("shape", ["streaming in a task", "layers", "background"])
async def test_client_that_leaves_at_every_await(
    request: pytest.FixtureRequest, tmp_path: Path, shape: str, name: str
) -> None:
    """Starlette then cancels what it has started, or goes on, whatever the server makes of what
    is sent from then on."""
    commits = SHAPES[shape].commits
    async with open_site(request, name, tmp_path) as site:
        for number in itertools.count(1):
            run = f"{number} "
            moment = Moment(number)
            await site.begin_anew("pooled")
            with answered_commits(site.database) as answered:
                await post(left(SHAPES[shape].app(site, run), moment, raises=number % 2 == 0))
            site.assert_nothing_open()
            done = "".join(text.removeprefix(run) for text in site.written())
            assert done == "".join(commits[: len(answered)]), run
            if not moment.happened:
                break
    assert done == "".join(commits)


def left(app: ASGIApp, moment: Moment, *, raises: bool) -> ASGIApp:
    """`app`, whose client leaves at that moment; whether `send()` raises from then on."""

    async def server(scope: Scope, receive: Receive, send: Send) -> None:
        gone = asyncio.Event()
        requests = [await receive()]

        async def receive_once() -> Message:
            if requests:
                return requests.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send_while_there(message: Message) -> None:
            if not gone.is_set():
                await send(message)
                await asyncio.sleep(0)
            elif raises:
                raise ClientDisconnected

        loop = asyncio.get_running_loop()
        work = app(scope, receive_once, send_while_there)
        await moment.act(work, lambda _: loop.call_soon(gone.set))

    return server


# --- the server hangs -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "when", "status"),
    [("COMMIT", "before", 201), ("COMMIT", "after", 201), ("ROLLBACK", "before", 409)],
)
@pytest.mark.parametrize("name", ASYNC_SERVERS)
async def test_cancelled_while_the_server_hangs(
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    word: str,
    when: When,
    status: int,
) -> None:
    """In COMMIT or ROLLBACK: past `end_timeout` the connection is given up. Nobody is told of a
    success, nobody spins meanwhile, and the next request finds a connection."""
    pytest.importorskip(KINDS[name].module)
    monkeypatch.setattr("repom.limit._INSIST_EVERY", LIMIT)  # drivers wait once more, politely
    url = request.getfixturevalue(KINDS[name].fixture)
    create_notes(url)
    async with FaultProxy(url) as proxy:
        database = Database(in_clear(name, proxy.url), engine_kwargs={"pool_size": 1})

        async def endpoint(request: Request) -> Response:
            await write("a")
            return Response(status_code=status)

        app = entries.serve(database, endpoint, end_timeout=LIMIT)
        for how in CANCELLING:
            await database.ping()
            proxy.stall(word.encode(), when)
            interruption = Interruption(math.inf, how)
            task = asyncio.create_task(interrupted(app, interruption))
            await proxy.struck.wait()
            interruption.cancel()
            with counted_turns() as turns:
                client, _ = await task
            assert not (client.complete and client.status == 201)
            assert turns[0] < MAX_TURNS
            assert connections_in_use(database) == 0
            await proxy.cut_all()
            assert notes(url) == (["a"] if when == "after" else [])
            execute(url, "DELETE FROM note")
        assert (await post(app)).status == status
        await database.dispose()


# --- SQLite in memory -----------------------------------------------------------------------------


@pytest.mark.parametrize("how", CANCELLING)
async def test_select_cancelled_at_every_await_leaves_a_memory_database_free(
    how: Cancelling,
) -> None:
    """For the next writer, and before the garbage collector comes: there a SELECT that is half
    read is a lock for everybody else."""
    with prepared("sqlite://?timeout=5") as database, without_garbage_collector():

        async def work() -> None:
            async with session_scope(database):
                await current_session().execute(select(Note))

        for number in itertools.count(1):
            async with session_scope(database) as session:
                session.add(Note(text=f"{number}"))
            if not await cancelled_at(number, how, work()):
                break
        assert number > 2
        await database.dispose()


@contextlib.contextmanager
def without_garbage_collector() -> Iterator[None]:
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
