"""Tests that leave something behind: each fails, and the one after it is as if nothing had been.

The test of the project that runs these knows what each must say.
"""

import asyncio
import gc
from typing import Any

import pytest
from sqlalchemy import insert, select, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from repom import get_database, session_scope
from repom.async_session import get_async_session
from repom.errors import SharedConnectionError
from repom.session import get_session
from tests.testing.inner.app import User, kind

kept: list[Any] = []


@pytest.fixture(autouse=True)
def starts_empty(db_test: Session) -> None:
    """Nothing of the tests before is there."""
    assert db_test.scalars(select(User.email)).all() == []


async def test_leaks_an_async_session() -> None:
    session = await get_async_session()
    kept.append(session)
    session.add(User(email="a"))
    await session.flush()  # leak 1


def test_leaks_a_sync_session() -> None:
    session = get_session()
    kept.append(session)
    session.execute(insert(User).values(email="a"))  # leak 2


async def test_leaks_a_connection() -> None:
    kept.append(await get_database().async_engine.connect())  # leak 3


@pytest.mark.filterwarnings("ignore:The garbage collector")
async def test_leaks_a_connection_of_which_nobody_knows() -> None:
    session = await get_async_session()
    await session.execute(select(User))  # leak 4
    del session
    gc.collect()


async def test_leaves_what_the_loop_ends() -> None:
    """A task that is cancelled at the end of the test's event loop is over when the fixture
    looks."""

    async def work() -> None:
        async with session_scope() as session:
            await session.execute(select(User))
            await asyncio.Event().wait()

    kept.append(asyncio.create_task(work()))
    await asyncio.sleep(0.05)


@pytest.mark.asyncio(loop_scope="session")
async def test_leaves_a_task_running() -> None:
    async def work() -> None:
        async with session_scope() as session:
            await session.execute(select(User))  # leak 5
            await stop.wait()

    stop = asyncio.Event()
    task = asyncio.create_task(work())
    kept[:0] = [stop, task]
    await asyncio.sleep(0.05)


@pytest.mark.asyncio(loop_scope="session")
async def test_stops_that_task() -> None:
    stop, task = kept[:2]
    del kept[:2]
    stop.set()
    await task


async def test_uses_the_leaked_ones() -> None:
    """Not leaked again: those of a test that has ended do nothing any more."""
    async_session, sync_session, connection = kept[:3]
    for use in (async_session.execute, async_session.commit, connection.execute):
        with pytest.raises(SharedConnectionError, match=r"belongs to .*::test_leaks_a"):
            await use(*() if use == async_session.commit else (select(User),))
    with pytest.raises(SharedConnectionError, match=r"belongs to .*::test_leaks_a_sync_session"):
        sync_session.execute(select(User))
    await async_session.close()
    sync_session.close()
    await connection.close()


async def test_ends_the_transaction_by_the_driver(async_db_test: AsyncSession) -> None:
    async_db_test.add(User(email="a"))
    await async_db_test.flush()
    connection = await async_db_test.connection()
    driver_connection: Any = (await connection.get_raw_connection()).driver_connection
    if kind == "mysql":
        cursor = await driver_connection.cursor()
        await cursor.execute("DELETE FROM users")
        await cursor.execute("COMMIT")
        await cursor.close()
    else:
        await driver_connection.execute("ROLLBACK")


async def test_closes_the_connection(async_db_test: AsyncSession) -> None:
    async_db_test.add(User(email="a"))
    await async_db_test.flush()
    connection = await async_db_test.connection()
    driver_connection: Any = (await connection.get_raw_connection()).driver_connection
    if kind == "mysql":
        driver_connection.close()
    else:
        await driver_connection.close()
    with pytest.raises(Exception, match=r"(?i)closed|connect"):
        await async_db_test.execute(select(User))
    with pytest.raises(SharedConnectionError, match="test_closes_the_connection has lost"):
        async with session_scope() as session:
            await session.execute(select(User))


async def test_rolls_back_by_a_statement(async_db_test: AsyncSession) -> None:
    """On SQLite INSERT OR ROLLBACK ends the whole transaction."""
    if kind != "sqlite":
        pytest.skip("no such statement")
    async_db_test.add(User(email="a"))
    await async_db_test.flush()
    with pytest.raises(IntegrityError):
        await async_db_test.execute(text("INSERT OR ROLLBACK INTO users (email) VALUES ('a')"))


async def test_is_tidy() -> None:
    """After all these."""
    async with session_scope() as session:
        session.add(User(email="a"))


async def test_is_tidy_again() -> None:
    """After that, too."""
    async with session_scope() as session:
        session.add(User(email="a"))
