"""Layers, applications inside applications, and several event loops: the promise in all of them.

repom's middleware may stand anywhere among others, `BaseHTTPMiddleware` included, which runs what
is inside it in a task of its own and passes the messages on. What a layer *inside* of repom's
makes of the response is what decides. What a layer *outside* of it makes of the response comes
after COMMIT: docs/promise.md says so, "What is not covered".

More of this: tests/integration/test_starlette.py (what decides, with layers above and below),
tests/middleware/test_starlette.py (failed commits), tests/middleware/test_session.py (joining),
tests/test_loops.py.
"""

import asyncio
import contextlib
import threading
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import anyio
import pytest
from sqlalchemy import insert, select
from sqlalchemy.exc import IntegrityError
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Mount, Route

from repom import Database, current_scope, current_session
from repom.middleware import DatabaseSessionMiddleware
from tests.middleware.held import held_commit
from tests.middleware.notes import (
    NOTE,
    NOWHERE,
    connections_in_use,
    create_notes,
    notes,
    notes_database,
    write,
    write_sync,
)
from tests.support.asgi import ASGIApp, Message, Receive, Scope, Send, request
from tests.support.asgi import request as send_request
from tests.support.polling import block_until, until
from tests.support.reader import connections
from tests.support.sockets import post, serve

Dispatch = Callable[[Request, RequestResponseEndpoint], Awaitable[Response]]


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    """An empty table of notes, on each kind of database."""
    async with notes_database(database_url) as database:
        yield database


async def passing(request: Request, call_next: RequestResponseEndpoint) -> Response:
    return await call_next(request)


def layer(dispatch: Dispatch = passing) -> Middleware:
    """A `BaseHTTPMiddleware`."""
    return Middleware(BaseHTTPMiddleware, dispatch=dispatch)


def conflict(request: Request, error: Exception) -> Response:
    return JSONResponse({"detail": "conflict"}, 409)


def starlette(
    endpoint: Any, *middleware: Middleware, handlers: Any = None, path: str = "/"
) -> Starlette:
    return Starlette(
        routes=[Route(path, endpoint, methods=["GET", "POST"])],
        middleware=list(middleware),
        exception_handlers={IntegrityError: conflict} if handlers is None else handlers,
    )


async def create(request: Request) -> Response:
    await write((await request.body()).decode() or "a")
    return Response(status_code=201)


# --- a layer inside of repom's decides what is answered, and so what is committed


async def answers_alone(request: Request, call_next: RequestResponseEndpoint) -> Response:
    await write("of the layer")
    return Response(status_code=201)


async def refuses(request: Request, call_next: RequestResponseEndpoint) -> Response:
    await write("of the layer")
    return Response(status_code=403)


async def makes_it_a_503(request: Request, call_next: RequestResponseEndpoint) -> Response:
    await call_next(request)
    return Response(status_code=503)


async def changes_the_status(request: Request, call_next: RequestResponseEndpoint) -> Response:
    response = await call_next(request)
    response.status_code = 500
    return response


async def fails_afterwards(request: Request, call_next: RequestResponseEndpoint) -> Response:
    await call_next(request)
    raise LookupError


async def reads_the_body(request: Request, call_next: RequestResponseEndpoint) -> Response:
    assert await request.body() == b"a"
    return await call_next(request)


async def writes_afterwards(request: Request, call_next: RequestResponseEndpoint) -> Response:
    response = await call_next(request)
    await write("of the layer")
    return response


INSIDE: list[tuple[Dispatch, int, list[str]]] = [
    (answers_alone, 201, ["of the layer"]),
    (refuses, 403, []),
    (makes_it_a_503, 503, []),
    (changes_the_status, 500, []),
    (fails_afterwards, 500, []),
    (reads_the_body, 201, ["a"]),
    (writes_afterwards, 201, ["a", "of the layer"]),
]


