"""Quart."""

from collections.abc import AsyncIterator
from typing import Any

from quart import Quart, abort, request
from quart import websocket as connection
from sqlalchemy.exc import IntegrityError

from repom import Database, session_scope
from repom.middleware import DatabaseSessionMiddleware
from repom.middleware.quart import raise_failed_commit
from tests.frameworks import work

Answer = tuple[Any, int]


async def created() -> Answer:
    await work.create()
    return "", 201


async def posted() -> Answer:
    await work.create(str(await request.get_data(as_text=True)))
    return "", 201


async def returned() -> Answer:
    await work.create()
    return "", 404


async def raised() -> Answer:
    await work.create()
    abort(403)


async def handled() -> Answer:
    await work.create()
    raise work.Refused


async def crash() -> Answer:
    await work.create()
    raise work.Unforeseen


async def refused() -> Answer:
    await work.create_orphan()
    return "", 201


async def doomed() -> Answer:
    await work.create_doomed()
    return "", 201


def sync() -> Answer:
    work.create_sync()
    return "", 201


def sync_refused() -> Answer:
    work.create_orphan_sync()
    return "", 201


async def stream() -> AsyncIterator[bytes]:
    return work.body()


async def stream_broken() -> AsyncIterator[bytes]:
    return work.broken_body()


async def stream_refused() -> AsyncIterator[bytes]:
    return work.refused_body()


async def export() -> AsyncIterator[bytes]:
    return work.export(await work.cursor())


async def websocket() -> None:
    while True:
        text = await connection.receive()
        async with session_scope():
            await work.create(str(text))
        await connection.send(text)


async def unprocessable(error: Exception) -> Answer:
    return {"detail": type(error).__name__}, 422


async def conflict(error: Exception) -> Answer:
    return {"detail": type(error).__name__}, 409


def make(database: Database, **options: Any) -> Quart:
    app = Quart(__name__)

    async def background() -> Answer:
        await work.create()
        app.add_background_task(work.later_on_its_own)
        return "", 201

    for endpoint in (
        *(created, returned, raised, handled, crash, refused, doomed, sync, sync_refused),
        *(posted, background, stream, stream_broken, stream_refused, export),
    ):
        app.post(f"/{endpoint.__name__.replace('_', '-')}")(endpoint)
    app.websocket("/ws")(websocket)
    app.errorhandler(work.Refused)(unprocessable)
    app.errorhandler(IntegrityError)(conflict)
    app.before_request(raise_failed_commit)
    app.asgi_app = DatabaseSessionMiddleware(  # type: ignore[method-assign]
        app.asgi_app, database, **options
    )
    return app
