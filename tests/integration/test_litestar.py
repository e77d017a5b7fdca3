"""What is special to Litestar: its dependencies, and where exception handlers can be registered.

What it shares with other frameworks is in tests/frameworks/test_table.py.
"""

from typing import Any

import pytest
from litestar import Litestar, Request, Response, Router, asgi, post
from litestar.di import NamedDependency, Provide
from litestar.exceptions import (
    ClientException,
    NotFoundException,
    PermissionDeniedException,
)
from litestar.middleware import DefineMiddleware
from litestar.types import Scope
from sqlalchemy import event, insert
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route

from repom import Database, current_scope, current_session
from repom.middleware import DatabaseSessionMiddleware
from repom.middleware.litestar import provide_session
from tests.middleware.notes import (
    NOTE,
    NOWHERE,
    configured_notes_database,
    connections_in_use,
    notes,
    notes_database,
    write,
)
from tests.support.asgi import LifespanFailed, lifespan, request

Error = Request[Any, Any, Any]


@post("/")
async def create(session: NamedDependency[AsyncSession]) -> None:
    await session.execute(insert(NOTE).values(text="a"))


@post("/missing")
async def missing(session: NamedDependency[AsyncSession]) -> None:
    await session.execute(insert(NOTE).values(text="a"))
    raise NotFoundException


def conflict(request: Error, error: Exception) -> Response[Any]:
    return Response({"detail": type(error).__name__}, status_code=409)


def app_of(database: Database | None = None, *handlers: Any, **options: Any) -> Any:
    return Litestar(
        list(handlers) or [create, missing],
        middleware=[DefineMiddleware(DatabaseSessionMiddleware, database=database)],
        dependencies={"session": Provide(provide_session)},
        openapi_config=None,
        **options,
    )


# --- the dependency


@pytest.mark.parametrize("middleware", [True, False], ids=["middleware", "dependency only"])
async def test_session_as_a_dependency(
    database_url: str, monkeypatch: pytest.MonkeyPatch, middleware: bool
) -> None:
    """With the middleware it ends nothing; without it commits before the response starts, and
    rolls back what raises."""
    seen: list[list[str]] = []
    app: Any = app_of()
    if not middleware:
        app = Litestar([create, missing], dependencies={"session": Provide(provide_session)})
    async with configured_notes_database(database_url, monkeypatch) as database:
        assert (await request(app, "POST", "/missing")).status == 404
        assert notes(database_url) == []
        created = await request(app, "POST", on_message=lambda _: seen.append(notes(database_url)))
        assert (created.status, seen) == (201, [["a"], ["a"]])
        assert connections_in_use(database) == 0


# --- a failed COMMIT


@post("/")
async def create_orphan() -> None:
    await write("a", parent=NOWHERE)


async def refused(database: Database, *handlers: Any, **options: Any) -> Any:
    response = await request(app_of(database, *(handlers or (create_orphan,)), **options), "POST")
    assert [m["type"] for m in response.messages].count("http.response.start") == 1
    assert connections_in_use(database) == 0
    return response


async def test_litestars_own_answer(deferring: Database) -> None:
    """Without a handler it is the JSON that Litestar sends for every exception."""
    response = await refused(deferring)
    assert (response.status, response.exception) == (500, None)
    assert response.json() == {"status_code": 500, "detail": "Internal Server Error"}


@pytest.mark.parametrize("key", [IntegrityError, Exception, 500])
async def test_ways_to_register_a_handler(sqlite_url: str, key: Any) -> None:
    """By its class, by a class above, or by status 500 for whatever is no `HTTPException`."""
    async with notes_database(sqlite_url) as database:
        response = await refused(database, exception_handlers={key: conflict})
        assert (response.status, response.json()) == (409, {"detail": "IntegrityError"})


async def test_handler_of_the_layer_counts(sqlite_url: str) -> None:
    """One of the router, or of the route, before that of the application."""

    def teapot(request: Error, error: Exception) -> Response[Any]:
        return Response({}, status_code=418)

    async with notes_database(sqlite_url) as database:
        router = Router(
            "/", route_handlers=[create_orphan], exception_handlers={IntegrityError: teapot}
        )
        response = await refused(database, router, exception_handlers={IntegrityError: conflict})
    assert response.status == 418


