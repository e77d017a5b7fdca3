"""context-async-sqlalchemy: either of its middlewares, and `await db_session(connection)`.

https://github.com/krylosov-aa/context-async-sqlalchemy
"""

from typing import Any

from context_async_sqlalchemy import DBConnect, db_session
from context_async_sqlalchemy.asgi_utils import ASGIHTTPDBSessionMiddleware
from context_async_sqlalchemy.fastapi_utils import add_fastapi_http_db_session_middleware
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine

from benchmarks import hosts, work
from benchmarks.work import Answer


def connect(url: str, engine_kwargs: dict[str, Any]) -> DBConnect:
    """The connection, which the library opens with the first request."""
    return DBConnect(
        engine_creator=lambda host: create_async_engine(host, **engine_kwargs),
        session_maker_creator=lambda engine: async_sessionmaker(engine, expire_on_commit=False),
        host=url,
    )


def endpoints(connection: DBConnect) -> hosts.Endpoints:
    """The five endpoints."""

    async def nothing(key: int) -> Answer:
        return {"id": key}

    async def select(key: int) -> Answer:
        return await work.select_one(await db_session(connection), key)

    async def insert(key: int) -> Answer:
        return await work.insert_one(await db_session(connection), key)

    async def mixed(key: int) -> Answer:
        return await work.ten_mixed(await db_session(connection), key)

    async def service(key: int) -> Answer:
        for _ in range(work.CALLS):
            item = await work.get(await db_session(connection), key)
        return {"id": item.id, "name": item.name}

    return hosts.Endpoints(nothing, select, insert, mixed, service)


def asgi(url: str, engine_kwargs: dict[str, Any]) -> hosts.ASGIApp:
    """The pure ASGI middleware around an application without any framework."""
    connection = connect(url, engine_kwargs)
    bare = hosts.bare(endpoints(connection), connection.close)
    app: hosts.ASGIApp = ASGIHTTPDBSessionMiddleware(bare)
    return app


def fastapi(url: str, engine_kwargs: dict[str, Any]) -> hosts.ASGIApp:
    """The pure ASGI middleware in FastAPI."""
    connection = connect(url, engine_kwargs)
    app = hosts.fastapi(endpoints(connection), connection.close)
    app.add_middleware(ASGIHTTPDBSessionMiddleware)
    return app  # type: ignore[no-any-return]


def fastapi_http(url: str, engine_kwargs: dict[str, Any]) -> hosts.ASGIApp:
    """The middleware for FastAPI, which is Starlette's `BaseHTTPMiddleware`."""
    connection = connect(url, engine_kwargs)
    app = hosts.fastapi(endpoints(connection), connection.close)
    add_fastapi_http_db_session_middleware(app)
    return app  # type: ignore[no-any-return]
