"""What code does with asyncpg's connection itself, past SQLAlchemy."""

from typing import Any

import pytest
from sqlalchemy import func, select, text
from sqlalchemy.ext.asyncio import AsyncSession

from repom import current_session, get_database, session_scope
from tests.support.reader import rows
from tests.testing.inner.app import User


async def driver_connection(session: AsyncSession) -> Any:
    connection = await session.connection()
    return (await connection.get_raw_connection()).driver_connection


@pytest.mark.parametrize("number", range(2))
@pytest.mark.usefixtures("async_db_test")
async def test_driver_connection(number: int) -> None:
    """It can be awaited on the loop of the test, and so can all that it returns."""
    async with session_scope() as session:
        driver = await driver_connection(session)
        assert not driver.is_closed()
        rows = [(n, f"{n}") for n in range(10)]
        await driver.copy_records_to_table("users", records=rows, columns=["id", "email"])
        assert await driver.fetchval("SELECT count(*) FROM users") == 10
        assert (await driver.fetchrow("SELECT email FROM users WHERE id = 3"))["email"] == "3"
        async with driver.transaction():
            await driver.execute("DELETE FROM users WHERE id = 9")
        statement = await driver.prepare("SELECT id FROM users ORDER BY id")
        assert len(await statement.fetch()) == 9
        async with driver.transaction():
            assert [row["id"] async for row in statement.cursor()] == list(range(9))
    async with session_scope() as session:
        assert await session.scalar(select(func.count()).select_from(User)) == 9


@pytest.mark.usefixtures("async_db_test")
@pytest.mark.parametrize("number", range(2))
async def test_locks_of_a_session(number: int) -> None:
    """They outlive a transaction, but not the test."""
    async with session_scope() as session:
        held = (
            "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()"
        )
        assert await session.scalar(text(held)) == 0
        await session.execute(text("SELECT pg_advisory_lock(1)"))
        assert await session.scalar(text(held)) == 1


@pytest.mark.usefixtures("async_db_test")
@pytest.mark.parametrize("number", range(2))
async def test_settings_of_a_session(number: int) -> None:
    """Are as they were, in the next test."""
    async with session_scope():
        assert await current_session().scalar(text("SHOW work_mem")) != "5MB"
        await current_session().execute(text("SET work_mem = '5MB'"))


@pytest.mark.usefixtures("async_db_test")
@pytest.mark.parametrize("number", range(2))
async def test_prepared_statements_after_a_schema_change(number: int) -> None:
    """What a driver remembers of a schema that was rolled back does no harm."""
    query = text("SELECT * FROM users")
    async with session_scope() as session:
        if number == 0:
            await session.execute(text("ALTER TABLE users ADD COLUMN more INTEGER"))
        columns = set((await session.execute(query)).keys())
        assert columns == {"id", "email"} | ({"more"} if number == 0 else set())


async def test_before_that(async_db_test: AsyncSession) -> None:
    """A test, whose connection is kept for the next one."""
    await async_db_test.execute(select(User))


def test_connection_is_lost_between_tests() -> None:
    """As by a server that is started anew, or by its time limit for idle connections."""
    url = get_database().url.set(drivername="postgresql").render_as_string(hide_password=False)
    terminate = (
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    assert rows(url, terminate)


async def test_after_that(async_db_test: AsyncSession) -> None:
    """The next test has a new one."""
    async_db_test.add(User(email="a"))
    await async_db_test.commit()
