"""Real conflicts between requests, on each kind of database: both succeed.

Many clients at once are in tests/cluster/test_retries.py, what is repeated and what is not in
tests/middleware/test_replay.py.
"""

import asyncio
import sqlite3
from contextlib import closing
from typing import Any

import pytest
from sqlalchemy import func, insert, select, text, update
from sqlalchemy.exc import DBAPIError, OperationalError
from starlette.requests import Request
from starlette.responses import Response

from repom import current_scope, current_session
from repom.conflicts import is_conflict, is_lock_timeout
from repom.database import Database
from tests.dialects.drivers import open_driver
from tests.promise.entries import ASYNC_SERVERS, Entry, prepare, serve, written
from tests.support.asgi import Response as Answer
from tests.support.asgi import request
from tests.support.contention import count, counting_app, create_counter, increments
from tests.support.reader import connect, execute, rows


async def both(app: Any) -> tuple[Answer, ...]:
    """Two requests at the same time: one that begins with row 1, and one with row 2."""
    async with asyncio.timeout(5):
        return await asyncio.gather(
            request(app, "POST", "/?mine=1&other=2"), request(app, "POST", "/?mine=2&other=1")
        )


def statuses(answers: tuple[Answer, ...]) -> list[int]:
    return sorted(answer.status or 500 for answer in answers)


@pytest.mark.parametrize("answers", ["as it is", "by a handler"])
@pytest.mark.parametrize("name", ASYNC_SERVERS)
async def test_deadlock(request: pytest.FixtureRequest, name: str, answers: str) -> None:
    """Each has what the other wants. The database picks one, who finds out in a statement."""
    async with open_driver(request, name) as driver:
        prepare(driver.url)
        execute(driver.url, "INSERT INTO entry VALUES (2, 0)")
        database = Database(driver.database.url)  # with more than one connection
        both_have_one = asyncio.Barrier(2)
        attempts: list[int] = []

        async def endpoint(request: Request) -> Response:
            session, attempt = current_session(), current_scope().attempt
            attempts.append(attempt)
            if driver.url.startswith("postgresql"):  # which looks for deadlocks after a second
                await session.execute(text("SET LOCAL deadlock_timeout = '20ms'"))
            for place in ("mine", "other"):
                id_ = int(request.query_params[place])
                await session.execute(
                    update(Entry).where(Entry.id == id_).values(amount=Entry.amount + 1)
                )
                if place == "mine" and attempt == 1:
                    await both_have_one.wait()
            return Response(status_code=201)

        async def sorry(request: Request, error: Exception) -> Response:
            return Response(status_code=409)

        lost = 500 if answers == "as it is" else 409
        for retries, expected in ((0, [201, lost]), (3, [201, 201])):
            app = serve(database, endpoint, retries=retries)
            if answers != "as it is":
                app.add_exception_handler(DBAPIError, sorry)
            both_have_one = asyncio.Barrier(2)
            assert statuses(await both(app)) == expected
        await database.dispose()
        assert sorted(attempts) == [1, 1, 1, 1, 2]
        assert rows(driver.url, "SELECT amount FROM entry") == [(3,), (3,)]


@pytest.mark.parametrize("name", ["asyncpg", "psycopg"])
async def test_write_skew(request: pytest.FixtureRequest, name: str) -> None:
    """Each writes what the other has read. PostgreSQL finds out when the second one commits."""
    async with open_driver(request, name) as driver:
        prepare(driver.url)
        serializable = {"isolation_level": "SERIALIZABLE"}
        database = Database(driver.database.url, engine_kwargs=serializable)
        both_have_read = asyncio.Barrier(2)
        attempts: list[int] = []

        async def endpoint(request: Request) -> Response:
            attempt = current_scope().attempt
            attempts.append(attempt)
            session = current_session()
            total = await session.scalar(select(func.sum(Entry.amount)))
            assert total is not None
            if attempt == 1:
                await both_have_read.wait()
            id_ = int(request.query_params["mine"]) + 1
            await session.execute(insert(Entry).values(id=id_, amount=total + 1))
            return Response(status_code=201)

        app = serve(database, endpoint, retries=3)
        assert statuses(await both(app)) == [201, 201]
        await database.dispose()
        assert attempts.count(1) == 2
        assert max(attempts) > 1  # the second may come before the other has committed
        # As if one had come after the other.
        assert sorted(rows(driver.url, "SELECT amount FROM entry")) == [(0,), (1,), (2,)]


@pytest.mark.parametrize("waits", [True, False], ids=["at begin", "in the middle"])
async def test_sqlite_that_another_process_locks(sqlite_url: str, waits: bool) -> None:
    """Whether it could not begin, or has read what is out of date when it wants to write."""
    prepare(sqlite_url)
    database = Database(sqlite_url, engine_kwargs={"connect_args": {"timeout": 0.01}})
    await database.ping()  # while no writer keeps it from switching to WAL
    seen: list[BaseException] = []
    with closing(connect(sqlite_url)) as writer:
        assert isinstance(writer, sqlite3.Connection)

        def lost(error: BaseException) -> bool:
            seen.append(error)
            if writer.in_transaction:
                writer.commit()
            return is_conflict(error)

        async def endpoint(request: Request) -> Response:
            await current_session().scalar(select(func.count()).select_from(Entry))
            if not waits and current_scope().attempt == 1:
                writer.execute("INSERT INTO entry VALUES (9, 0)")
                writer.commit()
            await current_session().execute(insert(Entry).values(id=2))
            return Response(status_code=201)

        if waits:
            writer.execute("BEGIN IMMEDIATE")
        app = serve(database, endpoint, retries=3, retry_on=lost)
        app.router.routes[0].methods = {"POST", "GET"}  # type: ignore[attr-defined]
        # GET begins without asking for the lock.
        answer = await request(app, "POST" if waits else "GET")
    await database.dispose()
    assert (answer.status, answer.exception) == (201, None)
    assert 2 in written(sqlite_url)
    assert seen
    assert isinstance(seen[0], OperationalError)


async def test_lock_wait_of_mysql(mysql_url: str) -> None:
    """Who asks for it has also what was waited for in vain repeated."""
    prepare(mysql_url)
    database = Database(mysql_url)
    with closing(connect(mysql_url)) as other, closing(other.cursor()) as cursor:

        def retry_on(error: BaseException) -> bool:
            other.rollback()
            return is_conflict(error) or is_lock_timeout(error)

        async def endpoint(request: Request) -> Response:
            await current_session().execute(text("SET innodb_lock_wait_timeout = 1"))
            await current_session().execute(update(Entry).values(amount=5))
            return Response(status_code=201)

        cursor.execute("BEGIN")
        cursor.execute("UPDATE entry SET amount = 1")
        app = serve(database, endpoint, retries=1, retry_on=retry_on)
        answer = await request(app, "POST")
    await database.dispose()
    assert answer.status == 201
    assert rows(mysql_url, "SELECT amount FROM entry") == [(5,)]


async def test_several_clients(database_url: str, caplog: pytest.LogCaptureFixture) -> None:
    """Every increment is a 2xx, and is counted once."""
    caplog.set_level("CRITICAL", "repom")
    create_counter(database_url)
    serializable: dict[str, Any] = {"engine_kwargs": {"isolation_level": "SERIALIZABLE"}}
    is_postgres = database_url.startswith("postgresql")
    database = Database(database_url, **serializable if is_postgres else {})
    app = counting_app(database, locks=not is_postgres, retries=50)
    outcome = await increments([app], times=60, clients=6)
    await database.dispose()
    assert outcome.statuses == {201: 60}
    assert count(database_url) == 60
