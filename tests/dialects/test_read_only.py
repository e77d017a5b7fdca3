"""Connections that the database holds read-only: their cost, what they refuse and what they see."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import asyncpg
import pytest
from sqlalchemy import insert, select, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from repom import session_scope, sync_session_scope
from repom.begin import BeginOptions, ReadOnly
from repom.database import Database
from repom.dialects import support_for
from repom.dialects.read_only import makes_writable
from repom.errors import ConfigurationError, ReadOnlyError
from tests.dialects.drivers import KINDS, Driver, in_clear, open_driver
from tests.support.faultproxy import FaultProxy
from tests.support.polling import block_until
from tests.support.reader import execute, open_transactions, rows

SERVERS = [name for name, kind in KINDS.items() if kind.fixture != "sqlite_url"]
POSTGRESQL = [name for name, kind in KINDS.items() if kind.fixture == "postgres_url"]
both = pytest.mark.parametrize("read_only", [True, "snapshot"])


class Base(DeclarativeBase):
    pass


class Row(Base):
    __tablename__ = "rows_read"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)


def prepare(url: str) -> None:
    execute(url, "create table rows_read (id integer primary key)")
    execute(url, "insert into rows_read values (1)")


def ids(url: str) -> list[int]:
    return [id_ for (id_,) in rows(url, "select id from rows_read order by id")]


def seen(session: Session) -> list[int]:
    return list(session.scalars(select(Row.id).order_by(Row.id)))


@pytest.fixture(params=KINDS)
async def driver(request: pytest.FixtureRequest) -> AsyncIterator[Driver]:
    """Each driver, with a table that holds row 1."""
    async with open_driver(request, request.param) as driver:
        prepare(driver.url)
        yield driver


@contextlib.asynccontextmanager
async def by_proxy(
    request: pytest.FixtureRequest, name: str, **database_kwargs: Any
) -> AsyncIterator[tuple[Driver, FaultProxy]]:
    """A driver whose connections can be watched."""
    pytest.importorskip(KINDS[name].module)
    url = request.getfixturevalue(KINDS[name].fixture)
    prepare(url)
    async with FaultProxy(url) as proxy:
        driver = Driver(name, in_clear(name, proxy.url), **database_kwargs)
        try:
            yield driver, proxy
        finally:
            await driver.database.dispose()


async def run(driver: Driver, read_only: ReadOnly, work: Callable[[Session], Any]) -> Any:
    """Do it in a unit of work."""
    if driver.is_async:
        async with session_scope(driver.database, read_only=read_only) as session:
            return await session.run_sync(work)

    def in_thread() -> Any:
        with sync_session_scope(driver.database, read_only=read_only) as session:
            return work(session)

    # The proxy lives on this loop.
    return await asyncio.to_thread(in_thread)


# --- what it costs


@pytest.mark.parametrize("name", SERVERS)
async def test_one_round_trip_for_one_select(request: pytest.FixtureRequest, name: str) -> None:
    """No BEGIN, no COMMIT, and no ROLLBACK by the pool."""
    async with by_proxy(request, name) as (driver, proxy):
        for _ in range(10):  # psycopg prepares what it has executed some times
            await run(driver, True, seen)
        before = proxy.round_trips
        ends = [proxy.sent(word) for word in (b"BEGIN", b"COMMIT", b"ROLLBACK")]
        for _ in range(10):
            assert await run(driver, True, seen) == [1]
        assert proxy.round_trips - before == 10
        assert ends == [proxy.sent(word) for word in (b"BEGIN", b"COMMIT", b"ROLLBACK")]


async def test_no_transaction_is_open_between_statements(driver: Driver) -> None:
    """A snapshot has one until it ends."""
    cases: list[tuple[ReadOnly, int]] = [(True, 0), ("snapshot", 1)]
    for read_only, expected in cases:

        def work(session: Session) -> int:
            session.scalars(select(Row)).all()
            if driver.url.startswith("sqlite"):
                raw: Any = session.connection().connection.driver_connection
                return int(getattr(raw, "_conn", raw).in_transaction)
            return open_transactions(driver.url)

        assert await run(driver, read_only, work) == expected
        block_until(lambda: open_transactions(driver.url) == 0)


# --- what it refuses


def by_text(session: Session) -> None:
    session.execute(text("insert into rows_read values (2)"))


def by_core(session: Session) -> None:
    session.execute(insert(Row), [{"id": 2}, {"id": 3}])


def by_flush(session: Session) -> None:
    session.add(Row(id=2))
    session.flush()


def by_delete(session: Session) -> None:
    session.delete(session.get_one(Row, 1))
    session.flush()


def by_ddl(session: Session) -> None:
    session.execute(text("create table other (id integer)"))


def by_connection(session: Session) -> None:
    session.connection().exec_driver_sql("update rows_read set id = 5")


@both
@pytest.mark.parametrize("write", [by_text, by_core, by_flush, by_delete, by_ddl, by_connection])
async def test_writes_are_refused(
    driver: Driver, write: Callable[[Session], None], read_only: ReadOnly
) -> None:
    """By the database, whose error is the cause; nothing is written, and the next one reads."""
    with pytest.raises(ReadOnlyError, match=r"session_scope\(\) only reads") as refused:
        await run(driver, read_only, write)
    assert isinstance(refused.value.__cause__, Exception)
    assert ids(driver.url) == [1]
    assert await run(driver, read_only, seen) == [1]


@pytest.mark.parametrize("name", SERVERS)
async def test_locking_reads_are_refused(request: pytest.FixtureRequest, name: str) -> None:
    """A lock that ends with its statement would protect nothing."""
    async with open_driver(request, name) as driver:
        prepare(driver.url)
        with pytest.raises(ReadOnlyError):
            await run(driver, True, lambda s: s.get(Row, 1, with_for_update=True))


async def test_a_function_that_writes_is_refused(
    request: pytest.FixtureRequest, postgres_url: str
) -> None:
    """It is the server that refuses: a SELECT is not taken for harmless."""
    async with open_driver(request, "asyncpg") as driver:
        execute(postgres_url, "create sequence numbers")
        with pytest.raises(ReadOnlyError, match="nextval"):
            await run(driver, True, lambda s: s.scalar(text("select nextval('numbers')")))


async def test_connections_of_the_application_are_held_as_well(postgres_url: str) -> None:
    """What makes its connections itself does not look at our arguments for them."""
    dsn = make_url(postgres_url).set(drivername="postgresql").render_as_string(False)
    database = Database(
        postgres_url, engine_kwargs={"async_creator": lambda *_, **__: asyncpg.connect(dsn)}
    )
    with pytest.raises(ReadOnlyError):
        async with session_scope(database, read_only=True) as session:
            await session.execute(text("create table other (id integer)"))
    await database.dispose()


async def test_an_engine_without_a_scope(driver: Driver) -> None:
    """A plain session on such an engine is refused, too; there is no unit of work to name."""
    await run(driver, True, seen)  # on the same connection
    async with driver.work(BeginOptions(read_only=True)) as work:
        with pytest.raises(ReadOnlyError, match="this connection only reads"):
            await work.do(by_text)
    assert ids(driver.url) == [1]


@pytest.mark.parametrize(
    "sql",
    [
        "SET default_transaction_read_only = off",
        "set session transaction read write",
        "SET SESSION CHARACTERISTICS AS TRANSACTION READ WRITE",
        "SET @@session.tx_read_only = 0",
        "SET LOCAL transaction_read_only TO off",
        "PRAGMA query_only = OFF",
        "pragma main.query_only(0)",
        "SELECT set_config('default_transaction_read_only', 'off', false)",
        "RESET ALL",
        "DISCARD ALL",
    ],
)
def test_what_would_make_a_connection_writable(sql: str) -> None:
    """The statements that every database has for that are known."""
    assert makes_writable(sql)


@pytest.mark.parametrize(
    "sql",
    [
        "SHOW transaction_read_only",
        "SELECT current_setting('transaction_read_only')",
        "PRAGMA query_only",
        "SET search_path = tenant",
        "SELECT set_config('app.user', '1', false)",
    ],
)
def test_what_leaves_a_connection_as_it_is(sql: str) -> None:
    """It may be asked whether it is read-only, and set to something else."""
    assert not makes_writable(sql)


# --- what it sees


@both
async def test_what_is_committed_meanwhile(driver: Driver, read_only: ReadOnly) -> None:
    """Each statement sees it; the statements of a snapshot see one state, the first one's."""

    def work(session: Session) -> tuple[list[int], list[int]]:
        first = seen(session)
        execute(driver.url, "insert into rows_read values (2)")
        return first, seen(session)

    expected = [1] if read_only == "snapshot" else [1, 2]
    assert await run(driver, read_only, work) == ([1], expected)
    assert await run(driver, read_only, seen) == [1, 2]


