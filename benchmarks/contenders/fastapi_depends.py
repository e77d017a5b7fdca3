"""FastAPI's documented pattern: a dependency with `yield`.

https://fastapi.tiangolo.com/tutorial/sql-databases/ and
https://fastapi.tiangolo.com/tutorial/dependencies/dependencies-with-yield/
"""

from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import Depends
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

from benchmarks import hosts, work
from benchmarks.work import Answer


def fastapi(url: str, engine_kwargs: dict[str, Any]) -> hosts.ASGIApp:
    """The application."""
    engine = create_async_engine(url, **engine_kwargs)
    sessionmaker = async_sessionmaker(engine, expire_on_commit=False)

    async def get_session() -> AsyncIterator[AsyncSession]:
        async with sessionmaker() as session:
            yield session

    Session = Annotated[AsyncSession, Depends(get_session)]  # noqa: N806 - as FastAPI writes it

    async def nothing(key: int) -> Answer:
        return {"id": key}

    async def select(key: int, session: Session) -> Answer:
        answer = await work.select_one(session, key)
        await session.commit()
        return answer

    async def insert(key: int, session: Session) -> Answer:
        answer = await work.insert_one(session, key)
        await session.commit()
        return answer

    async def mixed(key: int, session: Session) -> Answer:
        answer = await work.ten_mixed(session, key)
        await session.commit()
        return answer

    async def service(key: int, session: Session) -> Answer:
        for _ in range(work.CALLS):
            item = await work.get(session, key)
        await session.commit()
        return {"id": item.id, "name": item.name}

    endpoints = hosts.Endpoints(nothing, select, insert, mixed, service)
    app: hosts.ASGIApp = hosts.fastapi(endpoints, engine.dispose)
    return app
