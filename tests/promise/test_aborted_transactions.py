"""A client is never told of success when the database has aborted the transaction.

PostgreSQL answers COMMIT of an aborted transaction with a silent ROLLBACK, MySQL rolls
everything back on a deadlock and goes on in a new transaction, and SQLite does so on some
errors. A handler that swallowed such an error and answers 2xx has a failed COMMIT. One that
went back to a savepoint, or rolled back by itself, has not: neither has one whose error the
database never heard of.

Here whole requests are made, on every driver. What one driver tells at COMMIT is tested below
`tests/dialects/`; how a failed COMMIT is answered in `tests/middleware/test_exchange.py`.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, NamedTuple

import pytest
from sqlalchemy import Integer, bindparam, func, insert, select, text
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import Session
from sqlalchemy.util import await_only
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from repom import atomic, current_scope, current_session
from repom.database import Database
from repom.dialects.mysql import errno
from repom.dialects.postgresql import sqlstate
from repom.errors import InnerCommitError, TransactionAbortedError
from tests.dialects.drivers import KINDS, Driver, in_clear, open_driver
from tests.promise.entries import (
    ASYNC_SERVERS,
    Entry,
    add,
    answering,
    prepare,
    serve,
    written,
)
from tests.support.asgi import request
from tests.support.faultproxy import FaultProxy
from tests.support.reader import execute


@pytest.fixture(params=KINDS)
async def driver(request: pytest.FixtureRequest) -> AsyncIterator[Driver]:
    """Each driver, with entry 1."""
    async with open_driver(request, request.param) as driver:
        prepare(driver.url)
        yield driver


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    """Each database by its usual driver, with entry 1."""
    prepare(database_url)
    database = Database(database_url)
    yield database
    await database.dispose()


@pytest.fixture
def request_(request: pytest.FixtureRequest) -> pytest.FixtureRequest:
    """pytest's `request`, where the name means a request to the application."""
    return request


# --- what handlers do: each writes entry 2, and swallows what fails ------------------------------


def duplicate(session: Session) -> None:
    with contextlib.suppress(DBAPIError):
        add(session, 1)


def failing_flush(session: Session) -> None:
    add(session)
    session.add(Entry(id=1))
    with contextlib.suppress(DBAPIError):
        session.flush()


def failing_execute(session: Session) -> None:
    add(session)
    duplicate(session)


def failing_core(session: Session) -> None:
    add(session)
    with contextlib.suppress(DBAPIError):
        session.connection().execute(insert(Entry).values(id=1))


def failing_driver_sql(session: Session) -> None:
    add(session)
    with contextlib.suppress(DBAPIError):
        session.connection().exec_driver_sql("SELECT * FROM ghost")


def failing_below_sqlalchemy(session: Session) -> None:
    add(session)
    connection = session.connection().connection
    driver_connection: Any = connection.driver_connection
    with contextlib.suppress(Exception):
        if hasattr(driver_connection, "fetchrow"):  # asyncpg
            await_only(driver_connection.execute("SELECT * FROM ghost"))
        else:
            connection.cursor().execute("SELECT * FROM ghost")


def failing_lazy_load(session: Session) -> None:
    add(session)
    with contextlib.suppress(DBAPIError):
        _ = session.get_one(Entry, 2).ghosts


def failing_twice(session: Session) -> None:
    failing_execute(session)
    duplicate(session)
    with contextlib.suppress(DBAPIError):
        session.scalar(select(func.count()).select_from(Entry))


def failing_in_a_savepoint_that_is_released(session: Session) -> None:
    add(session)
    with contextlib.suppress(DBAPIError), session.begin_nested():
        duplicate(session)


def failing_after_a_savepoint(session: Session) -> None:
    healed_by_savepoint(session)
    duplicate(session)


def failing_or_rollback(session: Session) -> None:
    add(session)
    with contextlib.suppress(DBAPIError):
        session.execute(text("INSERT OR ROLLBACK INTO entry VALUES (1, 0)"))
    with contextlib.suppress(DBAPIError):
        add(session, 3)


def failing_trigger(session: Session) -> None:
    session.execute(
        text(
            "CREATE TRIGGER IF NOT EXISTS no_four BEFORE INSERT ON entry WHEN new.id = 4"
            " BEGIN SELECT RAISE(ROLLBACK, 'no'); END"
        )
    )
    add(session)
    with contextlib.suppress(DBAPIError):
        add(session, 4)
    add(session, 3)


