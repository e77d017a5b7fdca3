"""Falcon."""

import asyncio
from typing import Any

import falcon
import falcon.asgi
from falcon.asgi import Request, Response, WebSocket
from sqlalchemy.exc import IntegrityError

from repom import Database, session_scope
from repom.middleware import DatabaseSessionMiddleware
from repom.middleware.falcon import RaiseFailedCommit
from tests.frameworks import work


class Notes:
    async def on_post_created(self, req: Request, resp: Response) -> None:
        await work.create()
        resp.status = 201

    async def on_post_posted(self, req: Request, resp: Response) -> None:
        await work.create((await req.stream.read()).decode())
        resp.status = 201

    async def on_post_returned(self, req: Request, resp: Response) -> None:
        await work.create()
        resp.status = 404

    async def on_post_raised(self, req: Request, resp: Response) -> None:
        await work.create()
        raise falcon.HTTPForbidden

    async def on_post_handled(self, req: Request, resp: Response) -> None:
        await work.create()
        raise work.Refused

    async def on_post_crash(self, req: Request, resp: Response) -> None:
        await work.create()
        raise work.Unforeseen

    async def on_post_refused(self, req: Request, resp: Response) -> None:
        await work.create_orphan()
        resp.status = 201

    async def on_post_doomed(self, req: Request, resp: Response) -> None:
        await work.create_doomed()
        resp.status = 201

    async def on_post_sync(self, req: Request, resp: Response) -> None:
        await asyncio.to_thread(work.create_sync)
        resp.status = 201

    async def on_post_sync_refused(self, req: Request, resp: Response) -> None:
        await asyncio.to_thread(work.create_orphan_sync)
        resp.status = 201

    async def on_post_background(self, req: Request, resp: Response) -> None:
        await work.create()
        resp.schedule(work.later_on_its_own)
        resp.status = 201

    async def on_post_stream(self, req: Request, resp: Response) -> None:
        resp.stream = work.body()

    async def on_post_stream_broken(self, req: Request, resp: Response) -> None:
        resp.stream = work.broken_body()

    async def on_post_stream_refused(self, req: Request, resp: Response) -> None:
        resp.stream = work.refused_body()

    async def on_post_export(self, req: Request, resp: Response) -> None:
        resp.stream = work.export(await work.cursor())

    async def on_websocket(self, req: Request, ws: WebSocket) -> None:
        await ws.accept()
        while True:
            text = await ws.receive_text()
            async with session_scope():
                await work.create(text)
            await ws.send_text(text)


async def unprocessable(
    req: Request, resp: Response | None, error: work.Refused, params: dict[str, Any]
) -> None:
    assert resp is not None
    resp.status = 422
    resp.media = {"detail": type(error).__name__}


async def conflict(
    req: Request, resp: Response | None, error: IntegrityError, params: dict[str, Any]
) -> None:
    raise falcon.HTTPConflict(title=type(error).__name__)


def make(database: Database, **options: Any) -> DatabaseSessionMiddleware:
    app = falcon.asgi.App(middleware=[RaiseFailedCommit()])
    notes = Notes()
    for name in vars(Notes):
        if name.startswith("on_post_"):
            suffix = name.removeprefix("on_post_")
            app.add_route(f"/{suffix.replace('_', '-')}", notes, suffix=suffix)
    app.add_route("/ws", notes)
    app.add_error_handler(work.Refused, unprocessable)
    app.add_error_handler(IntegrityError, conflict)
    return DatabaseSessionMiddleware(app, database, **options)
