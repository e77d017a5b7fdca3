"""PostgreSQL: what only its drivers need."""

from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest
from sqlalchemy import text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.orm import Session

from repom.begin import BeginOptions
from repom.database import Database
from repom.dialects import support_for
from repom.dialects.postgresql import sqlstate
from repom.errors import TransactionAbortedError
from tests.dialects.drivers import Driver, Work, open_driver
from tests.support.polling import until
from tests.support.reader import connections, execute, rows


@pytest.fixture(params=["asyncpg", "psycopg", "psycopg-sync", "psycopg2"])
async def driver(request: pytest.FixtureRequest) -> AsyncIterator[Driver]:
    """Each driver, with a table that holds row 1."""
    async with open_driver(request, request.param) as driver:
        execute(driver.url, "create table t (id integer primary key, n integer default 0)")
        execute(driver.url, "insert into t values (1)")
        yield driver


def ids(url: str) -> set[int]:
    return {id_ for (id_,) in rows(url, "select id from t")}


async def run(work: Work, sql: str) -> Any:
    return await work.do(lambda session: session.execute(text(sql)))


async def test_a_savepoint_after_an_error_heals_what_came_after_it(driver: Driver) -> None:
    """The statement that failed inside it is undone, everything else is committed."""

    def work_(session: Session) -> None:
        session.execute(text("insert into t values (2)"))
        for id_ in (1, 3, 1):
            try:
                with session.begin_nested():
                    session.execute(text(f"insert into t values ({id_})"))
            except IntegrityError:
                continue

    async with driver.work() as work:
        await work.do(work_)
        assert await work.commit() is None
    assert ids(driver.url) == {1, 2, 3}


async def test_a_savepoint_cannot_be_set_in_an_aborted_transaction(driver: Driver) -> None:
    """Whoever tries and swallows that error too is refused at COMMIT, with the first error as
    the cause."""

    def work_(session: Session) -> DBAPIError:
        with pytest.raises(IntegrityError) as first:
            session.execute(text("insert into t values (1)"))
        with pytest.raises(DBAPIError), session.begin_nested():
            session.execute(text("insert into t values (2)"))
        return first.value

    async with driver.work() as work:
        first = await work.do(work_)
        refused = await work.commit()
    assert isinstance(refused, TransactionAbortedError)
    assert refused.__cause__ is first.orig
    assert ids(driver.url) == {1}


async def test_a_conflict_found_at_commit_passes_through(driver: Driver) -> None:
    """A serialisation failure is the driver's own error with its SQLSTATE, by which the
    application can decide to try again."""
    execute(driver.url, "insert into t values (2)")
    async with driver.work(BeginOptions(isolation_level="SERIALIZABLE")) as work:
        await run(work, "select sum(n) from t")
        rival = Driver(driver.name, driver.url)
        async with rival.work(BeginOptions(isolation_level="SERIALIZABLE")) as other:
            await run(other, "select sum(n) from t")
            await run(other, "update t set n = 1 where id = 1")
            await run(work, "update t set n = 1 where id = 2")
            assert await other.commit() is None
        error = await work.commit()
        await rival.database.dispose()
    assert isinstance(error, DBAPIError)
    assert error.orig is not None
    assert sqlstate(error.orig) == "40001"
    async with driver.work() as work:
        await run(work, "update t set n = 2")
        assert await work.commit() is None


@pytest.mark.parametrize("name", ["asyncpg", "psycopg", "psycopg-sync"])
async def test_a_transaction_ended_for_being_idle_is_an_ordinary_error(
    request: pytest.FixtureRequest, name: str
) -> None:
    """idle_in_transaction_session_timeout: the server has said that it is over, so nothing about
    COMMIT is unknown."""
    async with open_driver(request, name) as driver:
        async with driver.work() as work:
            await run(work, "set local idle_in_transaction_session_timeout = 10")
            connection = await work.driver_connection()
            await until(lambda: not connections(driver.url))
            if name == "asyncpg":  # which needs a moment to notice
                await until(connection.is_closed)
            assert isinstance(await work.commit(), DBAPIError)
        async with driver.work() as work:
            await run(work, "select 1")


async def test_in_autocommit_there_is_nothing_to_refuse(driver: Driver) -> None:
    """Each statement stands for itself, also after one that failed."""
    async with driver.work(BeginOptions(isolation_level="AUTOCOMMIT")) as work:
        await run(work, "insert into t values (2)")
        with pytest.raises(IntegrityError):
            await run(work, "insert into t values (1)")
        await run(work, "insert into t values (3)")
        assert ids(driver.url) == {1, 2, 3}
        assert await work.commit() is None


