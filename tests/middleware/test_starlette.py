"""A COMMIT that fails, in Starlette and FastAPI: their own exception handlers answer for it."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
from fastapi import BackgroundTasks, Depends, FastAPI
from sqlalchemy import event, select
from sqlalchemy.exc import IntegrityError, SQLAlchemyError
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Mount, Route

from repom import Database, current_session
from repom.errors import TransactionAbortedError
from repom.middleware import DatabaseSessionMiddleware
from tests.middleware.notes import (
    NOTE,
    NOWHERE,
    connections_in_use,
    notes,
    notes_database,
    write,
)
from tests.support.asgi import ASGIApp, Receive, Scope, Send, request
from tests.support.reader import execute

START = "http.response.start"


# --- the handlers, the layers inside the middleware, and what the endpoint does besides


def conflict(request: Request, error: Exception) -> Response:
    """A sync handler, which Starlette runs in a thread."""
    return JSONResponse({"detail": type(error).__name__}, 409)


async def async_conflict(request: Request, error: Exception) -> Response:
    """An async handler."""
    return JSONResponse({"detail": type(error).__name__}, 409)


class Passing(BaseHTTPMiddleware):
    """A layer of the kind that runs the app in a task of its own and touches the response."""

    async def dispatch(self, request: Request, call_next: RequestResponseEndpoint) -> Response:
        response = await call_next(request)
        response.headers["x-passed"] = "1"
        return response


class CatchAll:
    """A layer that answers 500 for whatever is raised inside it."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self.app(scope, receive, send)
        except Exception:
            await PlainTextResponse("caught", 500)(scope, receive, send)


@dataclass
class Happened:
    """What the application noticed."""

    events: list[str] = field(default_factory=list)

    def background(self) -> None:
        self.events.append("background ran")

    async def body(self) -> AsyncIterator[bytes]:
        for number in range(100):
            self.events.append(f"chunk {number}")
            yield b"x"
            await asyncio.sleep(0)

    async def dependency(self) -> AsyncIterator[None]:
        try:
            yield
        except BaseException as error:
            self.events.append(f"dependency saw {type(error).__name__}")
            raise
        else:
            self.events.append("dependency saw success")


def starlette_app(happened: Happened, middleware: list[Middleware], handlers: Any) -> ASGIApp:
    async def create(request: Request) -> Response:
        await write("a", parent=NOWHERE)
        task = BackgroundTask(happened.background)
        return JSONResponse({"ok": True}, 201, background=task)

    async def stream(request: Request) -> Response:
        await write("a", parent=NOWHERE)
        task = BackgroundTask(happened.background)
        return StreamingResponse(happened.body(), background=task)

    routes = [
        Route("/create", create, methods=["POST"]),
        Route("/stream", stream, methods=["POST"]),
    ]
    return Starlette(routes=routes, middleware=middleware, exception_handlers=handlers)


def fastapi_app(happened: Happened, middleware: list[Middleware], handlers: Any) -> ASGIApp:
    app = FastAPI(middleware=middleware, exception_handlers=handlers)

    @app.post("/create", status_code=201, dependencies=[Depends(happened.dependency)])
    async def create(tasks: BackgroundTasks) -> dict[str, bool]:
        tasks.add_task(happened.background)
        await write("a", parent=NOWHERE)
        return {"ok": True}

    @app.post("/stream", dependencies=[Depends(happened.dependency)])
    async def stream(tasks: BackgroundTasks) -> StreamingResponse:
        tasks.add_task(happened.background)
        await write("a", parent=NOWHERE)
        return StreamingResponse(happened.body())

    return app


MAKE = {"starlette": starlette_app, "fastapi": fastapi_app}
INSIDE: dict[str, list[Any]] = {
    "nothing": [],
    "BaseHTTPMiddleware": [Passing],
    "GZip": [GZipMiddleware],
    "catch-all": [CatchAll],
    "BaseHTTPMiddleware, catch-all": [Passing, CatchAll],
    "catch-all, BaseHTTPMiddleware": [CatchAll, Passing],
}
HANDLERS: dict[str, Any] = {"sync": conflict, "async": async_conflict, "none": None}