@pytest.mark.parametrize(
    ("dispatch", "status", "rows"), INSIDE, ids=[row[0].__name__ for row in INSIDE]
)
async def test_what_a_layer_inside_makes_of_the_response_decides(
    database: Database, database_url: str, dispatch: Dispatch, status: int, rows: list[str]
) -> None:
    """The status that leaves is the one that counts, and it is true before it leaves; further
    layers between change nothing."""
    seen: list[list[str]] = []
    ours = Middleware(DatabaseSessionMiddleware, database)
    app = starlette(create, layer(), ours, layer(), layer(dispatch), layer())
    response = await request(
        app, "POST", body=b"a", on_message=lambda _: seen.append(notes(database_url))
    )
    assert response.status == status
    assert seen == [rows] * len(response.sent)
    assert notes(database_url) == rows
    assert connections_in_use(database) == 0


@pytest.mark.parametrize("how", ["asyncio", "anyio"])
async def test_layer_inside_that_gives_up(database: Database, database_url: str, how: str) -> None:
    """A time-out around `call_next` that answers 504 has rolled back what was done by then."""
    written = asyncio.Event()
    go_on = asyncio.Event()

    async def slow(request: Request) -> Response:
        await write("a")
        written.set()
        await go_on.wait()
        return Response(status_code=201)

    async def gives_up(request: Request, call_next: RequestResponseEndpoint) -> Response:
        with contextlib.suppress(TimeoutError):
            if how == "asyncio":
                async with asyncio.timeout(None) as limit:
                    limits.append(lambda: limit.reschedule(0))
                    return await call_next(request)
            with anyio.CancelScope() as scope:
                limits.append(scope.cancel)
                return await call_next(request)
        return Response(status_code=504)

    limits: list[Callable[[], object]] = []
    seen: list[list[str]] = []

    def look(message: Message) -> None:
        seen.append(notes(database_url))
        if len(seen) == 2:
            go_on.set()  # Starlette lets it run to its end before the request is over

    app = starlette(slow, Middleware(DatabaseSessionMiddleware, database), layer(gives_up))
    task = asyncio.create_task(request(app, "POST", on_message=look))
    await written.wait()
    limits[0]()
    response = await task
    assert (response.status, response.complete, response.exception) == (504, True, None)
    assert seen == [[], []]
    assert notes(database_url) == []
    assert connections_in_use(database) == 0


# --- a layer outside of repom's


@pytest.fixture(params=["sqlite_url", "postgres_url"])
def deferring_url(request: pytest.FixtureRequest) -> str:
    """The URL of a database that finds a wrong parent of a note at COMMIT."""
    url: str = request.getfixturevalue(request.param)
    return url


async def test_layer_outside_that_gives_up_during_commit(deferring_url: str) -> None:
    """A pure ASGI time-out cannot answer 504 for what is committed: the response that tells of
    it has left when it gets to know."""
    limits: list[asyncio.Timeout] = []

    class GivesUp:
        def __init__(self, app: ASGIApp) -> None:
            self.app = app

        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            started = False

            async def watching_send(message: Message) -> None:
                nonlocal started
                started = True
                await send(message)

            try:
                async with asyncio.timeout(None) as limit:
                    limits.append(limit)
                    await self.app(scope, receive, watching_send)
            except TimeoutError:
                if not started:
                    await Response(status_code=504)(scope, receive, send)

    async with held_commit(deferring_url) as held:
        ours = Middleware(DatabaseSessionMiddleware, held.database)
        app = starlette(create, Middleware(GivesUp), ours, layer())
        task = asyncio.create_task(request(app, "POST"))
        await held.reached()
        limits[0].reschedule(0)
        await asyncio.sleep(0)
        held.release()
        response = await task
    assert response.status == 201
    assert notes(deferring_url) == ["a"]


async def test_layer_outside_that_tries_again(database: Database, database_url: str) -> None:
    """Each attempt is a unit of work of its own, also while Starlette keeps the one before it
    waiting: what has failed is undone, what succeeds is committed."""
    scopes: list[object] = []

    async def busy_at_first(request: Request) -> Response:
        scopes.append(current_scope())
        await write(str(len(scopes)))
        return Response(b"body", 503 if len(scopes) < 3 else 201)

    async def tries_again(request: Request, call_next: RequestResponseEndpoint) -> Response:
        response = await call_next(request)
        while response.status_code == 503:
            async for _ in response.body_iterator:  # type: ignore[attr-defined]
                continue
            response = await call_next(request)
        return response

    ours = Middleware(DatabaseSessionMiddleware, database)
    inner = starlette(busy_at_first, ours)  # joins
    app = Starlette(routes=[Mount("/", inner)], middleware=[layer(tries_again), ours])
    response = await request(app, "POST")
    assert (response.status, response.body, response.exception) == (201, b"body", None)
    assert len(set(scopes)) == 3
    assert notes(database_url) == ["3"]
    assert connections_in_use(database) == 0


