"""Requests of tenants that share a table and one connection: none sees what is another's."""

import asyncio
import random
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress

import pytest
from fastapi import BackgroundTasks, FastAPI, HTTPException
from fastapi.responses import StreamingResponse
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from repom import (
    Database,
    atomic,
    current_scope,
    current_session,
    current_sync_session,
    on_commit,
    on_rollback,
    session_scope,
)
from repom.middleware import DatabaseSessionMiddleware, safe_methods
from tests.support.asgi import ASGIApp, Receive, Response, Scope, Send, request
from tests.support.reader import rows
from tests.support.tenants import choose_rows, tenant, tenants_url

WRITE = text("INSERT INTO note (text) VALUES (:text)")
READ = text("SELECT DISTINCT tenant FROM note")

#: Two requests after another have the same connection.
ONE = {"pool_size": 1, "max_overflow": 0}


@pytest.fixture
def rows_url(postgres_url: str) -> Iterator[str]:
    """A table that tenants share."""
    with tenants_url(postgres_url) as url:
        yield url


class OfTenant:
    """As the guide has it: says outside of the session middleware whose request this is."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        token = tenant.set(scope["path"].split("/")[1])
        try:
            await self.app(scope, receive, send)
        finally:
            tenant.reset(token)


seen: list[tuple[str, list[str]]] = []


async def look(name: str) -> None:
    """Read and write as a tenant, and note whose rows there are."""
    session = current_session()
    seen.append((name, list(await session.scalars(READ))))
    await session.execute(WRITE, {"text": name})
    seen.append((name, list(await session.scalars(READ))))


def look_sync(name: str) -> None:
    session = current_sync_session()
    session.execute(WRITE, {"text": name})
    seen.append((name, list(session.scalars(READ))))


def application(database: Database) -> FastAPI:
    app = FastAPI()
    app.add_middleware(DatabaseSessionMiddleware, database, read_only=safe_methods)
    app.add_middleware(OfTenant)

    @app.get("/{name}")
    async def read(name: str) -> None:
        for _ in range(2):
            seen.append((name, list(await current_session().scalars(READ))))

    @app.post("/{name}/succeed")
    async def succeed(name: str, tasks: BackgroundTasks) -> None:
        await look(name)
        on_commit(lambda: look(name))
        tasks.add_task(look, name)

    @app.post("/{name}/refuse")
    async def refuse(name: str, tasks: BackgroundTasks) -> None:
        await look(name)
        on_rollback(lambda: look(name))
        raise HTTPException(409)

    @app.post("/{name}/raise")
    async def raise_(name: str) -> None:
        await look(name)
        raise LookupError

    @app.post("/{name}/abort")
    async def abort(name: str) -> None:
        await look(name)
        with pytest.raises(DBAPIError):  # swallowed: COMMIT is refused
            await current_session().execute(text("SELECT 1 / 0"))

    @app.post("/{name}/parts")
    async def parts(name: str) -> None:
        await look(name)
        with suppress(LookupError):
            async with atomic():
                await look(name)
                raise LookupError
        await look(name)
        await current_session().rollback()
        await look(name)
        await current_scope().commit()
        async with session_scope():
            await look(name)
        await look(name)

    @app.post("/{name}/stream")
    async def stream(name: str) -> StreamingResponse:
        async def body() -> AsyncIterator[bytes]:
            for _ in range(2):
                await look(name)
                yield b"x"

        return StreamingResponse(body())

    @app.post("/{name}/sync")
    def sync(name: str) -> None:
        look_sync(name)

    return app


async def test_requests_of_tenants_in_turn(rows_url: str, postgres_url: str) -> None:
    """200 requests of three tenants that succeed, fail, are cancelled or left by their client, one
    connection for all: each sees its own rows only, after its response as well."""
    seen.clear()
    database = Database(rows_url, engine_kwargs=ONE, on_begin=choose_rows)
    app, chance = application(database), random.Random(3)
    kinds = ["succeed", "succeed", "refuse", "raise", "abort", "parts", "stream", "sync", ""]

    at_once = asyncio.Semaphore(8)
    served = 0

    async def ask(number: int) -> Response:
        nonlocal served
        name, kind = chance.choice("abc"), chance.choice(kinds)
        method, path = ("POST", f"/{name}/{kind}") if kind else ("GET", f"/{name}")
        leaves = 1 if kind == "stream" and number % 3 == 0 else None
        async with at_once:
            served += 1
            if served % 7 == 0:  # of those under way, one more is cancelled
                chance.choice(tasks[max(0, number - 8) : number + 1]).cancel()
            return await request(app, method, path, disconnect_after=leaves)

    tasks = [asyncio.create_task(ask(number)) for number in range(200)]
    done = await asyncio.gather(*tasks, return_exceptions=True)
    responses = [each for each in done if isinstance(each, Response)]
    assert {each.status for each in responses} >= {200, 409, 500}
    assert all(isinstance(each, (Response, asyncio.CancelledError)) for each in done), done
    assert len(seen) > 300
    assert not [(name, found) for name, found in seen if set(found) - {name}]
    assert rows(postgres_url, "SELECT count(*) FROM note WHERE tenant <> text") == [(0,)]
    await database.dispose()
