"""Starlette behind the middleware: what decides, and what reaches the client when."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from sqlalchemy import insert, select
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.endpoints import HTTPEndpoint
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.websockets import WebSocket

from repom import Database, current_scope, current_session, on_commit
from repom.errors import NoScopeError
from repom.middleware import DatabaseSessionMiddleware
from tests.middleware.notes import (
    NOTE,
    connections_in_use,
    notes,
    notes_database,
    write,
    write_sync,
)
from tests.support.asgi import ASGIApp, Message, Scope, request, websocket

Endpoint = Callable[[Request], Awaitable[Response]]


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    """An empty table of notes, on each kind of database."""
    async with notes_database(database_url) as database:
        yield database


class Passing(BaseHTTPMiddleware):
    """A layer of the kind that runs what is inside it in a task of its own."""

    async def dispatch(self, request: Request, call_next: RequestResponseEndpoint) -> Response:
        return await call_next(request)


def app_of(
    endpoint: Any, database: Database, *, above: bool = False, below: bool = False, **options: Any
) -> ASGIApp:
    """A Starlette app with one endpoint, and perhaps a `BaseHTTPMiddleware` around ours."""
    middleware = [Middleware(DatabaseSessionMiddleware, database, **options)]
    middleware = [Middleware(Passing)] * above + middleware + [Middleware(Passing)] * below
    return Starlette(
        routes=[Route("/", endpoint, methods=["GET", "POST"])],
        middleware=middleware,
        exception_handlers={KeyError: lambda request, error: Response(status_code=422)},
    )


# --- what decides


async def created(request: Request) -> Response:
    await write("a")
    return Response(status_code=201)


async def redirect(request: Request) -> Response:
    await write("a")
    return Response(status_code=303, headers={"location": "/"})


async def not_found(request: Request) -> Response:
    await write("a")
    return Response(status_code=404)


async def raised_404(request: Request) -> Response:
    await write("a")
    raise HTTPException(404)


async def rendered_by_handler(request: Request) -> Response:
    await write("a")
    raise KeyError


async def crash(request: Request) -> Response:
    await write("a")
    raise LookupError


async def dry_run(request: Request) -> Response:
    await write("a")
    current_scope().rollback_only()
    return Response(status_code=201)


def in_a_thread(request: Request) -> Response:
    write_sync("a")
    return Response(status_code=201)


def thread_that_raises(request: Request) -> Response:
    write_sync("a")
    raise HTTPException(409)


DECIDES: list[tuple[Any, int, bool]] = [
    (created, 201, True),
    (redirect, 303, True),
    (not_found, 404, False),
    (raised_404, 404, False),
    (rendered_by_handler, 422, False),
    (crash, 500, False),
    (dry_run, 201, False),
    (in_a_thread, 201, True),
    (thread_that_raises, 409, False),
]


@pytest.mark.parametrize(
    ("endpoint", "status", "committed"), DECIDES, ids=[row[0].__name__ for row in DECIDES]
)
async def test_what_decides(
    database: Database, database_url: str, endpoint: Any, status: int, committed: bool
) -> None:
    """Every row of the table: when the response starts a second connection sees the row or
    not, and no connection is in use."""
    seen: list[tuple[list[str], int]] = []

    def look(message: Message) -> None:
        in_use = connections_in_use(database)
        in_use += database.engine.pool.checkedout()  # type: ignore[attr-defined]
        seen.append((notes(database_url), in_use))

    response = await request(app_of(endpoint, database), "POST", on_message=look)
    rows = ["a"] if committed else []
    assert response.status == status
    assert seen == [(rows, 0)] * len(response.sent)
    assert isinstance(response.exception, LookupError) is (endpoint is crash)


@pytest.mark.parametrize(
    "layers", [{"above": True}, {"below": True}, {"above": True, "below": True}]
)
@pytest.mark.parametrize(
    ("endpoint", "status", "committed"), DECIDES, ids=[row[0].__name__ for row in DECIDES]
)
async def test_layers_with_tasks_of_their_own_change_nothing(
    sqlite_url: str, endpoint: Any, status: int, committed: bool, layers: Any
) -> None:
    """With `BaseHTTPMiddleware` outside, inside or both it is the same."""
    seen: list[list[str]] = []
    async with notes_database(sqlite_url) as database:
        app = app_of(endpoint, database, **layers)
        response = await request(
            app, "POST", on_message=lambda message: seen.append(notes(sqlite_url))
        )
        assert connections_in_use(database) == 0
    rows = ["a"] if committed else []
    assert response.status == status
    assert seen == [rows] * len(response.sent)


async def test_class_based_endpoint(database: Database, database_url: str) -> None:
    """`HTTPEndpoint` finds the session as any code does."""

    class Notes(HTTPEndpoint):
        async def post(self, request: Request) -> Response:
            await write((await request.body()).decode())
            return Response(status_code=201)

    response = await request(app_of(Notes, database), "POST", body=b"from the body")
    assert response.status == 201
    assert notes(database_url) == ["from the body"]


async def test_session_opened_in_a_child_task(database: Database, database_url: str) -> None:
    """A session that a task of the request opens first is the request's."""

    async def endpoint(request: Request) -> Response:
        await asyncio.gather(*(write(text) for text in "abc"))
        return Response(status_code=201)

    await request(app_of(endpoint, database, below=True), "POST")
    assert sorted(notes(database_url)) == ["a", "b", "c"]


# --- bodies