async def test_layer_outside_that_replaces_the_response_comes_too_late(
    database: Database, database_url: str
) -> None:
    """Not covered, and the docs say so: it has been committed by then. So repom's is the last
    to be added."""
    ours = Middleware(DatabaseSessionMiddleware, database)
    response = await request(starlette(create, layer(makes_it_a_503), ours), "POST")
    assert response.status == 503
    assert notes(database_url) == ["a"]


# --- applications inside applications

Shape = Callable[[Database, Any], ASGIApp]


def own_middleware(database: Database, endpoint: Any) -> ASGIApp:
    """A mounted application that is one by itself, with layers above, between and below."""
    ours = Middleware(DatabaseSessionMiddleware, database)
    inner = starlette(endpoint, layer(), ours, layer())
    return Starlette(routes=[Mount("/", inner)], middleware=[layer(), ours, layer()])


def of_the_mount(database: Database, endpoint: Any) -> ASGIApp:
    """Only the mounted part has the middleware."""
    ours = Middleware(DatabaseSessionMiddleware, database)
    route = Route("/", endpoint, methods=["POST"])
    handlers = {IntegrityError: conflict}
    mount = Mount("/", routes=[route], middleware=[layer(), ours, layer()])
    return Starlette(routes=[mount], middleware=[layer()], exception_handlers=handlers)


def fastapi(database: Database, endpoint: Any) -> ASGIApp:
    """A FastAPI application in a FastAPI application."""
    from fastapi import FastAPI

    inner, outer = FastAPI(), FastAPI()
    inner.router.add_route("/", endpoint, methods=["POST"])
    inner.add_exception_handler(IntegrityError, conflict)
    for app in (inner, outer):
        app.add_middleware(BaseHTTPMiddleware, dispatch=passing)
        app.add_middleware(DatabaseSessionMiddleware, database)
    outer.mount("/", inner)
    return outer


def usual_layers(database: Database, endpoint: Any) -> ASGIApp:
    """Starlette's own, outside and inside."""
    usual = [
        Middleware(GZipMiddleware, minimum_size=1),
        Middleware(CORSMiddleware, allow_origins=["*"]),
        Middleware(TrustedHostMiddleware, allowed_hosts=["testserver"]),
        Middleware(SendsFromAnotherTask),
    ]
    return starlette(endpoint, *usual, Middleware(DatabaseSessionMiddleware, database), *usual)


class SendsFromAnotherTask:
    """A layer that hands the messages to a task.

    Args:
        waits: for each to be sent, before the app goes on.
    """

    def __init__(self, app: ASGIApp, *, waits: bool = True) -> None:
        self.app = app
        self.waits = waits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def forward() -> None:
            while message := await queue.get():
                await send(message)

        async def send_in_a_task(message: Message) -> None:
            await asyncio.create_task(send(message))  # type: ignore[arg-type]

        if self.waits:
            await self.app(scope, receive, send_in_a_task)
            return
        queue: asyncio.Queue[Message | None] = asyncio.Queue()
        forwarding = asyncio.create_task(forward())
        try:
            await self.app(scope, receive, queue.put)
        finally:
            await queue.put(None)
            await forwarding