@pytest.mark.parametrize("path", ["/create", "/stream"])
@pytest.mark.parametrize("handler", HANDLERS)
@pytest.mark.parametrize("inside", INSIDE)
@pytest.mark.parametrize("framework", MAKE)
async def test_failed_commit_in_every_shape_of_app(
    sqlite_url: str, framework: str, inside: str, handler: str, path: str
) -> None:
    """The registered handler answers, or the layer that catches everything, or the framework's
    500: one response, no row, no background task, no stream that goes on, and dependencies with
    `yield` do not take it for success."""
    happened = Happened()
    handlers = {IntegrityError: HANDLERS[handler]} if HANDLERS[handler] else {}
    async with notes_database(sqlite_url) as database:
        middleware = [Middleware(DatabaseSessionMiddleware, database)]
        middleware += [Middleware(layer) for layer in INSIDE[inside]]
        app = MAKE[framework](happened, middleware, handlers)
        response = await request(app, "POST", path)
        in_use = connections_in_use(database)

    caught = "catch-all" in inside and inside != "BaseHTTPMiddleware, catch-all"
    if caught:
        assert (response.status, response.body) == (500, b"caught")
    elif handler != "none":
        assert (response.status, response.json()) == (409, {"detail": "IntegrityError"})
    else:
        assert (response.status, response.body) == (500, b"Internal Server Error")
        assert isinstance(response.exception, IntegrityError)
    if caught or handler != "none":
        assert response.exception is None
    assert [m["type"] for m in response.messages].count(START) == 1
    assert response.complete
    assert notes(sqlite_url) == []
    assert in_use == 0

    assert "background ran" not in happened.events
    # A layer with a task of its own may have asked for the first chunk before that.
    assert [event for event in happened.events if event.startswith("chunk")] in ([], ["chunk 0"])
    if framework == "fastapi":
        error = "CancelledError" if "BaseHTTPMiddleware" in inside else "IntegrityError"
        assert f"dependency saw {error}" in happened.events


@pytest.mark.parametrize("above", [[Passing], [CatchAll], [Passing, CatchAll, Passing]])
@pytest.mark.parametrize("framework", MAKE)
async def test_layers_outside_the_middleware_see_one_response(
    sqlite_url: str, framework: str, above: list[Any]
) -> None:
    """What the handler answers passes through layers outside of the middleware; without a
    handler they see the failure as any exception, and a catch-all can answer for it."""
    for handlers, expected in (({IntegrityError: conflict}, 409), ({}, 500)):
        happened = Happened()
        async with notes_database(sqlite_url) as database:
            middleware = [*map(Middleware, above), Middleware(DatabaseSessionMiddleware, database)]
            app = MAKE[framework](happened, middleware, handlers)
            response = await request(app, "POST", "/create")
        assert response.status == expected
        if Passing in above and handlers:
            assert response.header("x-passed") == "1"
        assert [m["type"] for m in response.messages].count(START) == 1
        assert "background ran" not in happened.events
        assert notes(sqlite_url) == []
        execute(sqlite_url, "DROP TABLE note")


# --- what a handler may do

Handler = Callable[[Request, Exception], Any]


def app_with(database: Database, handlers: Mapping[Any, Handler], fail: Any = None) -> ASGIApp:
    """A Starlette app whose COMMIT fails."""

    async def create(request: Request) -> Response:
        await write("a", parent=NOWHERE)
        if fail:
            event.listen(current_session().sync_session, "before_commit", fail)
        return JSONResponse({"ok": True}, 201)

    return Starlette(
        routes=[Route("/", create, methods=["POST"])],
        middleware=[Middleware(DatabaseSessionMiddleware, database)],
        exception_handlers=handlers,
    )


@pytest.mark.parametrize("status", [200, 204, 302])
async def test_handler_that_would_lie(deferring: Database, deferring_url: str, status: int) -> None:
    """A handler that answers 2xx or 3xx is refused: the client gets a 500, and the error of
    COMMIT leaves."""

    def lie(request: Request, error: Exception) -> Response:
        return Response(status_code=status)

    response = await request(app_with(deferring, {IntegrityError: lie}), "POST")
    assert response.status == 500
    assert isinstance(response.exception, IntegrityError)
    assert notes(deferring_url) == []


async def test_handler_that_raises(deferring: Database, deferring_url: str) -> None:
    """What the handler raises leaves, with the error of COMMIT as its context."""
    own = LookupError()

    def fail(request: Request, error: Exception) -> Response:
        raise own

    response = await request(app_with(deferring, {IntegrityError: fail}), "POST")
    assert response.status == 500
    assert response.exception is own
    assert isinstance(own.__context__, IntegrityError)
    assert notes(deferring_url) == []


async def test_handler_that_declines(deferring: Database) -> None:
    """A handler that returns nothing has not answered: the error of COMMIT leaves."""

    def decline(request: Request, error: Exception) -> None:
        return None

    response = await request(app_with(deferring, {IntegrityError: decline}), "POST")
    assert response.status == 500
    assert isinstance(response.exception, IntegrityError)


async def test_handler_that_uses_the_session(deferring: Database, deferring_url: str) -> None:
    """It gets a fresh transaction, whose work is rolled back, since it answers with an error."""
    found: list[Any] = []

    async def look(request: Request, error: Exception) -> Response:
        found.append((await current_session().execute(select(NOTE.c.text))).all())
        await write("b")
        return JSONResponse({}, 409)

    response = await request(app_with(deferring, {IntegrityError: look}), "POST")
    assert (response.status, response.exception) == (409, None)
    assert found == [[]]
    assert notes(deferring_url) == []
    assert connections_in_use(deferring) == 0


