"""An app with an endpoint for each thing that a client can meet; for servers of their own process.

`app` is the one of the configured database. When it has stopped it prints what is left.
"""

import asyncio
import gc
from collections.abc import AsyncIterator

import asyncpg
from fastapi import Depends, FastAPI, Request, WebSocket
from fastapi.responses import JSONResponse, Response, StreamingResponse
from sqlalchemy import insert, select, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from repom import current_scope, current_session, session_scope
from repom.async_session import get_async_db_session
from repom.middleware import DatabaseSessionMiddleware
from tests.middleware.notes import NOTE, NOWHERE, write
from tests.promise.breaking import BreakingApp
from tests.support.asgi import ASGIApp, Message, Receive, Scope, Send

CONFLICT = "DO $$ BEGIN RAISE EXCEPTION 'conflict' USING ERRCODE = '40001'; END $$"


async def conflict(request: Request, error: Exception) -> Response:
    return JSONResponse({"detail": "conflict"}, 409)


def app_for(url: str | None) -> FastAPI:
    """The app at `url`, or at the configured database."""
    app = FastAPI(exception_handlers={IntegrityError: conflict})
    app.add_middleware(DatabaseSessionMiddleware, url, retries=2)

    @app.post("/notes/{text}", status_code=201)
    async def create(text: str, session: AsyncSession = Depends(get_async_db_session)) -> str:
        await session.execute(insert(NOTE).values(text=text))
        return text

    @app.post("/refused", status_code=201)
    async def refused() -> None:
        await write("refused", parent=NOWHERE)

    @app.post("/repeated", status_code=201)
    async def repeated(request: Request) -> None:
        await write(f"{len(await request.body())} bytes")
        if current_scope().attempt < 3:
            await current_session().execute(text(CONFLICT))

    @app.post("/broken")
    async def broken() -> StreamingResponse:
        async def body() -> AsyncIterator[bytes]:
            yield b"x" * 1000
            await write("broken", parent=NOWHERE)

        return StreamingResponse(body())

    @app.post("/broken_at_once")
    async def broken_at_once() -> StreamingResponse:
        async def body() -> AsyncIterator[bytes]:
            await write("broken", parent=NOWHERE)
            raise LookupError
            yield b"never"

        await write("before")
        return StreamingResponse(body())

    @app.post("/endless")
    async def endless() -> StreamingResponse:
        async def body() -> AsyncIterator[bytes]:
            await write("endless")
            while True:
                yield b"x" * 65536
                await asyncio.sleep(0)  # or nobody could notice that the client is gone

        return StreamingResponse(body())

    @app.get("/notes")
    async def export() -> StreamingResponse:
        rows = await current_session().stream(select(NOTE.c.text).order_by(NOTE.c.text))
        return StreamingResponse(row.text async for row in rows)

    @app.websocket("/")
    async def chat(connection: WebSocket) -> None:
        await connection.accept()
        async for said in connection.iter_text():
            async with session_scope():
                await write(said)
            await connection.send_text(said)

    app.mount("/broken-apps", BreakingApp())
    return app


def telling_what_is_left(app: ASGIApp) -> ASGIApp:
    """`app`, with a line on how many connections are open when it has stopped."""

    async def outermost(scope: Scope, receive: Receive, send: Send) -> None:
        async def telling_send(message: Message) -> None:
            if message["type"] == "lifespan.shutdown.complete":
                found = [each for each in gc.get_objects() if isinstance(each, asyncpg.Connection)]
                print("connections left:", sum(not each.is_closed() for each in found), flush=True)
            await send(message)

        await app(scope, receive, telling_send)

    return outermost


app = telling_what_is_left(app_for(None))  # which reads the configuration at its start
