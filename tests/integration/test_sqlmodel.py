"""SQLModel: its models, and its session classes by `session_class=`."""

from collections.abc import AsyncIterator

import httpx
import pytest
from fastapi import Depends, FastAPI, HTTPException
from sqlmodel import Field, Session, SQLModel, select
from sqlmodel.ext.asyncio.session import AsyncSession

from repom import Database, current_session, current_sync_session, session_scope
from repom.async_session import get_async_db_session
from repom.middleware import DatabaseSessionMiddleware
from tests.support.reader import rows


class Hero(SQLModel, table=True):
    id: int | None = Field(default=None, primary_key=True)
    name: str = Field(unique=True, max_length=50)


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    """A database whose sessions are SQLModel's, with the table of heroes."""
    database = Database(database_url, session_class=AsyncSession, sync_session_class=Session)
    await database.create_all(SQLModel.metadata)
    yield database
    await database.dispose()


def app_for(database: Database) -> FastAPI:
    app = FastAPI()
    app.add_middleware(DatabaseSessionMiddleware, database)

    @app.post("/heroes", status_code=201)
    async def create(hero: Hero, session: AsyncSession = Depends(get_async_db_session)) -> Hero:
        session.add(hero)
        await session.commit()  # as its documentation has it; deferred
        await session.refresh(hero)
        if hero.name == "nobody":
            raise HTTPException(422)
        return hero

    @app.get("/heroes")
    async def listed() -> list[Hero]:
        session = current_session()
        assert isinstance(session, AsyncSession)
        return list(await session.exec(select(Hero)))

    @app.get("/sync/heroes")
    def listed_by_sync_code() -> list[Hero]:
        session = current_sync_session()
        assert isinstance(session, Session)
        return list(session.exec(select(Hero)))

    return app


async def test_sessions_are_those_of_sqlmodel(database: Database, database_url: str) -> None:
    """`exec()` works in async and sync endpoints, and the response decides as ever."""
    transport = httpx.ASGITransport(app_for(database))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        created = await client.post("/heroes", json={"name": "Deadpond"})
        assert (created.status_code, created.json()) == (201, {"id": 1, "name": "Deadpond"})
        assert rows(database_url, "SELECT name FROM hero") == [("Deadpond",)]
        assert (await client.post("/heroes", json={"name": "nobody"})).status_code == 422
        assert (await client.get("/heroes")).json() == [created.json()]
        assert (await client.get("/sync/heroes")).json() == [created.json()]
    assert rows(database_url, "SELECT name FROM hero") == [("Deadpond",)]


async def test_unit_of_work_outside_of_requests(database: Database, database_url: str) -> None:
    """`session_scope()` gives SQLModel's session, too."""
    async with session_scope(database) as session:
        assert isinstance(session, AsyncSession)
        session.add(Hero(name="Rusty-Man"))
        assert (await session.exec(select(Hero.name))).all() == ["Rusty-Man"]
    assert rows(database_url, "SELECT name FROM hero") == [("Rusty-Man",)]