SHAPES: list[Shape] = [own_middleware, of_the_mount, fastapi, usual_layers]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.__name__)
async def test_every_shape_of_application(
    database: Database, database_url: str, shape: Shape
) -> None:
    """A response, a stream out of a cursor, a background task: committed before the client
    hears of it, by whichever layer; what fails leaves nothing."""

    async def endpoint(request: Request) -> Response:
        kind = request.query_params["kind"]
        await write(kind)
        if kind == "crash":
            raise LookupError
        if kind == "stream":
            rows = await current_session().stream(select(NOTE.c.text))
            return StreamingResponse(row.text async for row in rows)
        status = 404 if kind == "missing" else 201
        task = BackgroundTask(write, "later") if kind == "background" else None
        return PlainTextResponse(kind, status, background=task)

    async def send(kind: str) -> tuple[int | None, list[list[str]]]:
        seen: list[list[str]] = []
        response = await request(
            app,
            "POST",
            f"/?kind={kind}",
            on_message=lambda _: seen.append(notes(database_url)),
        )
        assert response.complete
        assert isinstance(response.exception, LookupError) is (kind == "crash")
        return response.status, [seen[0], seen[-1], notes(database_url)]

    app = shape(database, endpoint)
    assert await send("plain") == (201, [["plain"]] * 3)
    assert await send("missing") == (404, [["plain"]] * 3)
    assert await send("crash") == (500, [["plain"]] * 3)
    told = ["plain", "stream"]
    assert await send("stream") == (200, [["plain"], told, told])
    told = [*told, "background"]
    assert await send("background") == (201, [told, told, [*told, "later"]])
    assert connections_in_use(database) == 0


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.__name__)
async def test_failed_commit_in_every_shape_of_application(
    deferring_url: str, shape: Shape
) -> None:
    """The innermost application's handler answers, once."""

    async def endpoint(request: Request) -> Response:
        await write("a", parent=NOWHERE)
        return PlainTextResponse("created", 201)

    async with notes_database(deferring_url) as database:
        response = await request(shape(database, endpoint), "POST")
        assert connections_in_use(database) == 0
    assert (response.status, response.exception) == (409, None)
    assert notes(deferring_url) == []


async def test_layer_between_two_of_repoms_decides(database: Database, database_url: str) -> None:
    """The middleware of a mounted application commits nothing that the outer one may yet have
    to undo."""
    ours = Middleware(DatabaseSessionMiddleware, database)
    inner = starlette(create, ours)
    app = Starlette(routes=[Mount("/", inner)], middleware=[ours, layer(makes_it_a_503)])
    response = await request(app, "POST")
    assert response.status == 503
    assert notes(database_url) == []


async def test_failed_commit_below_a_layer_that_does_not_wait(deferring_url: str) -> None:
    """What the app believes to be sent is not: the client gets the handler's answer."""

    async def endpoint(request: Request) -> Response:
        await write("a", parent=NOWHERE)
        return StreamingResponse(iter([b"x"] * 10), 201)

    async with notes_database(deferring_url) as database:
        hasty = Middleware(SendsFromAnotherTask, waits=False)
        app = starlette(endpoint, Middleware(DatabaseSessionMiddleware, database), hasty)
        response = await request(app, "POST")
        assert connections_in_use(database) == 0
    assert (response.status, response.exception) == (409, None)
    assert notes(deferring_url) == []


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.__name__)
async def test_client_that_goes_away_in_every_shape_of_application(
    database_url: str, shape: Shape
) -> None:
    """A stream that nobody reads any more is undone, but for what was written before the
    response started: a layer with a task of its own asks for the first chunk that early."""
    url = database_url
    ahead: list[list[str]] = []

    async def endpoint(_: Request) -> Response:
        async def body() -> AsyncIterator[bytes]:
            for number in range(1000):
                await write(str(number))
                yield b"x" * 1000
            raise AssertionError("it goes on to the end")

        return StreamingResponse(body())

    def look(message: Message) -> None:
        ahead.append(notes(url))

    async with notes_database(url) as database:
        await send_request(shape(database, endpoint), "POST", disconnect_after=3, on_message=look)
        assert notes(url) == ahead[0]
        assert len(ahead[0]) <= 2
        assert connections_in_use(database) == 0


# --- several event loops


def app_of_two_kinds(
    database: Database, gate: Callable[[], Coroutine[Any, Any, None]]
) -> Starlette:
    """An `async def` and a `def` endpoint, which can be held in mid-transaction."""

    async def in_the_loop(request: Request) -> Response:
        await write(request.path_params["text"])
        if "held" in request.query_params:
            await gate()
        await write(request.path_params["text"] + "!")
        return Response(status_code=201)

    def in_a_thread(request: Request) -> Response:
        write_sync(request.path_params["text"])
        if "held" in request.query_params:
            asyncio.run(gate())
        write_sync(request.path_params["text"] + "!")
        return Response(status_code=201)

    return Starlette(
        routes=[
            Route("/async/{text}", in_the_loop, methods=["POST"]),
            Route("/sync/{text}", in_a_thread, methods=["POST"]),
        ],
        middleware=[Middleware(DatabaseSessionMiddleware, database)],
    )


