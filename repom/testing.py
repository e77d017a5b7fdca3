"""pytest fixtures for an application's own tests.

    # conftest.py
    from repom.testing import create_async_test_fixtures

    async_db_engine, async_db_test = create_async_test_fixtures()

The schema is made once for a run, and every test is one transaction that is rolled back at its
end, whatever the test commits: SQLAlchemy's recipe for joining a session into an external
transaction (https://docs.sqlalchemy.org/en/21/orm/session_transaction.html).
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import URL, Engine, MetaData
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool

from repom.database import Database
from repom.models import Base
from repom.registry import as_databases

try:
    # Its own decorator works in its strict mode, too.
    from pytest_asyncio import fixture as async_fixture
except ImportError:  # pragma: no cover - then anyio's plugin runs async fixtures
    async_fixture = pytest.fixture  # type: ignore[assignment]


def create_async_test_fixtures(
    database: Database | str | URL | None = None, *, metadata: MetaData | None = None
) -> tuple[Any, Any]:
    """Make the fixtures `async_db_engine` (of the run) and `async_db_test` (of each test).

    Args:
        database: a `Database`, a URL, or the name of a configured one; by default the
            configured default. Missing tables are created there, and stay.
        metadata: the tables to create; by default those of `repom.models.Base`.

    Returns:
        Two fixtures, to be given names in a `conftest.py`. The first gives an `AsyncEngine`
        without a pool, which any event loop can use; the second an `AsyncSession`.
    """

    @functools.cache
    def tested() -> Database:
        return as_databases(database)[None]

    @pytest.fixture(scope="session")
    def async_db_engine() -> AsyncEngine:
        engine = tested().new_async_engine(poolclass=NullPool)
        # In a thread, so that it does not matter whether a loop is running in this one.
        with ThreadPoolExecutor(1) as thread:
            thread.submit(asyncio.run, _create_all(engine, metadata)).result()
        return engine

    @async_fixture
    async def async_db_test(async_db_engine: AsyncEngine) -> AsyncIterator[AsyncSession]:
        async with async_db_engine.connect() as connection:
            transaction = await connection.begin()
            session_class = tested().session_class
            async with session_class(connection, **_JOINED) as session:
                yield session
            await transaction.rollback()

    return async_db_engine, async_db_test


def create_test_fixtures(
    database: Database | str | URL | None = None, *, metadata: MetaData | None = None
) -> tuple[Any, Any]:
    """Make the fixtures `db_engine` and `db_test`: the sync twins of the async ones.

    Args:
        database: as for `create_async_test_fixtures`, like the other one.
    """

    @functools.cache
    def tested() -> Database:
        return as_databases(database)[None]

    @pytest.fixture(scope="session")
    def db_engine() -> Engine:
        engine = tested().new_engine(poolclass=NullPool)
        _metadata(metadata).create_all(engine)
        return engine

    @pytest.fixture
    def db_test(db_engine: Engine) -> Iterator[Session]:
        with db_engine.connect() as connection:
            transaction = connection.begin()
            session_class = tested().sync_session_class
            with session_class(connection, **_JOINED) as session:
                yield session
            transaction.rollback()

    return db_engine, db_test


#: What the test commits is a savepoint of the transaction around it.
_JOINED: dict[str, Any] = {
    "join_transaction_mode": "create_savepoint",
    "expire_on_commit": False,
}


async def _create_all(engine: AsyncEngine, metadata: MetaData | None) -> None:
    async with engine.begin() as connection:
        await connection.run_sync(_metadata(metadata).create_all)


def _metadata(metadata: MetaData | None) -> MetaData:
    return Base.metadata if metadata is None else metadata
