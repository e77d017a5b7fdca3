"""BlackSheep."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

from blacksheep import Application, Request, Response, Router, StreamedContent, WebSocket
from blacksheep.exceptions import Forbidden
from blacksheep.server.responses import json
from blacksheep.server.websocket import WebSocketDisconnectError
from sqlalchemy.exc import IntegrityError

from repom import Database, session_scope
from repom.middleware import DatabaseSessionMiddleware
from repom.middleware.blacksheep import raise_failed_commit
from tests.frameworks import work


async def created() -> Response:
    await work.create()
    return Response(201)


async def posted(request: Request) -> Response:
    await work.create((await request.read() or b"").decode())
    return Response(201)


async def returned() -> Response:
    await work.create()
    return Response(404)


async def raised() -> Response:
    await work.create()
    raise Forbidden


async def handled() -> Response:
    await work.create()
    raise work.Refused


async def crash() -> Response:
    await work.create()
    raise work.Unforeseen


async def refused() -> Response:
    await work.create_orphan()
    return Response(201)


async def doomed() -> Response:
    await work.create_doomed()
    return Response(201)


async def sync() -> Response:
    await asyncio.to_thread(work.create_sync)
    return Response(201)


async def sync_refused() -> Response:
    await asyncio.to_thread(work.create_orphan_sync)
    return Response(201)


async def background() -> Response:
    await work.create()
    work.start(work.later_on_its_own)
    return Response(201)


def streamed(body: Callable[[], AsyncIterator[bytes]]) -> Response:
    return Response(200, content=StreamedContent(b"text/plain", body))


async def stream() -> Response:
    return streamed(work.body)


async def stream_broken() -> Response:
    return streamed(work.broken_body)


async def stream_refused() -> Response:
    return streamed(work.refused_body)


async def export() -> Response:
    rows = await work.cursor()

    async def body() -> AsyncIterator[bytes]:  # no partial(): it wants a generator function
        async for chunk in work.export(rows):
            yield chunk

    return streamed(body)


async def websocket(connection: WebSocket) -> None:
    await connection.accept()
    try:
        while True:
            text = await connection.receive_text()
            async with session_scope():
                await work.create(text)
            await connection.send_text(text)
    except WebSocketDisconnectError:
        return


async def unprocessable(app: Application, request: Request, error: Exception) -> Response:
    return json({"detail": type(error).__name__}, 422)


async def conflict(app: Application, request: Request, error: Exception) -> Response:
    return json({"detail": type(error).__name__}, 409)


def make(database: Database, **options: Any) -> DatabaseSessionMiddleware:
    app = Application(router=Router())
    for endpoint in (
        *(created, returned, raised, handled, crash, refused, doomed, sync, sync_refused),
        *(posted, background, stream, stream_broken, stream_refused, export),
    ):
        app.router.add_post(f"/{endpoint.__name__.replace('_', '-')}", endpoint)
    app.router.add_ws("/ws", websocket)
    app.exceptions_handlers[work.Refused] = unprocessable
    app.exceptions_handlers[IntegrityError] = conflict
    app.middlewares.append(raise_failed_commit)
    return DatabaseSessionMiddleware(app, database, **options)