@pytest.mark.parametrize("kind", ["async", "sync"])
def test_one_app_on_two_servers(database_url: str, kind: str) -> None:
    """Two servers in two threads serve one app; when the first stops, a request of the second
    that is under way goes on to its COMMIT, and so do those that follow. Each closes its own
    connections."""
    held, go_on = threading.Event(), threading.Event()

    async def gate() -> None:
        held.set()
        await until(go_on.is_set)

    create_notes(database_url)
    app = app_of_two_kinds(Database(database_url), gate)
    with ThreadPoolExecutor(8) as clients, serve(app) as second:
        with serve(app) as first:
            paths = [f"{base}/{kind}/{n}" for n in range(10) for base in (first, second)]
            numbered = [f"{path}-{number}" for number, path in enumerate(paths)]
            assert set(clients.map(post, numbered)) == {201}
            if kind == "sync":  # its pool is one for both
                assert post(f"{second}/async/x") == 201
            under_way = clients.submit(post, f"{second}/{kind}/under-way?held=1")
            assert held.wait(10)
        go_on.set()
        assert under_way.result() == 201
        assert post(f"{second}/{kind}/after") == 201
    written = notes(database_url)
    assert len(written) == len(set(written))
    assert {"under-way", "under-way!", "after", "after!"} <= set(written)
    assert len(written) == 2 * (20 + 2 + (kind == "sync"))
    if not database_url.startswith("sqlite"):
        block_until(lambda: not connections(database_url))


@pytest.mark.parametrize("kind", ["async", "sync"])
def test_one_app_in_two_loops_at_once(database_url: str, kind: str) -> None:
    """Without a server: two `asyncio.run()` in two threads, twice, on one memory of the app."""
    create_notes(database_url)
    database = Database(database_url)
    app = app_of_two_kinds(database, _no_gate)
    together = threading.Barrier(2)

    async def requests(name: str) -> list[int | None]:
        together.wait(10)
        responses = await asyncio.gather(
            *(request(app, "POST", f"/{kind}/{name}-{number}") for number in range(10))
        )
        return [response.status for response in responses]

    with ThreadPoolExecutor(2) as threads:
        for turn in range(2):
            runs = threads.map(lambda name: asyncio.run(requests(name)), (f"a{turn}", f"b{turn}"))
            assert list(runs) == [[201] * 10] * 2
    assert len(set(notes(database_url))) == 2 * 2 * 2 * 10
    database.dispose_sync()


async def _no_gate() -> None:
    pass


def test_test_client(database_url: str) -> None:
    """Starlette's, whose every request without `with` has an event loop of its own: what one
    has written the next one reads, and none leaves a connection."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it would rather have another version of httpx
        from starlette.testclient import TestClient

    create_notes(database_url)
    app = app_of_two_kinds(Database(database_url), _no_gate)
    numbers = iter(range(100))
    for _ in range(2):
        with TestClient(app) as client:
            for kind in ("async", "sync"):
                assert client.post(f"/{kind}/{next(numbers)}").status_code == 201
        client = TestClient(app)
        for _ in range(2):
            assert client.post(f"/async/{next(numbers)}").status_code == 201
    assert len(set(notes(database_url))) == 16


def test_memory_database_in_several_loops() -> None:
    """`sqlite://` is one database for all loops and threads of the app, as long as it lives."""
    database = Database("sqlite://")

    async def endpoint(request: Request) -> Response:
        await current_session().execute(insert(NOTE))
        return JSONResponse(len((await current_session().execute(select(NOTE))).all()))

    app = starlette(endpoint, Middleware(DatabaseSessionMiddleware, database))
    database.create_all_sync(NOTE.metadata)
    counts = [asyncio.run(request(app, "POST")).json() for _ in range(2)]
    with serve(app) as one, serve(app) as other:
        assert [post(one), post(other)] == [200, 200]
    counts.append(asyncio.run(request(app, "POST")).json())
    assert counts == [1, 2, 5]
    database.dispose_sync()
