"""Litestar."""

from typing import Any

from litestar import Litestar, MediaType, Request, Response, WebSocket, post, websocket
from litestar.background_tasks import BackgroundTask
from litestar.di import NamedDependency, Provide
from litestar.exceptions import PermissionDeniedException, WebSocketDisconnect
from litestar.middleware import DefineMiddleware
from litestar.response import Stream
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from repom import Database, current_session, session_scope
from repom.middleware import DatabaseSessionMiddleware
from repom.middleware.litestar import provide_session
from tests.frameworks import work


@post("/created")
async def created(session: NamedDependency[AsyncSession]) -> None:
    assert session is current_session()
    await work.create()


@post("/posted")
async def posted(request: Request[Any, Any, Any], session: NamedDependency[AsyncSession]) -> None:
    assert session is current_session()
    await work.create((await request.body()).decode())


@post("/returned")
async def returned() -> Response[str]:
    await work.create()
    return Response("", status_code=404)


@post("/raised")
async def raised() -> None:
    await work.create()
    raise PermissionDeniedException


@post("/handled")
async def handled() -> None:
    await work.create()
    raise work.Refused


@post("/crash")
async def crash() -> None:
    await work.create()
    raise work.Unforeseen


@post("/refused")
async def refused() -> None:
    await work.create_orphan()


@post("/doomed")
async def doomed() -> None:
    await work.create_doomed()


@post("/sync", sync_to_thread=True)
def sync() -> None:
    work.create_sync()


@post("/sync-refused", sync_to_thread=True)
def sync_refused() -> None:
    work.create_orphan_sync()


@post("/background")
async def background() -> Response[None]:
    await work.create()
    return Response(None, background=BackgroundTask(work.later))


@post("/stream", status_code=200)
async def stream() -> Stream:
    return Stream(work.body())


@post("/stream-broken", status_code=200)
async def stream_broken() -> Stream:
    return Stream(work.broken_body())


@post("/stream-refused", status_code=200)
async def stream_refused() -> Stream:
    return Stream(work.refused_body())


@post("/export", status_code=200)
async def export() -> Stream:
    return Stream(work.export(await work.cursor()))


@websocket("/ws")
async def echo(socket: WebSocket[Any, Any, Any]) -> None:
    await socket.accept()
    try:
        async for text in socket.iter_data("text"):
            async with session_scope():
                await work.create(text)
            await socket.send_text(text)
    except WebSocketDisconnect:
        return


def unprocessable(request: Request[Any, Any, Any], error: Exception) -> Response[Any]:
    return Response({"detail": type(error).__name__}, status_code=422, media_type=MediaType.JSON)


def conflict(request: Request[Any, Any, Any], error: Exception) -> Response[Any]:
    return Response({"detail": type(error).__name__}, status_code=409, media_type=MediaType.JSON)


def make(database: Database, **options: Any) -> Litestar:
    return Litestar(
        [
            *(created, returned, raised, handled, crash, refused, doomed, sync, sync_refused),
            *(posted, background, stream, stream_broken, stream_refused, export, echo),
        ],
        middleware=[DefineMiddleware(DatabaseSessionMiddleware, database=database, **options)],
        dependencies={"session": Provide(provide_session)},
        exception_handlers={work.Refused: unprocessable, IntegrityError: conflict},
        openapi_config=None,
    )
