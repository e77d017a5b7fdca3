"""Tests on event loops of every scope, by whichever plugin runs them: all of the same kind."""

import asyncio
from typing import Any

import httpx
import pytest
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from repom import session_scope
from tests.testing.inner.app import User, app, create

SCOPE = "function"
loops: list[asyncio.AbstractEventLoop] = []
on_loop = pytest.mark.asyncio(loop_scope=SCOPE)


async def does_all(async_db_test: AsyncSession) -> None:
    """By the test's own session, by a unit of work, in a task and by a request."""
    loops.append(asyncio.get_running_loop())
    assert (await async_db_test.scalars(select(User))).all() == []
    async_db_test.add(User(email="a"))
    await async_db_test.commit()
    async with session_scope():
        await create("b")
    await asyncio.create_task(in_a_scope("c"))
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app), base_url="http://test"
    ) as client:
        assert (await client.post("/users?email=d")).status_code == 201
        assert (await client.post("/users/sync?email=e")).json() == ["a", "b", "c", "d", "e"]
    assert len((await async_db_test.scalars(select(User))).all()) == 5


async def in_a_scope(email: str) -> None:
    async with session_scope():
        await create(email)


@on_loop
@pytest.mark.parametrize("number", range(2))
async def test_one(async_db_test: AsyncSession, number: int) -> None:
    await does_all(async_db_test)


@on_loop
class TestOfAClass:
    """Two tests of one class."""

    @pytest.mark.parametrize("number", range(2))
    async def test_one(self, async_db_test: AsyncSession, number: int) -> None:
        await does_all(async_db_test)


def test_sync(db_test: Session) -> None:
    """Between tests that are async."""
    assert db_test.scalars(select(User)).all() == []
    asyncio.run(in_a_scope("a"))
    db_test.add(User(email="b"))
    db_test.commit()


@on_loop
async def test_with_async_fixtures(async_db_test: AsyncSession, user: Any) -> None:
    """An async fixture of the application uses the session, too."""
    assert (await async_db_test.scalars(select(User.email))).all() == ["of a fixture"]
    assert user.email == "of a fixture"


def test_number_of_loops() -> None:
    """As many as were asked for."""
    assert len(set(loops)) == {"function": 4, "class": 3, "module": 1, "session": 1}[SCOPE]
