"""Starlette."""

from typing import Any

from sqlalchemy.exc import IntegrityError
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

from repom import Database, session_scope
from repom.middleware import DatabaseSessionMiddleware
from tests.frameworks import work


async def created(request: Request) -> Response:
    await work.create()
    return Response(status_code=201)


async def posted(request: Request) -> Response:
    await work.create((await request.body()).decode())
    return Response(status_code=201)


async def returned(request: Request) -> Response:
    await work.create()
    return Response(status_code=404)


async def raised(request: Request) -> Response:
    await work.create()
    raise HTTPException(403)


async def handled(request: Request) -> Response:
    await work.create()
    raise work.Refused


async def crash(request: Request) -> Response:
    await work.create()
    raise work.Unforeseen


async def refused(request: Request) -> Response:
    await work.create_orphan()
    return Response(status_code=201)


async def doomed(request: Request) -> Response:
    await work.create_doomed()
    return Response(status_code=201)


def sync(request: Request) -> Response:
    work.create_sync()
    return Response(status_code=201)


def sync_refused(request: Request) -> Response:
    work.create_orphan_sync()
    return Response(status_code=201)


async def background(request: Request) -> Response:
    await work.create()
    return Response(status_code=201, background=BackgroundTask(work.later))


async def stream(request: Request) -> Response:
    return StreamingResponse(work.body())


async def stream_broken(request: Request) -> Response:
    return StreamingResponse(work.broken_body())


async def stream_refused(request: Request) -> Response:
    return StreamingResponse(work.refused_body())


async def export(request: Request) -> Response:
    return StreamingResponse(work.export(await work.cursor()))


async def websocket(connection: WebSocket) -> None:
    await connection.accept()
    async for text in connection.iter_text():
        async with session_scope():
            await work.create(text)
        await connection.send_text(text)


def unprocessable(request: Request, error: Exception) -> Response:
    return JSONResponse({"detail": type(error).__name__}, 422)


def conflict(request: Request, error: Exception) -> Response:
    return JSONResponse({"detail": type(error).__name__}, 409)


def make(database: Database, **options: Any) -> Starlette:
    endpoints = [
        *(created, returned, raised, handled, crash, refused, doomed, sync, sync_refused),
        *(posted, background, stream, stream_broken, stream_refused, export),
    ]
    app = Starlette(
        routes=[
            *(
                Route(f"/{endpoint.__name__.replace('_', '-')}", endpoint, methods=["POST"])
                for endpoint in endpoints
            ),
            WebSocketRoute("/ws", websocket),
        ],
        exception_handlers={work.Refused: unprocessable, IntegrityError: conflict},
    )
    app.add_middleware(DatabaseSessionMiddleware, database, **options)
    return app
