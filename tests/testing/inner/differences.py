"""Tests in which something goes otherwise than with a connection for each unit of work.

Each is told so by a warning with the lines that are marked here.
"""

import pytest
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from repom import atomic, session_scope
from repom.async_session import get_async_session
from tests.testing.inner.app import User, kind

many_writers = pytest.mark.skipif(kind == "sqlite", reason="SQLite has one writer at a time")


async def emails(session: AsyncSession) -> list[str]:
    return list(await session.scalars(select(User.email).order_by(User.email)))


@many_writers
async def test_outer_unit_is_rolled_back(async_db_test: AsyncSession) -> None:
    with pytest.raises(LookupError):
        async with session_scope() as outer:
            outer.add(User(email="a"))
            await outer.flush()  # outer 1
            async with session_scope() as inner:
                inner.add(User(email="b"))
                await inner.flush()  # inner 1
            raise LookupError
    assert await emails(async_db_test) == []


@many_writers
async def test_savepoint_of_the_outer_unit_is_rolled_back(async_db_test: AsyncSession) -> None:
    async with session_scope() as outer:
        outer.add(User(email="a"))
        await outer.flush()  # outer 2
        async with session_scope() as inner:
            inner.add(User(email="not undone"))
            await inner.flush()
        with pytest.raises(LookupError):
            async with atomic():
                await emails(outer)
                async with session_scope() as inner:
                    inner.add(User(email="b"))
                    await inner.flush()  # inner 2
                raise LookupError
    assert await emails(async_db_test) == ["a", "not undone"]


async def test_savepoint_of_the_test_is_rolled_back(async_db_test: AsyncSession) -> None:
    with pytest.raises(LookupError):
        async with async_db_test.begin_nested():
            await async_db_test.execute(select(User))  # outer 3
            async with session_scope() as inner:
                inner.add(User(email="b"))
                await inner.flush()  # inner 3
            raise LookupError
    assert await emails(async_db_test) == []


@many_writers
async def test_other_session_works_meanwhile(async_db_test: AsyncSession) -> None:
    one, other = await get_async_session(), await get_async_session()
    one.add(User(email="a"))
    await one.flush()  # inner 4
    other.add(User(email="b"))
    await other.flush()  # outer 4
    one.add(User(email="c"))
    await one.commit()
    await one.close()
    await other.rollback()
    await other.close()
    assert await emails(async_db_test) == ["a"]


async def test_nothing_is_different(async_db_test: AsyncSession) -> None:
    """Read only, committed by all, or rolled back by all; nor inside of a savepoint that has not
    begun, which SQLAlchemy does with its first statement."""
    with pytest.raises(LookupError):
        async with async_db_test.begin_nested():
            async with session_scope() as inner:
                inner.add(User(email="c"))
            raise LookupError
    if kind != "sqlite":
        with pytest.raises(LookupError):
            async with session_scope() as outer:
                outer.add(User(email="a"))
                await outer.flush()
                async with session_scope() as inner:
                    await emails(inner)
                with pytest.raises(LookupError):
                    async with session_scope() as inner:
                        inner.add(User(email="b"))
                        await inner.flush()
                        raise LookupError
                raise LookupError
        async with session_scope() as outer:
            outer.add(User(email="a"))
            await outer.flush()
            async with session_scope() as inner:
                inner.add(User(email="b"))
    expected = ["c"] if kind == "sqlite" else ["a", "b", "c"]
    assert await emails(async_db_test) == expected