@pytest.mark.parametrize("below", [False, True], ids=["", "below BaseHTTPMiddleware"])
async def test_stream_read_from_a_cursor(
    database: Database, database_url: str, below: bool
) -> None:
    """`await session.stream(...)` handed to a `StreamingResponse` sends thousands of rows, a few
    at a time; the transaction ends with the body."""
    async with database.sessionmaker.begin() as session:
        await session.execute(insert(NOTE), [{"text": f"{n:05}"} for n in range(5000)])
    read = 0
    ahead: list[int] = []
    in_use: list[int] = []

    async def endpoint(request: Request) -> Response:
        query = select(NOTE.c.text).order_by(NOTE.c.text).execution_options(yield_per=500)
        rows = await current_session().stream(query)

        async def body() -> AsyncIterator[str]:
            nonlocal read
            async for part in rows.partitions(500):
                read += 1
                yield "".join(row.text for row in part)

        return StreamingResponse(body())

    def look(message: Message) -> None:
        ahead.append(read - sum(s["type"] == "http.response.body" for s in sent))
        sent.append(message)
        in_use.append(connections_in_use(database))

    sent: list[Message] = []
    response = await request(app_of(endpoint, database, below=below), on_message=look)
    assert (response.complete, response.exception) == (True, None)
    assert response.body.decode() == "".join(f"{n:05}" for n in range(5000))
    assert max(ahead) <= 2, "read while it was sent, and not before"
    assert in_use[0] == 1
    assert in_use[-1] == 0


async def test_head_of_a_stream_read_from_a_cursor(database: Database) -> None:
    """Starlette produces the body for HEAD too: its cursor stays open for that."""

    async def endpoint(request: Request) -> Response:
        rows = await current_session().stream(select(NOTE.c.text))
        return StreamingResponse(row.text async for row in rows)

    async with database.sessionmaker.begin() as session:
        await session.execute(insert(NOTE), [{"text": f"{n:05}"} for n in range(1000)])
    response = await request(app_of(endpoint, database), "HEAD", drop_head_body=True)
    assert (response.status, response.complete, response.exception) == (200, True, None)
    assert connections_in_use(database) == 0


async def test_stream_that_breaks_off(database: Database, database_url: str) -> None:
    """A generator that raises undoes what it has written; the client sees a broken body."""

    async def endpoint(request: Request) -> Response:
        async def body() -> AsyncIterator[bytes]:
            await write("b")
            yield b"x"
            raise LookupError

        await write("a")
        return StreamingResponse(body())

    response = await request(app_of(endpoint, database), "POST")
    assert (response.status, response.body, response.complete) == (200, b"x", False)
    assert isinstance(response.exception, LookupError)
    assert notes(database_url) == ["a"]


async def test_client_that_leaves_in_the_middle_of_a_stream(
    database: Database, database_url: str
) -> None:
    """What the stream has written is undone, the connection is back in its pool."""

    async def endpoint(request: Request) -> Response:
        async def body() -> AsyncIterator[bytes]:
            for number in range(1000):
                await write(f"{number}")
                yield b"x"

        return StreamingResponse(body())

    await request(app_of(endpoint, database), "POST", disconnect_after=3)
    assert notes(database_url) == []
    assert connections_in_use(database) == 0


@pytest.mark.parametrize("fails", [False, True])
async def test_background_task(database: Database, database_url: str, fails: bool) -> None:
    """It runs after the response with a transaction of its own, which its success commits."""

    async def later() -> None:
        assert notes(database_url) == ["a"]
        await write("b")
        if fails:
            raise LookupError

    async def endpoint(request: Request) -> Response:
        await write("a")
        return PlainTextResponse("done", background=BackgroundTask(later))

    response = await request(app_of(endpoint, database), "POST")
    assert (response.status, response.body) == (200, b"done")
    assert notes(database_url) == (["a"] if fails else ["a", "b"])
    assert isinstance(response.exception, LookupError) is fails
    assert connections_in_use(database) == 0


async def test_callbacks(database: Database, database_url: str) -> None:
    """`on_commit` sees the committed row before the client hears of it; after an error status
    it is not called."""
    called: list[list[str]] = []

    async def endpoint(request: Request) -> Response:
        await write(request.query_params["status"])
        on_commit(lambda: called.append(notes(database_url)))
        return Response(status_code=int(request.query_params["status"]))

    app = app_of(endpoint, database)
    seen_called: list[int] = []
    for status in (404, 201):
        await request(
            app, "POST", f"/?status={status}", on_message=lambda _: seen_called.append(len(called))
        )
    assert called == [["201"]]
    assert seen_called == [0, 0, 1, 1]


# --- beyond HTTP


async def test_websocket_route(sqlite_url: str) -> None:
    """A `WebSocketRoute` of the app has no session; the error tells what to write."""
    from starlette.routing import WebSocketRoute

    async def endpoint(connection: WebSocket) -> None:
        await connection.accept()
        try:
            current_session()
        except NoScopeError as error:
            await connection.send_text(str(error))

    app = Starlette(
        routes=[WebSocketRoute("/", endpoint)],
        middleware=[Middleware(DatabaseSessionMiddleware, sqlite_url)],
    )
    async with websocket(app) as connection:
        message = await connection.receive()
    assert "async with session_scope() as session:" in message["text"]


async def test_scope_given_to_the_rule_is_the_request(sqlite_url: str) -> None:
    """`commit_on` can look at the route that was chosen."""
    rules: list[Any] = []

    def commit_on(status: int, asgi_scope: Scope) -> bool:
        rules.append((status, asgi_scope["endpoint"]))
        return False

    async with notes_database(sqlite_url) as database:
        await request(app_of(created, database, commit_on=commit_on), "POST")
    assert rules == [(201, created)]
    assert notes(sqlite_url) == []
