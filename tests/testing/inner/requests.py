"""Requests, by async and by blocking clients: all of them share the test's transaction."""

import asyncio
from typing import Any

import httpx
import pytest
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from tests.testing.inner.app import User, committed, kind


async def emails(session: AsyncSession) -> list[str]:
    return list(await session.scalars(select(User.email).order_by(User.email)))


def emails_sync(session: Session) -> list[str]:
    return list(session.scalars(select(User.email).order_by(User.email)))


@pytest.fixture(autouse=True)
def starts_empty(db_test: Session) -> None:
    """Nothing of the tests before is there."""
    assert emails_sync(db_test) == []


async def test_request_sees_what_the_test_has_flushed(
    async_db_test: AsyncSession, client: httpx.AsyncClient
) -> None:
    async_db_test.add(User(email="a"))
    await async_db_test.flush()
    assert (await client.get("/users")).json() == ["a"]


async def test_test_sees_what_a_request_has_committed(
    async_db_test: AsyncSession, client: httpx.AsyncClient
) -> None:
    assert (await client.post("/users?email=a")).status_code == 201
    assert await emails(async_db_test) == ["a"]
    assert committed == ["a"]


PATHS = ["/users", "/users/depends", "/users/sync", "/users/sync/depends", "/users/background"]


@pytest.mark.parametrize("path", PATHS)
async def test_every_kind_of_endpoint(
    async_db_test: AsyncSession, client: httpx.AsyncClient, path: str
) -> None:
    async_db_test.add(User(email="a"))
    await async_db_test.commit()
    response = await client.post(f"{path}?email=b")
    assert response.is_success, response.text
    assert await emails(async_db_test) == ["a", "b"]


@pytest.mark.parametrize("path", ["/users/failing", "/users/crashing"])
async def test_what_fails_is_rolled_back_and_nothing_else(
    async_db_test: AsyncSession, client: httpx.AsyncClient, path: str
) -> None:
    async_db_test.add(User(email="a"))
    await async_db_test.flush()
    assert (await client.post("/users?email=b")).status_code == 201
    assert (await client.post(f"{path}?email=c")).is_error
    assert await emails(async_db_test) == ["a", "b"]
    assert committed == ["b"]


async def test_rollback_of_the_test_undoes_its_own_work_only(
    async_db_test: AsyncSession, client: httpx.AsyncClient
) -> None:
    async_db_test.add(User(email="a"))
    await async_db_test.flush()
    await client.post("/users?email=b")
    async_db_test.add(User(email="c"))
    await async_db_test.flush()
    await async_db_test.rollback()
    assert await emails(async_db_test) == ["a", "b"]


async def test_savepoint_of_the_test_around_a_request(
    async_db_test: AsyncSession, client: httpx.AsyncClient
) -> None:
    with pytest.raises(LookupError):
        async with async_db_test.begin_nested():
            async_db_test.add(User(email="a"))
            await async_db_test.flush()
            assert (await client.get("/users")).json() == ["a"]
            raise LookupError
    assert (await client.get("/users")).json() == []


async def test_savepoints_of_a_request(
    async_db_test: AsyncSession, client: httpx.AsyncClient
) -> None:
    assert (await client.post("/users/nested?email=a")).status_code == 200
    assert await emails(async_db_test) == ["a", "a after"]
    assert committed == ["a", "a after"]


async def test_conflict_is_answered_as_in_production(
    async_db_test: AsyncSession, client: httpx.AsyncClient
) -> None:
    assert (await client.post("/users?email=a")).status_code == 201
    assert (await client.post("/users?email=a")).status_code == 409
    assert (await client.post("/users?email=b")).status_code == 201
    assert await emails(async_db_test) == ["a", "b"]


async def test_requests_at_once_take_turns(
    async_db_test: AsyncSession, client: httpx.AsyncClient
) -> None:
    reading = asyncio.create_task(emails(async_db_test))
    responses = await asyncio.gather(
        *(client.post(f"/users/slow?email={number}") for number in range(5)),
        *(client.post(f"/users/failing?email={number}x") for number in range(5)),
    )
    assert [response.status_code for response in responses] == [200] * 5 + [400] * 5
    await reading
    assert await emails(async_db_test) == ["0", "1", "2", "3", "4"]


async def test_stream(async_db_test: AsyncSession, client: httpx.AsyncClient) -> None:
    async_db_test.add_all([User(email=f"{number:03}") for number in range(200)])
    await async_db_test.flush()
    assert (await client.get("/users/stream")).text.split() == [f"{n:03}" for n in range(200)]
    assert len(await emails(async_db_test)) == 200


async def test_independent_unit_inside_a_request(
    async_db_test: AsyncSession, client: httpx.AsyncClient
) -> None:
    """SQLite refuses a writer inside a writer, in tests as in production."""
    one_writer = kind == "sqlite"
    response = await client.post("/users/audited?email=a")
    assert response.status_code == (500 if one_writer else 200)
    assert await emails(async_db_test) == ([] if one_writer else ["a", "audit of a"])


# --- blocking clients


def test_blocking_client(db_test: Session, blocking_client: Any) -> None:
    """The app has an event loop of its own, in another thread."""
    db_test.add(User(email="a"))
    db_test.flush()
    assert blocking_client.get("/users").json() == ["a"]
    for number, path in enumerate(PATHS):
        assert blocking_client.post(f"{path}?email=b{number}").is_success
    assert blocking_client.post("/users/failing?email=c").status_code == 400
    assert emails_sync(db_test) == ["a", "b0", "b1", "b2", "b3", "b4"]


def test_blocking_client_of_one_loop_for_each_request(db_test: Session) -> None:
    from repom.testing import test_client
    from tests.testing.inner.app import app

    client = test_client(app)
    assert client.post("/users?email=a").status_code == 201
    assert client.post("/users/sync?email=b").json() == ["a", "b"]
    with pytest.raises(LookupError):
        client.post("/users/crashing?email=c")
    assert emails_sync(db_test) == ["a", "b"]


def test_websocket(db_test: Session, blocking_client: Any) -> None:
    with blocking_client.websocket_connect("/ws") as websocket:
        websocket.send_text("a")
        assert websocket.receive_text() == "created"
    assert emails_sync(db_test) == ["a"]
    assert committed == ["a"]


async def test_blocking_client_in_an_async_test(
    async_db_test: AsyncSession, blocking_client: Any
) -> None:
    """It blocks the test's loop, which nothing has to wait for."""
    async_db_test.add(User(email="a"))
    await async_db_test.flush()
    assert blocking_client.post("/users?email=b").status_code == 201
    assert await emails(async_db_test) == ["a", "b"]


async def test_both_kinds_of_sessions_in_one_test(
    async_db_test: AsyncSession, db_test: Session, client: httpx.AsyncClient
) -> None:
    db_test.add(User(email="a"))
    db_test.flush()
    async_db_test.add(User(email="b"))
    await async_db_test.flush()
    assert (await client.get("/users")).json() == ["a", "b"]
    assert emails_sync(db_test) == await emails(async_db_test) == ["a", "b"]
    await async_db_test.rollback()
    assert emails_sync(db_test) == ["a", "b"]