async def test_a_stream(driver: Driver) -> None:
    """It can be read bit by bit, also where a cursor of the server lives in a transaction, which
    ends with the unit of work."""
    execute(driver.url, "insert into rows_read values (2)")

    def work(session: Session) -> list[int]:
        result = session.scalars(select(Row.id).execution_options(yield_per=1))
        return sorted(result)

    assert await run(driver, True, work) == [1, 2]
    assert await run(driver, True, seen) == [1, 2]
    block_until(lambda: open_transactions(driver.url) == 0)


@pytest.mark.parametrize("name", POSTGRESQL)
async def test_after_a_stream_and_a_snapshot(request: pytest.FixtureRequest, name: str) -> None:
    """The connection is in autocommit again: one round trip for one SELECT."""
    async with by_proxy(request, name) as (driver, proxy):
        await run(
            driver, True, lambda s: s.execute(select(Row).execution_options(yield_per=1)).all()
        )
        await run(driver, "snapshot", seen)
        for _ in range(10):
            await run(driver, True, seen)
        before = proxy.round_trips
        await run(driver, True, seen)
        assert proxy.round_trips - before == 1


# --- savepoints


@both
async def test_a_block_around_a_refused_write(driver: Driver, read_only: ReadOnly) -> None:
    """It is undone, and what comes after it is believed."""

    def work(session: Session) -> list[int]:
        with pytest.raises(ReadOnlyError), session.begin_nested():
            by_flush(session)
        with session.begin_nested():
            return seen(session)

    assert await run(driver, read_only, work) == [1]