def healed_by_savepoint(session: Session) -> None:
    add(session)
    with contextlib.suppress(DBAPIError), session.begin_nested():
        add(session, 1)


def healed_by_outer_savepoint(session: Session) -> None:
    add(session)
    with contextlib.suppress(LookupError), session.begin_nested():
        failing_in_a_savepoint_that_is_released(session)
        raise LookupError


def healed_by_rollback(session: Session) -> None:
    duplicate(session)
    session.rollback()
    add(session)


def refused_by_the_driver(session: Session) -> None:
    add(session)
    wrong = text("SELECT :x + 1").bindparams(bindparam("x", "one", Integer))
    with contextlib.suppress(DBAPIError):
        session.execute(wrong)


def ddl(session: Session) -> None:
    add(session)
    session.execute(text("CREATE TABLE other (id INTEGER)"))
    session.execute(text("DROP TABLE other"))


#: Aborts the transaction on any database (a failed flush ends it in SQLAlchemy already).
ALWAYS = [failing_flush]
#: PostgreSQL aborts on every error of a statement, the others undo the statement.
ON_POSTGRESQL = [
    failing_execute,
    failing_core,
    failing_driver_sql,
    failing_below_sqlalchemy,
    failing_lazy_load,
    failing_twice,
    failing_in_a_savepoint_that_is_released,
    failing_after_a_savepoint,
]
NEVER = [healed_by_savepoint, healed_by_rollback, ddl]
ONLY_SQLITE = [failing_or_rollback, failing_trigger]


class Told(NamedTuple):
    """How a request has ended, for the client and for the database."""

    status: int | None
    error: type | None
    written: set[int]


COMMITTED = Told(201, None, {2})
REFUSED = Told(500, TransactionAbortedError, set())


def expected(driver: Driver) -> Iterator[tuple[Callable[[Session], None], Told]]:
    kind = driver.url.partition(":")[0]
    yield from ((work, REFUSED) for work in ALWAYS)
    aborts = kind == "postgresql"
    yield from ((work, REFUSED if aborts else COMMITTED) for work in ON_POSTGRESQL)
    # asyncpg cannot encode it, and although its error has an SQLSTATE, the server knows nothing.
    refused = aborts and driver.name != "asyncpg"
    yield refused_by_the_driver, REFUSED if refused else COMMITTED
    yield from ((work, COMMITTED) for work in NEVER)
    if kind == "sqlite":
        yield from ((work, REFUSED) for work in ONLY_SQLITE)


async def test_a_2xx_tells_of_a_commit_and_nothing_else(driver: Driver) -> None:
    """Whatever the handler swallowed: 201 means that its row is there, a refused COMMIT is an
    error and leaves nothing, and what was healed is not refused. All on one connection, so no
    request suffers for another."""
    told, should_be_told = {}, {}
    for work, should in expected(driver):
        response = await request(answering(driver, work), "POST")
        error = response.exception
        told[work.__name__] = Told(
            response.status, type(error) if error else None, written(driver.url)
        )
        should_be_told[work.__name__] = should
        execute(driver.url, "DELETE FROM entry WHERE id <> 1")
    assert told == should_be_told