@pytest.mark.parametrize("handlers", [{}, {400: conflict}, {ClientException: conflict}])
async def test_http_exception_raised_by_commit(sqlite_url: str, handlers: Any) -> None:
    """A hook of the session may raise one: it is answered by its status, or by a handler."""

    def refuse(session: object) -> None:
        raise ClientException("not so")

    @post("/")
    async def doomed() -> None:
        await write("a")
        event.listen(current_session().sync_session, "before_commit", refuse)

    async with notes_database(sqlite_url) as database:
        response = await refused(database, doomed, exception_handlers=handlers)
        expected = (409, "ClientException") if handlers else (400, "not so")
        assert (response.status, response.json()["detail"]) == expected
    assert notes(sqlite_url) == []


async def test_after_exception_hooks_are_called(sqlite_url: str) -> None:
    """Once, with what COMMIT raised."""
    seen: list[Exception] = []

    async def after_exception(error: Exception, scope: Scope) -> None:
        seen.append(error)

    async with notes_database(sqlite_url) as database:
        await refused(database, after_exception=[after_exception])
    assert [type(error) for error in seen] == [IntegrityError]


async def test_handler_that_would_lie(deferring: Database) -> None:
    """A success is refused; nothing is sent by anybody but the server."""

    def lie(request: Error, error: Exception) -> Response[Any]:
        return Response({}, status_code=200)

    app = app_of(deferring, create_orphan, exception_handlers={IntegrityError: lie})
    response = await request(app, "POST")
    assert response.sent == []
    assert response.exception is not None


@pytest.mark.parametrize("outer", ["starlette", "litestar"])
async def test_handlers_of_the_inner_application_count(sqlite_url: str, outer: str) -> None:
    """Whichever framework is mounted in the other, as for what its own code raises."""

    async def teapot(request: Any, error: Exception) -> Any:
        return PlainTextResponse("", 418)

    async with notes_database(sqlite_url) as database:
        ours: dict[str, Any] = {"exception_handlers": {IntegrityError: conflict}}
        theirs: dict[str, Any] = {"exception_handlers": {IntegrityError: teapot}}
        if outer == "starlette":
            inner: Any = Litestar([create_orphan], openapi_config=None, **ours)
            app: Any = Starlette(routes=[Mount("/inner", inner)], **theirs)
        else:
            inner = Starlette(routes=[Route("/", orphan_of_starlette, methods=["POST"])], **theirs)
            mounted = asgi("/inner", is_mount=True, copy_scope=False)(inner)
            app = Litestar([mounted], openapi_config=None, **ours)
        response = await request(DatabaseSessionMiddleware(app, database), "POST", "/inner/")
    assert response.status == (409 if outer == "starlette" else 418)


async def orphan_of_starlette(request: Any) -> Any:
    await write("a", parent=NOWHERE)
    return PlainTextResponse("", 201)


# --- a request that is repeated


@post("/")
async def lost_and_then_refused() -> None:
    """Its first attempt fails at COMMIT, and has so, for Litestar, started a response."""
    attempt = current_scope().attempt
    await write("a", parent=NOWHERE if attempt == 1 else None)
    if attempt == 2:
        raise PermissionDeniedException


@pytest.mark.parametrize("around", [False, True])
async def test_answer_of_the_next_attempt(deferring: Database, around: bool) -> None:
    """Litestar answers for what is raised in it, as in the first: it has not answered before."""

    def retry_on(error: BaseException) -> bool:
        return isinstance(error, IntegrityError)

    options: dict[str, Any] = {"retries": 1, "retry_on": retry_on}
    middleware = (
        []
        if around
        else [DefineMiddleware(DatabaseSessionMiddleware, database=deferring, **options)]
    )
    app: Any = Litestar([lost_and_then_refused], middleware=middleware, openapi_config=None)
    if around:
        app = DatabaseSessionMiddleware(app, deferring, **options)
    async with lifespan(app):
        response = await request(app, "POST")
    assert (response.status, response.complete, response.exception) == (403, True, None)


# --- around the whole application


async def test_around_the_application(deferring: Database, deferring_url: str) -> None:
    """There it also serves what no route matches, and answers in the same way."""
    app = Litestar(
        [create_orphan], exception_handlers={IntegrityError: conflict}, openapi_config=None
    )
    around = DatabaseSessionMiddleware(app, deferring)
    async with lifespan(around):
        response = await request(around, "POST")
        assert (response.status, response.exception) == (409, None)
        assert (await request(around, "POST", "/nowhere")).status == 404


async def test_start_is_refused_only_around_the_application() -> None:
    """Litestar hands the lifespan to no middleware of its list, so only there it is checked."""
    database = Database("nosuch://")
    async with lifespan(app_of(database)):
        pass
    with pytest.raises(LifespanFailed):
        async with lifespan(DatabaseSessionMiddleware(Litestar(), database)):
            pass
