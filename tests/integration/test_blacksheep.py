"""What is special to BlackSheep: its middlewares, mounted applications, generators as handlers.

What it shares with other frameworks is in tests/frameworks/test_table.py.
"""

from collections.abc import AsyncIterable, Awaitable, Callable
from typing import Any

import pytest
from blacksheep import Application, Request, Response, Router
from blacksheep.server.sse import ServerSentEvent
from sqlalchemy.exc import IntegrityError

from repom import Database
from repom.middleware import DatabaseSessionMiddleware
from repom.middleware.blacksheep import raise_failed_commit
from tests.frameworks.apps.blacksheep import conflict
from tests.frameworks.running import lowercasing
from tests.middleware.notes import NOWHERE, Sight, notes, write
from tests.support.asgi import lifespan, request

Handler = Callable[[Request], Awaitable[Response]]


async def create() -> Response:
    await write("a")
    return Response(201)


async def create_orphan() -> Response:
    await write("a", parent=NOWHERE)
    return Response(201)


def app_of(handler: Callable[..., object], hook: bool = True) -> Application:
    app = Application(router=Router())
    app.router.add_post("/", handler)
    app.exceptions_handlers[IntegrityError] = conflict
    if hook:
        app.middlewares.append(raise_failed_commit)
    return app


async def test_middlewares_are_a_part_of_the_request(database: Database, database_url: str) -> None:
    """What they write is committed with the rest, and what they make of the status decides."""

    async def audit(request: Request, handler: Handler) -> Response:
        response = await handler(request)
        await write("audit")
        if b"refuse" in (request.url.query or b""):
            response.status = 403
        return response

    app = app_of(create)
    app.middlewares.append(audit)
    served = DatabaseSessionMiddleware(app, database)
    async with lifespan(served):
        assert (await request(served, "POST", "/?refuse")).status == 403
        assert notes(database_url) == []
        assert (await request(served, "POST")).status == 201
    assert notes(database_url) == ["a", "audit"]


async def test_without_the_middleware(deferring: Database, deferring_url: str) -> None:
    """BlackSheep does not handle what its `send` raises: the failure leaves, nothing is sent."""
    served = DatabaseSessionMiddleware(app_of(create_orphan, hook=False), deferring)
    async with lifespan(served):
        response = await request(served, "POST")
    assert isinstance(response.exception, IntegrityError)
    assert response.sent == []
    assert notes(deferring_url) == []


@pytest.mark.parametrize("around", ["child", "parent"])
async def test_mounted_application(deferring: Database, deferring_url: str, around: str) -> None:
    """Its own handlers answer, whichever of the two the middleware is around."""
    outer, child = app_of(create), app_of(create_orphan)
    if around == "child":
        outer.mount("/child", DatabaseSessionMiddleware(child, deferring))
        served: Any = outer
    else:
        outer.mount("/child", child)
        served = DatabaseSessionMiddleware(outer, deferring)
    async with lifespan(served), lifespan(child):
        response = await request(served, "POST", "/child/")
    assert (response.status, response.exception) == (409, None)
    assert notes(deferring_url) == []


async def test_generator_as_a_handler(database: Database, database_url: str) -> None:
    """Server-sent events: what it writes is committed before the last message."""

    async def events() -> AsyncIterable[ServerSentEvent]:
        yield ServerSentEvent("first")
        await write("a")
        yield ServerSentEvent("second")

    sight = Sight(database, database_url)
    served = lowercasing(DatabaseSessionMiddleware(app_of(events), database))
    async with lifespan(served):
        response = await request(served, "POST", on_message=sight)
    assert b"second" in response.body
    assert sight.seen[0] == ("start", [], 0)
    assert sight.seen[-1] == ("body", ["a"], 0)