@pytest.mark.parametrize("name", ASYNC_SERVERS)
async def test_who_loses_a_deadlock_is_told_so(request_: pytest.FixtureRequest, name: str) -> None:
    """Two requests want each other's rows, both swallow what comes of it and go on writing:
    one is answered 201 and has its rows, the other has none and an error whose cause says
    "deadlock"."""
    async with open_driver(request_, name) as driver:
        prepare(driver.url)
        execute(driver.url, "INSERT INTO entry VALUES (2, 0)")
        kind = KINDS[name].drivername.partition("+")[0]
        database = Database(driver.database.url)
        both_have_one = asyncio.Barrier(2)

        async def endpoint(request: Request) -> Response:
            mine, other = int(request.query_params["mine"]), int(request.query_params["other"])
            session = current_session()
            if kind == "postgresql":  # which looks for deadlocks only after a second
                await session.execute(text("SET LOCAL deadlock_timeout = '20ms'"))
            await session.execute(insert(Entry).values(id=mine * 10))
            lock = text("UPDATE entry SET amount = amount + 1 WHERE id = :id")
            await session.execute(lock, {"id": mine})
            await both_have_one.wait()
            with contextlib.suppress(DBAPIError):
                await session.execute(lock, {"id": other})
            with contextlib.suppress(DBAPIError):
                await session.execute(insert(Entry).values(id=mine * 10 + 1))
            return Response(status_code=201)

        app = serve(database, endpoint)
        answers = await asyncio.gather(
            request(app, "POST", "/?mine=1&other=2"), request(app, "POST", "/?mine=2&other=1")
        )
        await database.dispose()
        assert sorted(answer.status or 0 for answer in answers) == [201, 500]
        winner = 1 if answers[0].status == 201 else 2
        assert written(driver.url) == {2, winner * 10, winner * 10 + 1}
        refused = answers[2 - winner].exception
        assert isinstance(refused, TransactionAbortedError)
        assert refused.__cause__ is not None
        assert (sqlstate(refused.__cause__) == "40P01") or (errno(refused.__cause__) == 1213)


@pytest.mark.parametrize("name", ["asyncpg", "psycopg", "psycopg-sync", "psycopg2"])
async def test_a_serialization_failure_that_was_swallowed(
    request_: pytest.FixtureRequest, name: str
) -> None:
    """It is the cause of the refusal, so that whoever tries again knows that he may."""
    async with open_driver(request_, name) as driver:
        prepare(driver.url)

        def lose(session: Session) -> None:
            session.connection(execution_options={"isolation_level": "REPEATABLE READ"})
            add(session)
            session.scalars(select(Entry)).all()
            execute(driver.url, "UPDATE entry SET amount = 5 WHERE id = 1")
            with contextlib.suppress(DBAPIError):
                session.execute(text("UPDATE entry SET amount = amount + 1 WHERE id = 1"))

        response = await request(answering(driver, lose), "POST")
        assert isinstance(response.exception, TransactionAbortedError)
        assert response.exception.__cause__ is not None
        assert sqlstate(response.exception.__cause__) == "40001"
        assert written(driver.url) == set()


# --- what only coroutines do --------------------------------------------------------------------


async def test_a_lazy_load_that_failed_in_awaitable_attrs(
    database: Database, database_url: str
) -> None:
    """Where it aborts the transaction, the request has failed; elsewhere it has not."""

    async def endpoint(request: Request) -> Response:
        entry = Entry(id=2)
        current_session().add(entry)
        await current_session().flush()
        current_session().expire(entry, ["ghosts"])
        with contextlib.suppress(DBAPIError):
            await entry.awaitable_attrs.ghosts
        return Response(status_code=201)

    response = await request(serve(database, endpoint), "POST")
    aborts = database_url.startswith("postgresql")
    assert response.status == (500 if aborts else 201)
    assert written(database_url) == (set() if aborts else {2})


async def test_what_may_fail_inside_atomic_dooms_nothing(
    database: Database, database_url: str
) -> None:
    """A failed flush, and a failed statement, inside `atomic()`: the rest is committed."""

    async def endpoint(request: Request) -> Response:
        current_session().add(Entry(id=2))
        with contextlib.suppress(SQLAlchemyError):
            async with atomic() as session:
                session.add(Entry(id=1))
        with contextlib.suppress(SQLAlchemyError):
            async with atomic() as session, atomic():
                await session.execute(text("SELECT * FROM ghost"))
        await current_session().execute(insert(Entry).values(id=3))
        return Response(status_code=201)

    response = await request(serve(database, endpoint), "POST")
    assert (response.status, written(database_url)) == (201, {2, 3})


async def test_an_early_commit_stays_and_the_next_transaction_is_refused(
    database: Database, database_url: str
) -> None:
    """Each transaction of a request is judged by itself, on one and the same connection."""
    doom = "INSERT OR ROLLBACK INTO entry VALUES (1, 0)"  # elsewhere a syntax error
    aborts = not database_url.startswith("mysql")

    async def endpoint(request: Request) -> Response:
        session = current_session()
        await session.execute(insert(Entry).values(id=2))
        await current_scope().commit()
        await session.execute(insert(Entry).values(id=3))
        with contextlib.suppress(DBAPIError):
            await session.execute(text(doom))
        return Response(status_code=201)

    response = await request(serve(database, endpoint), "POST")
    assert response.status == (500 if aborts else 201)
    assert written(database_url) == ({2} if aborts else {2, 3})