async def test_a_connection_class_of_the_application_is_kept(postgres_url: str) -> None:
    """It answers as repom's own, and keeps its methods."""

    class Mine(asyncpg.Connection):  # type: ignore[misc]
        def mine(self) -> str:
            return "mine"

    database = Database(postgres_url, engine_kwargs={"connect_args": {"connection_class": Mine}})
    async with database.async_engine.connect() as connection:
        driver_connection: Any = (await connection.get_raw_connection()).driver_connection
        assert driver_connection.mine() == "mine"
        with pytest.raises(DBAPIError):
            await connection.execute(text("select * from nope"))
        with pytest.raises(TransactionAbortedError):
            await connection.commit()
    await database.dispose()


async def test_a_prepared_rollback_by_hand_is_no_refused_commit(postgres_url: str) -> None:
    """Only ROLLBACK as the answer to COMMIT is refused; other statements mean what they say."""
    database = Database(postgres_url)
    async with database.async_engine.connect() as connection:
        driver_connection: Any = (await connection.get_raw_connection()).driver_connection
        await driver_connection.execute("BEGIN")
        assert await driver_connection.execute("ROLLBACK") == "ROLLBACK"
    await database.dispose()


@pytest.mark.parametrize(
    ("driver_name", "expected"),
    [
        ("asyncpg", {"statement_cache_size": 0, "prepared_statement_cache_size": 0}),
        ("psycopg", {"prepare_threshold": None}),
        ("psycopg2", {}),
    ],
)
def test_behind_pgbouncer_nothing_is_prepared(driver_name: str, expected: dict[str, Any]) -> None:
    """Both of asyncpg's caches are off, and nothing else; whatever the application says."""
    for pgbouncer in (True, False):
        support = support_for(
            make_url(f"postgresql+{driver_name}://"), {}, is_async=False, pgbouncer=pgbouncer
        )
        given = {"application_name": "x"}
        assert support.connect_args(given) == given | (expected if pgbouncer else {})


@pytest.mark.parametrize("name", ["asyncpg", "psycopg"])
async def test_behind_pgbouncer_no_statement_stays_on_the_server(
    request: pytest.FixtureRequest, name: str
) -> None:
    """As it matters where the next transaction of this client runs on another connection."""
    async with open_driver(request, name, pgbouncer=True) as driver, driver.work() as work:
        for _ in range(10):
            await run(work, "select 1")
        left = "select count(*) from pg_prepared_statements where statement not like '%pg_prep%'"
        assert await work.do(lambda session: session.scalar(text(left))) == 0


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (type("Psycopg", (Exception,), {"sqlstate": "23505"})(), "23505"),
        (type("Psycopg2", (Exception,), {"pgcode": "23505"})(), "23505"),
        (type("OfTheDriver", (Exception,), {"sqlstate": None, "pgcode": None})(), None),
        (ValueError(), None),
    ],
)
def test_sqlstate(error: Exception, state: str | None) -> None:
    """Each driver has its own name for it."""
    assert sqlstate(error) == state


def test_only_what_the_server_says_is_an_answer() -> None:
    """Class 08 is the driver's own finding; asyncpg has the server's word as the cause of it."""
    support = support_for(make_url("postgresql+asyncpg://"), {}, is_async=True)
    lost = type("Lost", (Exception,), {"sqlstate": "08003"})()
    assert not support.is_answer(lost)
    assert not support.is_answer(OSError())
    lost.__cause__ = type("Shutdown", (Exception,), {"sqlstate": "57P01"})()
    assert support.is_answer(lost)


async def test_a_rollback_that_fails_costs_the_connection(postgres_url: str) -> None:
    """A server may be told to cancel it, too. What it has not undone is not in the pool then."""
    database = Database(postgres_url.replace("postgresql:", "postgresql+asyncpg:"))
    try:
        async with database.async_engine.connect() as connection:
            await connection.execute(text("select 1"))
            raw = await connection.get_raw_connection()
            assert raw.driver_connection is not None
            cancelled = _cancelling_rollback(type(raw.driver_connection))
            raw.driver_connection.__class__ = cancelled
            with pytest.raises(DBAPIError, match="canceling statement"):
                await connection.rollback()
        async with database.async_engine.connect() as connection:
            raw = await connection.get_raw_connection()
            assert type(raw.driver_connection) is not cancelled
            assert not raw.driver_connection.is_in_transaction()  # type: ignore[union-attr]
            assert (await connection.execute(text("select 1"))).scalar_one() == 1
    finally:
        await database.dispose()


def _cancelling_rollback(base: Any) -> Any:
    class Cancelling(base):  # type: ignore[misc]
        __slots__ = ()

        async def execute(self, query: str, *args: Any, **kwargs: Any) -> Any:
            if query.startswith("ROLLBACK"):
                raise asyncpg.QueryCanceledError("canceling statement due to user request")
            return await super().execute(query, *args, **kwargs)

    return Cancelling