async def test_a_block_after_a_swallowed_write(driver: Driver) -> None:
    """It cannot heal what was before it."""

    def work(session: Session) -> None:
        with pytest.raises(ReadOnlyError):
            by_text(session)
        with pytest.raises(ReadOnlyError), session.begin_nested():
            session.execute(text("select 1"))

    with pytest.raises(ReadOnlyError):
        await run(driver, True, work)


@pytest.mark.parametrize("name", POSTGRESQL)
async def test_a_block_around_a_stream(request: pytest.FixtureRequest, name: str) -> None:
    """That begins a transaction inside of the block, which ends with it if it fails."""
    async with open_driver(request, name) as driver:
        prepare(driver.url)

        def work(session: Session) -> list[int]:
            block = session.begin_nested()
            session.execute(select(Row).execution_options(yield_per=1)).all()
            with pytest.raises(DBAPIError):
                session.execute(text("select * from no_such_table"))
            block.rollback()
            return seen(session)

        assert await run(driver, True, work) == [1]


# --- errors that are none of ours


@both
async def test_other_errors_stay_what_they_are(driver: Driver, read_only: ReadOnly) -> None:
    """Without a transaction, swallowing one changes nothing for what comes after it."""

    def work(session: Session) -> list[int]:
        with pytest.raises(Exception, match="no_such_table"):
            session.execute(text("select * from no_such_table"))
        return seen(session) if read_only is True else []

    if read_only is True:
        assert await run(driver, read_only, work) == [1]
    else:
        with contextlib.suppress(Exception):  # PostgreSQL has aborted the transaction
            await run(driver, read_only, work)
        assert await run(driver, read_only, seen) == [1]


@pytest.mark.parametrize("name", SERVERS)
async def test_a_commit_that_was_cut(request: pytest.FixtureRequest, name: str) -> None:
    """The end of a snapshot has no outcome that nobody knows: nothing was to be written."""
    async with by_proxy(request, name) as (driver, proxy):
        await run(driver, "snapshot", seen)
        proxy.cut(b"COMMIT", "after")
        with pytest.raises(DBAPIError):  # and not CommitOutcomeUnknown
            await run(driver, "snapshot", seen)
        assert await run(driver, "snapshot", seen) == [1]


# --- where a connection cannot be held


@both
@pytest.mark.parametrize("name", POSTGRESQL)
async def test_behind_a_pgbouncer(
    request: pytest.FixtureRequest, name: str, read_only: ReadOnly
) -> None:
    """Each unit of work is a transaction that says itself that it only reads."""
    async with by_proxy(request, name, pgbouncer=True) as (driver, proxy):
        assert await run(driver, read_only, seen) == [1]
        with pytest.raises(ReadOnlyError):
            await run(driver, read_only, by_text)
        assert proxy.sent(b"READ ONLY") == 2
        assert not proxy.sent(b"SET SESSION")
        # The isolation level of one is not left to the next.
        assert await run(driver, True, lambda s: s.scalar(text("show transaction_isolation"))) == (
            "read committed"
        )


@both
async def test_a_memory_database(read_only: ReadOnly) -> None:
    """It waits in line as all do there, and is refused as well."""
    database = Database("sqlite://")
    async with session_scope(database) as session:
        await session.run_sync(lambda s: Base.metadata.create_all(s.connection()))
        session.add(Row(id=1))
    async with session_scope(database, read_only=read_only) as session:
        assert await session.run_sync(seen) == [1]
    with pytest.raises(ReadOnlyError):
        async with session_scope(database, read_only=read_only) as session:
            session.add(Row(id=2))
    async with session_scope(database) as session:
        assert await session.run_sync(seen) == [1]
    await database.dispose()


async def test_a_reader_beside_a_writer(request: pytest.FixtureRequest) -> None:
    """On SQLite it does not wait in the line of writers, and sees nothing uncommitted."""
    async with open_driver(request, "aiosqlite") as driver:
        prepare(driver.url)
        async with session_scope(driver.database) as writer:
            writer.add(Row(id=2))
            await writer.flush()
            assert await run(driver, True, seen) == [1]
        assert await run(driver, True, seen) == [1, 2]


def test_a_database_that_is_not_known() -> None:
    """It is said when it is asked for."""
    with pytest.raises(ConfigurationError, match="read-only"):
        support_for(make_url("oracle://u:secret@h/d"), {}, is_async=False, read_only=True)
