"""Sanic, behind an ASGI server; not by its own, which knows no ASGI."""

import asyncio
from collections.abc import AsyncIterator
from itertools import count
from typing import Any

from sanic import Request, Sanic, Websocket, empty, json
from sanic.exceptions import Forbidden
from sanic.response import HTTPResponse
from sqlalchemy.exc import IntegrityError

from repom import Database, session_scope
from repom.middleware import DatabaseSessionMiddleware
from tests.frameworks import work

numbers = count()


async def created(request: Request) -> HTTPResponse:
    await work.create()
    return empty(201)


async def posted(request: Request) -> HTTPResponse:
    await work.create(request.body.decode())
    return empty(201)


async def returned(request: Request) -> HTTPResponse:
    await work.create()
    return empty(404)


async def raised(request: Request) -> HTTPResponse:
    await work.create()
    raise Forbidden


async def handled(request: Request) -> HTTPResponse:
    await work.create()
    raise work.Refused


async def crash(request: Request) -> HTTPResponse:
    await work.create()
    raise work.Unforeseen


async def refused(request: Request) -> HTTPResponse:
    await work.create_orphan()
    return empty(201)


async def doomed(request: Request) -> HTTPResponse:
    await work.create_doomed()
    return empty(201)


async def sync(request: Request) -> HTTPResponse:
    await asyncio.to_thread(work.create_sync)
    return empty(201)


async def sync_refused(request: Request) -> HTTPResponse:
    await asyncio.to_thread(work.create_orphan_sync)
    return empty(201)


async def background(request: Request) -> HTTPResponse:
    await work.create()
    request.app.add_task(work.later_on_its_own())
    return empty(201)


async def send(request: Request, body: AsyncIterator[bytes]) -> None:
    response = await request.respond(content_type="text/plain")
    assert response is not None
    async for chunk in body:
        await response.send(chunk)


async def stream(request: Request) -> None:
    await send(request, work.body())


async def stream_broken(request: Request) -> None:
    await send(request, work.broken_body())


async def stream_refused(request: Request) -> None:
    await send(request, work.refused_body())


async def export(request: Request) -> None:
    await send(request, work.export(await work.cursor()))


async def websocket(request: Request, ws: Websocket) -> None:
    while (text := await ws.recv()) is not None:
        async with session_scope():
            await work.create(str(text))
        await ws.send(text)


async def unprocessable(request: Request, error: Exception) -> HTTPResponse:
    return json({"detail": type(error).__name__}, 422)


async def conflict(request: Request, error: Exception) -> HTTPResponse:
    return json({"detail": type(error).__name__}, 409)


def make(database: Database, **options: Any) -> DatabaseSessionMiddleware:
    app = Sanic(f"notes-{next(numbers)}", configure_logging=False)  # no two may have one name
    app.config.TOUCHUP = False  # it would rewrite Sanic's own classes, once in a process
    for endpoint in (
        *(created, returned, raised, handled, crash, refused, doomed, sync, sync_refused),
        *(posted, background, stream, stream_broken, stream_refused, export),
    ):
        app.add_route(endpoint, f"/{endpoint.__name__.replace('_', '-')}", methods=["POST"])
    app.add_websocket_route(websocket, "/ws")
    app.exception(work.Refused)(unprocessable)
    app.exception(IntegrityError)(conflict)
    return DatabaseSessionMiddleware(app, database, **options)
