"""FastAPI."""

from typing import Any

from fastapi import BackgroundTasks, FastAPI, HTTPException, Request, WebSocket
from fastapi.responses import JSONResponse, Response, StreamingResponse
from sqlalchemy.exc import IntegrityError

from repom import Database, session_scope
from repom.middleware import DatabaseSessionMiddleware
from tests.frameworks import work


async def created() -> None:
    await work.create()


async def posted(request: Request) -> None:
    await work.create((await request.body()).decode())


async def returned() -> Response:
    await work.create()
    return Response(status_code=404)


async def raised() -> None:
    await work.create()
    raise HTTPException(403)


async def handled() -> None:
    await work.create()
    raise work.Refused


async def crash() -> None:
    await work.create()
    raise work.Unforeseen


async def refused() -> None:
    await work.create_orphan()


async def doomed() -> None:
    await work.create_doomed()


def sync() -> None:
    work.create_sync()


def sync_refused() -> None:
    work.create_orphan_sync()


async def background(tasks: BackgroundTasks) -> None:
    await work.create()
    tasks.add_task(work.later)


async def stream() -> StreamingResponse:
    return StreamingResponse(work.body())


async def stream_broken() -> StreamingResponse:
    return StreamingResponse(work.broken_body())


async def stream_refused() -> StreamingResponse:
    return StreamingResponse(work.refused_body())


async def export() -> StreamingResponse:
    return StreamingResponse(work.export(await work.cursor()))


async def websocket(connection: WebSocket) -> None:
    await connection.accept()
    async for text in connection.iter_text():
        async with session_scope():
            await work.create(text)
        await connection.send_text(text)


async def unprocessable(request: Request, error: Exception) -> Response:
    return JSONResponse({"detail": type(error).__name__}, 422)


async def conflict(request: Request, error: Exception) -> Response:
    return JSONResponse({"detail": type(error).__name__}, 409)


def make(database: Database, **options: Any) -> FastAPI:
    app = FastAPI()
    for endpoint in (
        *(created, returned, raised, handled, crash, refused, doomed, sync, sync_refused),
        *(posted, background, stream, stream_broken, stream_refused, export),
    ):
        path = f"/{endpoint.__name__.replace('_', '-')}"
        app.post(path, status_code=201)(endpoint)
    app.websocket("/ws")(websocket)
    app.exception_handler(work.Refused)(unprocessable)
    app.exception_handler(IntegrityError)(conflict)
    app.add_middleware(DatabaseSessionMiddleware, database, **options)
    return app