async def test_handler_that_answers_with_a_template_in_a_test(
    deferring: Database,
) -> None:
    """The debug message that Starlette's templates send to its TestClient is let through."""

    class Template(Response):
        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            await send({"type": "http.response.debug", "info": {"template": "conflict.html"}})
            await super().__call__(scope, receive, send)

    def render(request: Request, error: Exception) -> Response:
        return Template(b"conflict", 409)

    response = await request(
        app_with(deferring, {IntegrityError: render}), "POST", extensions=["http.response.debug"]
    )
    assert (response.status, response.body, response.exception) == (409, b"conflict", None)


@pytest.mark.parametrize("key", [HTTPException, 418], ids=["by class", "by status"])
async def test_http_exception_raised_by_commit(
    deferring: Database, deferring_url: str, key: Any
) -> None:
    """A hook of the session that raises an `HTTPException` at COMMIT is answered as one that
    the endpoint raises."""

    def teapot(session: Any) -> None:
        raise HTTPException(418)

    def brew(request: Request, error: Exception) -> Response:
        return PlainTextResponse("brewed", 418)

    for handlers, body in (({key: brew}, b"brewed"), ({}, b"I'm a Teapot")):
        response = await request(app_with(deferring, handlers, fail=teapot), "POST")
        assert (response.status, response.exception) == (418, None)
        assert response.body.lower() == body.lower()
    assert notes(deferring_url) == []


async def test_handler_of_a_base_class(deferring: Database) -> None:
    """A handler answers for the classes below the one it is registered for."""
    response = await request(app_with(deferring, {SQLAlchemyError: conflict}), "POST")
    assert (response.status, response.json()) == (409, {"detail": "IntegrityError"})


async def test_aborted_transaction_is_not_a_database_error(postgres_url: str) -> None:
    """A handler for `SQLAlchemyError` is not asked about it: its 409 would be wrong."""
    async with notes_database(postgres_url) as database:

        async def create(request: Request) -> Response:
            await write("a")
            with contextlib.suppress(IntegrityError):
                await write("a")
            return JSONResponse({"ok": True}, 201)

        app = Starlette(
            routes=[Route("/", create, methods=["POST"])],
            middleware=[Middleware(DatabaseSessionMiddleware, database)],
            exception_handlers={SQLAlchemyError: conflict},
        )
        response = await request(app, "POST")
    assert response.status == 500
    assert isinstance(response.exception, TransactionAbortedError)
    assert notes(postgres_url) == []


async def test_handler_for_everything(deferring: Database) -> None:
    """One for `Exception` is Starlette's outermost layer: it answers, and the error leaves."""
    response = await request(app_with(deferring, {Exception: conflict}), "POST")
    assert (response.status, response.json()) == (409, {"detail": "IntegrityError"})
    assert isinstance(response.exception, IntegrityError)


@pytest.mark.parametrize("where", ["mounted", "parent"])
async def test_handler_of_a_mounted_app(
    deferring: Database, deferring_url: str, where: str
) -> None:
    """The handlers of the app that answered count, as they do for its exceptions."""

    async def create(request: Request) -> Response:
        await write("a", parent=NOWHERE)
        return JSONResponse({"ok": True}, 201)

    handlers: dict[Any, Any] = {IntegrityError: conflict}
    mounted = Starlette(
        routes=[Route("/", create, methods=["POST"])],
        exception_handlers=handlers if where == "mounted" else {},
    )
    app = Starlette(
        routes=[Mount("/sub", mounted)],
        middleware=[Middleware(DatabaseSessionMiddleware, deferring)],
        exception_handlers=handlers if where == "parent" else {},
    )
    response = await request(app, "POST", "/sub/")
    assert response.status == (409 if where == "mounted" else 500)
    assert notes(deferring_url) == []


async def test_failure_in_the_body_is_not_rendered(deferring: Database, deferring_url: str) -> None:
    """The response has started: no handler is asked, the body is broken off, the error leaves."""
    asked: list[Exception] = []

    def ask(request: Request, error: Exception) -> Response:
        asked.append(error)
        return JSONResponse({}, 409)

    async def stream(request: Request) -> Response:
        async def body() -> AsyncIterator[bytes]:
            yield b"x"
            await write("a", parent=NOWHERE)

        return StreamingResponse(body())

    app = Starlette(
        routes=[Route("/", stream, methods=["POST"])],
        middleware=[Middleware(DatabaseSessionMiddleware, deferring)],
        exception_handlers={IntegrityError: ask},
    )
    response = await request(app, "POST")
    assert (response.status, response.body, response.complete) == (200, b"x", False)
    assert isinstance(response.exception, IntegrityError)
    assert asked == []
    assert notes(deferring_url) == []
