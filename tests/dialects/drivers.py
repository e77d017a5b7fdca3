"""Each driver with a database of its own, used in one way whether it is sync or async."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import pytest
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from repom.begin import BeginOptions
from repom.database import Database


class Kind(NamedTuple):
    """A driver: the fixture of its database's URL, its dialect, its module, and its world."""

    fixture: str
    drivername: str
    module: str
    is_async: bool


KINDS = {
    "asyncpg": Kind("postgres_url", "postgresql+asyncpg", "asyncpg", True),
    "psycopg": Kind("postgres_url", "postgresql+psycopg", "psycopg", True),
    "psycopg-sync": Kind("postgres_url", "postgresql+psycopg", "psycopg", False),
    "psycopg2": Kind("postgres_url", "postgresql+psycopg2", "psycopg2", False),
    "aiosqlite": Kind("sqlite_url", "sqlite+aiosqlite", "aiosqlite", True),
    "pysqlite": Kind("sqlite_url", "sqlite+pysqlite", "sqlite3", False),
    "aiomysql": Kind("mysql_url", "mysql+aiomysql", "aiomysql", True),
    "asyncmy": Kind("mysql_url", "mysql+asyncmy", "asyncmy", True),
    "pymysql": Kind("mysql_url", "mysql+pymysql", "pymysql", False),
}


def in_clear(name: str, url: str) -> str:
    """The URL of a `FaultProxy`, which needs to read along, for the driver of that name."""
    query = {"asyncpg": {"ssl": "disable"}}.get(name, {})
    if not query and KINDS[name].fixture == "postgres_url":
        query = {"sslmode": "disable"}
    parsed = make_url(url).set(drivername=KINDS[name].drivername)
    return parsed.update_query_dict(query).render_as_string(hide_password=False)


class Work:
    """A session of either world, as a coroutine uses it."""

    def __init__(self, session: AsyncSession | Session) -> None:
        self._session = session

    async def do(self, work: Callable[[Session], Any]) -> Any:
        """Call `work` with the sync session, which an `AsyncSession` has too."""
        if isinstance(self._session, AsyncSession):
            return await self._session.run_sync(work)
        return work(self._session)

    async def driver_connection(self) -> Any:
        """The connection object of the driver itself."""
        return await self.do(lambda session: session.connection().connection.driver_connection)

    async def commit(self) -> Exception | None:
        """COMMIT; return the error that it raised instead of raising it."""
        try:
            await self.do(Session.commit)
        except Exception as error:
            return error
        return None


class Driver:
    """A driver, and a database that it connects to.

    Attributes:
        url: for the readers of `tests.support.reader`, which use drivers of their own.
    """

    def __init__(self, name: str, url: str, **database_kwargs: Any) -> None:
        self.name = name
        self.url = url
        self.is_async = KINDS[name].is_async
        self.database = Database(
            make_url(url).set(drivername=KINDS[name].drivername),
            engine_kwargs={"pool_size": 1, "max_overflow": 0, "pool_timeout": 5},
            **database_kwargs,
        )

    @asynccontextmanager
    async def work(self, options: BeginOptions | None = None) -> AsyncIterator[Work]:
        """A plain session, closed after the block."""
        options = options or BeginOptions()
        session: AsyncSession | Session
        if self.is_async:
            session = AsyncSession(self.database.async_bind(options), expire_on_commit=False)
        else:
            session = Session(self.database.sync_bind(options), expire_on_commit=False)
        try:
            yield Work(session)
        finally:
            if isinstance(session, AsyncSession):
                await session.close()
            else:
                session.close()


@asynccontextmanager
async def open_driver(
    request: pytest.FixtureRequest, name: str, **database_kwargs: Any
) -> AsyncIterator[Driver]:
    """The driver of that name with an empty database; skip the test where it is not installed."""
    pytest.importorskip(KINDS[name].module)
    driver = Driver(name, request.getfixturevalue(KINDS[name].fixture), **database_kwargs)
    try:
        yield driver
    finally:
        await driver.database.dispose()
