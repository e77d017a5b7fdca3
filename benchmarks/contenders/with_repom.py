"""repom: the middleware, and `current_session()` wherever one is needed."""

from typing import Any

from benchmarks import hosts, work
from benchmarks.work import Answer
from repom import Database, current_session
from repom.middleware import DatabaseSessionMiddleware, safe_methods


async def nothing(key: int) -> Answer:
    return {"id": key}


async def select(key: int) -> Answer:
    return await work.select_one(current_session(), key)


async def insert(key: int) -> Answer:
    return await work.insert_one(current_session(), key)


async def mixed(key: int) -> Answer:
    return await work.ten_mixed(current_session(), key)


async def service(key: int) -> Answer:
    for _ in range(work.CALLS):
        item = await work.get(current_session(), key)
    return {"id": item.id, "name": item.name}


ENDPOINTS = hosts.Endpoints(nothing, select, insert, mixed, service)


def asgi(url: str, engine_kwargs: dict[str, Any]) -> hosts.ASGIApp:
    """Around an application without any framework."""
    database = Database(url, engine_kwargs=engine_kwargs)
    return DatabaseSessionMiddleware(hosts.bare(ENDPOINTS), database)


def fastapi(url: str, engine_kwargs: dict[str, Any]) -> hosts.ASGIApp:
    """In FastAPI."""
    fastapi = hosts.fastapi(ENDPOINTS)
    fastapi.add_middleware(DatabaseSessionMiddleware, Database(url, engine_kwargs=engine_kwargs))
    app: hosts.ASGIApp = fastapi
    return app


def asgi_read_only(url: str, engine_kwargs: dict[str, Any]) -> hosts.ASGIApp:
    """The same, whose GET requests only read."""
    database = Database(url, engine_kwargs=engine_kwargs)
    return DatabaseSessionMiddleware(hosts.bare(ENDPOINTS), database, read_only=safe_methods)


def fastapi_read_only(url: str, engine_kwargs: dict[str, Any]) -> hosts.ASGIApp:
    """In FastAPI."""
    fastapi = hosts.fastapi(ENDPOINTS)
    fastapi.add_middleware(
        DatabaseSessionMiddleware,
        Database(url, engine_kwargs=engine_kwargs),
        read_only=safe_methods,
    )
    app: hosts.ASGIApp = fastapi
    return app
