"""repom: the middleware, and the session as a dependency of FastAPI."""

from typing import Annotated, Any

from fastapi import Depends
from sqlalchemy.ext.asyncio import AsyncSession

from benchmarks import hosts, work
from benchmarks.work import Answer
from repom import Database
from repom.async_session import get_async_db_session
from repom.middleware import DatabaseSessionMiddleware

Session = Annotated[AsyncSession, Depends(get_async_db_session)]


async def nothing(key: int) -> Answer:
    return {"id": key}


async def select(key: int, session: Session) -> Answer:
    return await work.select_one(session, key)


async def insert(key: int, session: Session) -> Answer:
    return await work.insert_one(session, key)


async def mixed(key: int, session: Session) -> Answer:
    return await work.ten_mixed(session, key)


async def service(key: int, session: Session) -> Answer:
    for _ in range(work.CALLS):
        item = await work.get(session, key)
    return {"id": item.id, "name": item.name}


def fastapi(url: str, engine_kwargs: dict[str, Any]) -> hosts.ASGIApp:
    """In FastAPI."""
    app = hosts.fastapi(hosts.Endpoints(nothing, select, insert, mixed, service))
    app.add_middleware(DatabaseSessionMiddleware, Database(url, engine_kwargs=engine_kwargs))
    return app  # type: ignore[no-any-return]
