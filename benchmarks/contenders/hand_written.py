"""By hand: a session for each endpoint, committed before it answers."""

from typing import Any

from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker, create_async_engine

from benchmarks import hosts, work
from benchmarks.work import Answer


def endpoints(engine: AsyncEngine) -> hosts.Endpoints:
    """The five endpoints."""
    sessionmaker = async_sessionmaker(engine, expire_on_commit=False)

    async def nothing(key: int) -> Answer:
        return {"id": key}

    async def select(key: int) -> Answer:
        async with sessionmaker() as session:
            answer = await work.select_one(session, key)
            await session.commit()
        return answer

    async def insert(key: int) -> Answer:
        async with sessionmaker() as session:
            answer = await work.insert_one(session, key)
            await session.commit()
        return answer

    async def mixed(key: int) -> Answer:
        async with sessionmaker() as session:
            answer = await work.ten_mixed(session, key)
            await session.commit()
        return answer

    async def service(key: int) -> Answer:
        async with sessionmaker() as session:
            for _ in range(work.CALLS):
                item = await work.get(session, key)
            await session.commit()
        return {"id": item.id, "name": item.name}

    return hosts.Endpoints(nothing, select, insert, mixed, service)


def asgi(url: str, engine_kwargs: dict[str, Any]) -> hosts.ASGIApp:
    """Without any framework."""
    engine = create_async_engine(url, **engine_kwargs)
    return hosts.bare(endpoints(engine), engine.dispose)


def fastapi(url: str, engine_kwargs: dict[str, Any]) -> hosts.ASGIApp:
    """On FastAPI."""
    engine = create_async_engine(url, **engine_kwargs)
    app: hosts.ASGIApp = hosts.fastapi(endpoints(engine), engine.dispose)
    return app