@pytest.mark.parametrize("name", ["asyncpg", "psycopg"])
async def test_an_error_swallowed_in_mid_stream_leaves_the_body_unterminated(
    request_: pytest.FixtureRequest, name: str
) -> None:
    """Rows that came with 200 on their way cannot be called back; but the client is not told
    that the response is complete."""
    async with open_driver(request_, name) as driver:
        prepare(driver.url)

        async def endpoint(request: Request) -> Response:
            await current_session().execute(insert(Entry).values(id=2))
            sql = "SELECT 1 / (3000 - n) FROM generate_series(1, 9000) AS n"
            result = await current_session().stream(text(sql), execution_options={"yield_per": 100})

            async def body() -> AsyncIterator[str]:
                with contextlib.suppress(Exception):  # on asyncpg it is the driver's own
                    async for (number,) in result:
                        yield f"{number}\n"

            return StreamingResponse(body())

        response = await request(serve(driver.database, endpoint), "POST")
        assert isinstance(response.exception, TransactionAbortedError)
        assert (response.status, response.complete) == (200, False)
        assert written(driver.url) == set()


# --- transaction control as text ----------------------------------------------------------------


async def test_a_transaction_ended_by_hand_is_refused(driver: Driver) -> None:
    """COMMIT, ROLLBACK and BEGIN as text would end the transaction unseen, and the statements
    after it would commit themselves. They are refused, and hurt nothing."""
    control = (
        "COMMIT",
        "rollback",
        " Begin",
        "END;",
        "ABORT",
        "START TRANSACTION",
        "ROLLBACK WORK",
    )

    def work(session: Session) -> None:
        add(session)
        for sql in control:
            with pytest.raises(InnerCommitError, match="behind the back"):
                session.execute(text(sql))
            with pytest.raises(InnerCommitError, match="behind the back"):
                session.connection().exec_driver_sql(sql)

    response = await request(answering(driver, work), "POST")
    assert (response.exception, written(driver.url)) == (None, {2})


async def test_a_savepoint_set_by_hand_is_allowed(driver: Driver) -> None:
    """ROLLBACK TO ends no transaction."""

    def work(session: Session) -> None:
        add(session)
        session.execute(text("SAVEPOINT mine"))
        add(session, 3)
        duplicate(session)
        session.execute(text("ROLLBACK TO SAVEPOINT mine"))

    response = await request(answering(driver, work), "POST")
    assert (response.exception, written(driver.url)) == (None, {2})


# --- what it costs ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ASYNC_SERVERS)
async def test_the_truth_costs_no_round_trip(request_: pytest.FixtureRequest, name: str) -> None:
    """A request asks the server as often as the same work written by hand does; with asyncpg less
    often, because BEGIN travels with the statement; and on MySQL and MariaDB, because what was
    just committed is not rolled back by the pool."""
    url = request_.getfixturevalue(KINDS[name].fixture)
    prepare(url)
    async with FaultProxy(url) as proxy:
        through = in_clear(name, proxy.url)

        async def by_hand(id_: int) -> None:
            async with plain.begin() as connection:
                await connection.execute(insert(Entry).values(id=id_))

        async def endpoint(request: Request) -> Response:
            await current_session().execute(
                insert(Entry).values(id=int(request.query_params["id"]))
            )
            return Response(status_code=201)

        async def by_request(id_: int) -> None:
            response = await request(app, "POST", f"/?id={id_}")
            assert response.status == 201

        plain, database = create_async_engine(through), Database(through)
        app = serve(database, endpoint)
        asked = []
        for do, first in ((by_hand, 10), (by_request, 20)):
            await do(first)  # connects, and prepares the statement
            before = proxy.round_trips
            for id_ in range(first + 1, first + 4):
                await do(id_)
            asked.append(proxy.round_trips - before)
        await plain.dispose()
        await database.dispose()
    saved = 0 if name == "psycopg" else 3
    assert asked[1] == asked[0] - saved
