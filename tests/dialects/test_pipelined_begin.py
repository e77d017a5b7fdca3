"""asyncpg's BEGIN on its way with the first statement: what it costs, and that nothing else of a
transaction changes, whatever fails meanwhile."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any, ClassVar

import asyncpg
import asyncpg.transaction
import pytest
from sqlalchemy import Text, bindparam, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError, IntegrityError, PendingRollbackError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from repom import Database, session_scope
from repom.errors import TransactionAbortedError, TransactionError
from tests.dialects.drivers import in_clear
from tests.support.cancelling import CANCELLING, Cancelling, Interruption
from tests.support.faultproxy import FaultProxy, When
from tests.support.polling import until
from tests.support.reader import connections, execute, open_transactions, rows

SELECT = text("select id from t order by id")
INSERT = text("insert into t values (:id)")
DIVIDE = text("select 1 / cast(:by as integer)")
#: asyncpg's own message.
BEGIN_ALONE = b"Q\0\0\0\x0bBEGIN;\0"
LEVELS: list[dict[str, Any]] = [
    {},
    {"isolation_level": "READ COMMITTED"},
    {"isolation_level": "REPEATABLE READ"},
    {"isolation_level": "SERIALIZABLE"},
    {"isolation_level": "SERIALIZABLE", "postgresql_readonly": True},
    {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True},
    {
        "isolation_level": "SERIALIZABLE",
        "postgresql_readonly": True,
        "postgresql_deferrable": True,
    },
]


@pytest.fixture
def url(postgres_url: str) -> str:
    """A database with a table that holds row 1."""
    execute(postgres_url, "create table t (id integer primary key)")
    execute(postgres_url, "insert into t values (1)")
    return postgres_url


@asynccontextmanager
async def open_database(url: str, **kwargs: Any) -> AsyncIterator[Database]:
    """With one connection, on which the statements above are prepared."""
    connect_args = kwargs.pop("connect_args", {})
    pool = {"pool_size": 1, "max_overflow": 0, "connect_args": connect_args}
    database = Database(in_clear("asyncpg", url), engine_kwargs=pool, **kwargs)
    try:
        await warm(database.async_engine)
        yield database
    finally:
        await database.dispose()


async def warm(engine: AsyncEngine) -> None:
    async with engine.connect() as connection:
        await connection.execute(SELECT)
        await connection.execute(INSERT, {"id": 0})
        await connection.execute(DIVIDE, {"by": 1})
        await connection.rollback()


@pytest.fixture
async def database(url: str) -> AsyncIterator[Database]:
    async with open_database(url) as database:
        yield database


def ids(url: str) -> list[int]:
    return [id_ for (id_,) in rows(url, "select id from t order by id")]


async def driver_of(connection: AsyncConnection) -> Any:
    return (await connection.get_raw_connection()).driver_connection


async def assert_as_new(database: Database, url: str) -> None:
    """Fail if its connection is in use or in a transaction, or does not begin one any more."""
    pool: Any = database.async_engine.pool
    assert pool.checkedout() == 0
    await until(lambda: open_transactions(url) == 0)
    before = ids(url)
    for id_ in (100, 101):
        async with session_scope(database) as session:
            await session.execute(INSERT, {"id": id_})
            assert ids(url) == before
            await session.rollback()
        assert ids(url) == before


# --- what it costs and what is sent


async def unit(database: Database, statement: Any, parameters: Any = None) -> None:
    async with session_scope(database) as session:
        await session.execute(statement, parameters)


async def test_a_unit_of_work_with_one_statement_is_two_round_trips(url: str) -> None:
    """The statement and COMMIT; the first time it is prepared, which costs two more."""
    async with FaultProxy(url) as proxy, open_database(proxy.url) as database:
        for statement, parameters, expected in (
            (SELECT, None, 2),
            (INSERT, {"id": 2}, 2),
            (text("select 1"), None, 4),
            (text("select 1"), None, 2),
        ):
            before = proxy.round_trips
            await unit(database, statement, parameters)
            assert proxy.round_trips - before == expected
        assert ids(url) == [1, 2]


async def test_only_the_first_statement_brings_it(url: str) -> None:
    """The others cost one round trip each, as does ROLLBACK, and BEGIN is sent once."""
    async with FaultProxy(url) as proxy, open_database(proxy.url) as database:
        before, begun = proxy.round_trips, proxy.sent(b"BEGIN")
        async with database.async_engine.connect() as connection:
            for id_ in (2, 3, 4):
                await connection.execute(INSERT, {"id": id_})
        assert proxy.round_trips - before == 4
        assert proxy.sent(b"BEGIN") - begun == 1
        assert ids(url) == [1]


async def test_a_first_statement_that_fails_costs_no_more(url: str) -> None:
    """The statement and ROLLBACK: what became of BEGIN is known by then."""
    async with FaultProxy(url) as proxy, open_database(proxy.url) as database:
        before = proxy.round_trips
        with pytest.raises(IntegrityError):
            await unit(database, INSERT, {"id": 1})
        assert proxy.round_trips - before == 2


@pytest.mark.parametrize("options", LEVELS)
async def test_the_same_begin_as_asyncpgs_own(url: str, options: dict[str, Any]) -> None:
    """Isolation level, read-only and deferrable are the same, whoever sends them."""
    ask = text(
        "select current_setting('transaction_isolation'), current_setting"
        "('transaction_read_only'), current_setting('transaction_deferrable'), id from t"
    )
    async with FaultProxy(url) as proxy, open_database(proxy.url) as database:
        engine = database.async_engine.execution_options(**options)
        begun, answers = [], []
        for _ in ("asyncpg's own", "with the statement"):
            before = len(proxy._sent)
            async with engine.connect() as connection:
                answers.append((await connection.execute(ask)).all())
            sent = bytes(proxy._sent[before:])
            begun.append(sent[sent.index(b"BEGIN") : sent.index(b"\0", sent.index(b"BEGIN"))])
        assert begun[0] == begun[1]
        assert answers[0] == answers[1]


@pytest.mark.parametrize("options", ["pgbouncer", "no cache"])
async def test_never_without_prepared_statements(url: str, options: str) -> None:
    """Behind a PgBouncer above all, BEGIN is asyncpg's own message, and its answer awaited."""
    kwargs: dict[str, Any] = {"pgbouncer": True}
    if options == "no cache":
        kwargs = {"connect_args": {"prepared_statement_cache_size": 0}}
    async with FaultProxy(url) as proxy, open_database(proxy.url, **kwargs) as database:
        for id_ in (2, 3):
            before, begun = proxy.round_trips, proxy.sent(BEGIN_ALONE)
            await unit(database, INSERT, {"id": id_})
            assert proxy.round_trips - before >= 4
            assert proxy.sent(BEGIN_ALONE) - begun == 1
        assert ids(url) == [1, 2, 3]


async def test_nothing_is_begun_in_autocommit(url: str) -> None:
    """Nor by what comes after it on the same connection is it forgotten."""
    async with FaultProxy(url) as proxy, open_database(proxy.url) as database:
        before, begun = proxy.round_trips, proxy.sent(b"BEGIN")
        engine = database.async_engine.execution_options(isolation_level="AUTOCOMMIT")
        async with engine.connect() as connection:
            await connection.execute(INSERT, {"id": 2})
        assert (proxy.round_trips - before, proxy.sent(b"BEGIN") - begun) == (1, 0)
        assert ids(url) == [1, 2]
        await assert_as_new(database, url)


# --- statements of all kinds


async def by_executemany(connection: AsyncConnection) -> None:
    await connection.execute(INSERT, [{"id": 2}, {"id": 3}])


async def by_driver_sql(connection: AsyncConnection) -> None:
    await connection.exec_driver_sql("insert into t values (2), (3)")


async def by_a_stream(connection: AsyncConnection) -> None:
    assert [id_ async for (id_,) in await connection.stream(SELECT)] == [1]
    await by_driver_sql(connection)


async def after_nothing(connection: AsyncConnection) -> None:
    await connection.exec_driver_sql(";")
    await by_driver_sql(connection)


async def in_a_savepoint(connection: AsyncConnection) -> None:
    async with connection.begin_nested():
        await by_driver_sql(connection)


async def by_hand_inside(connection: AsyncConnection) -> None:
    await connection.execute(SELECT)
    driver = await driver_of(connection)
    async with driver.transaction():  # a savepoint
        await driver.copy_records_to_table("t", records=[(2,), (3,)])


async def with_much(connection: AsyncConnection) -> None:
    much = "x" * 5_000_000
    statement = text("select cast(:much as text)").bindparams(bindparam("much", type_=Text))
    assert await connection.scalar(statement, {"much": much}) == much
    await by_driver_sql(connection)


async def with_messages(connection: AsyncConnection) -> None:
    await connection.exec_driver_sql("set local timezone to 'Asia/Tokyo'")  # ParameterStatus
    await connection.exec_driver_sql("do $$ begin raise notice 'x'; end $$")
    await by_driver_sql(connection)


KINDS_OF_WORK: list[Callable[[AsyncConnection], Coroutine[Any, Any, None]]] = [
    by_executemany,
    by_driver_sql,
    by_a_stream,
    after_nothing,
    in_a_savepoint,
    by_hand_inside,
    with_much,
    with_messages,
]


@pytest.mark.parametrize("work", KINDS_OF_WORK)
async def test_first_statements_of_all_kinds(database: Database, url: str, work: Any) -> None:
    """All of it is in one transaction, prepared or not: undone by ROLLBACK, there by COMMIT."""
    for _ in ("not prepared", "prepared"):
        async with database.async_engine.connect() as connection:
            await work(connection)
            assert ids(url) == [1]
        assert ids(url) == [1]
    async with database.async_engine.begin() as connection:
        await work(connection)
    assert ids(url) == [1, 2, 3]
    await assert_as_new(database, url)


async def test_a_cursor_used_again(database: Database, url: str) -> None:
    """What it executes after the first statement is a statement like any other."""

    def work(connection: Any) -> None:
        cursor = connection.connection.cursor()
        for id_ in (2, 3):
            cursor.execute("INSERT INTO t VALUES ($1)", (id_,))
            connection.connection.rollback()
            cursor.execute("INSERT INTO t VALUES ($1)", (id_,))
            cursor.execute("INSERT INTO t VALUES ($1)", (id_ + 10,))
            connection.connection.commit()

    async with database.async_engine.connect() as connection:
        await connection.run_sync(work)
    assert ids(url) == [1, 2, 3, 12, 13]


async def test_notifications_come_through(database: Database) -> None:
    """Those that come before the answers, too."""
    heard: list[str] = []
    async with database.async_engine.connect() as connection:
        driver = await driver_of(connection)
        await driver.add_listener("channel", lambda *args: heard.append(args[-1]))
        notify = "select pg_notify('channel', 'x')"
        await connection.exec_driver_sql(notify)
        await connection.commit()
        await connection.exec_driver_sql(notify)
        await connection.commit()
        await connection.execute(SELECT)
        await until(lambda: heard == ["x", "x"])
        await driver.reset()


async def test_two_tasks_with_one_connection(database: Database, url: str) -> None:
    """They queue, and share the transaction that one of them begins."""
    async with database.async_engine.connect() as connection:
        await connection.begin()
        inserts = (connection.execute(INSERT, {"id": id_}) for id_ in (2, 3, 4))
        await asyncio.gather(*inserts)
        assert ids(url) == [1]
        await connection.commit()
    assert ids(url) == [1, 2, 3, 4]


async def test_commit_as_the_first_statement(database: Database, url: str) -> None:
    """It ends what it began, which is nobody's fault: old code leaves a transaction so."""
    for id_ in (2, 3):
        async with database.async_engine.connect() as connection:
            await connection.exec_driver_sql("commit")
            await connection.execute(INSERT, {"id": id_})
    assert ids(url) == [1, 2, 3]


# --- errors


async def outcome(
    engine: AsyncEngine, statement: Any, parameters: Any, then: str
) -> list[tuple[Any, ...]]:
    """What becomes of a first statement that fails, and of what comes after it."""
    await warm(engine)
    seen: list[tuple[Any, ...]] = []
    async with engine.connect() as connection:

        async def attempt(work: Any) -> None:
            try:
                await work
                seen.append(("done",))
            except DBAPIError as error:
                original: Any = error.orig
                seen.append((type(error), type(original), original.sqlstate, str(original)))
            except TransactionAbortedError:
                seen.append(("done",))  # which the server says to nobody else
            driver = await driver_of(connection)
            seen.append(("in a transaction", driver.is_in_transaction()))

        await attempt(connection.execute(statement, parameters))
        if then == "goes on":
            await attempt(connection.execute(INSERT, {"id": 2}))
            await attempt(connection.commit())
        await attempt(connection.rollback())
        await attempt(connection.execute(INSERT, {"id": 3}))
        await attempt(connection.commit())
    return seen


@pytest.mark.parametrize("then", ["goes on", "rolls back"])
@pytest.mark.parametrize(
    ("statement", "parameters"),
    [
        pytest.param(DIVIDE, {"by": 0}, id="division by zero"),
        pytest.param(INSERT, {"id": 1}, id="unique violation"),
        pytest.param(INSERT, {"id": "x"}, id="not to be encoded"),
        pytest.param(INSERT, {"id": 2**40}, id="too large to be encoded"),
        pytest.param(text("selec 1"), None, id="syntax error"),
    ],
)
async def test_errors_are_what_they_were(
    url: str, statement: Any, parameters: Any, then: str
) -> None:
    """The same errors leave the same transaction, aborted or not, as SQLAlchemy alone does."""
    results = []
    for engine in (
        create_async_engine(in_clear("asyncpg", url)),
        Database(in_clear("asyncpg", url)).async_engine,
    ):
        seen = await outcome(engine, statement, parameters, then)
        results.append((seen, ids(url)))
        execute(url, "delete from t where id > 1")
        await engine.dispose()
    assert results[0] == results[1]


async def test_wrong_number_of_parameters(database: Database, url: str) -> None:
    """Found by asyncpg when BEGIN is on its way: what comes after it is in that transaction."""
    sql = "insert into t values ($1)"
    async with database.async_engine.begin() as connection:
        await connection.exec_driver_sql(sql, (2,))
    async with database.async_engine.begin() as connection:
        for parameters in ((), (3, 4)):
            with pytest.raises(DBAPIError, match="server expects 1 argument"):
                await connection.exec_driver_sql(sql, parameters)
        await connection.exec_driver_sql(sql, (3,))
        assert ids(url) == [1, 2]
    assert ids(url) == [1, 2, 3]


@pytest.mark.parametrize("id_", [2, "not to be encoded"])
async def test_begin_fails(
    database: Database, url: str, monkeypatch: pytest.MonkeyPatch, id_: Any
) -> None:
    """Nothing is executed outside of a transaction, nothing waits for ever for an answer, and the
    next transaction begins."""
    levels = asyncpg.transaction.ISOLATION_LEVELS | {"no_such"}
    monkeypatch.setattr("asyncpg.transaction.ISOLATION_LEVELS", levels)
    async with asyncio.timeout(10):
        async with database.async_engine.connect() as connection:
            raw: Any = (await connection.get_raw_connection()).dbapi_connection
            for _ in range(2):
                raw.isolation_level = "no_such"
                with pytest.raises(DBAPIError):
                    await connection.execute(INSERT, {"id": id_})
                assert ids(url) == [1]
                if raw.driver_connection.is_closed():
                    break
                raw.isolation_level = None
                await connection.execute(INSERT, {"id": 3})
                assert ids(url) == [1]
                await connection.rollback()
        await assert_as_new(database, url)


class NoBegin:
    """A transport by which it does not arrive, as it may be behind a pooler."""

    def write(self, data: bytes) -> None:
        assert b"BEGIN" in data


async def test_a_server_that_has_not_begun(database: Database, url: str) -> None:
    """It is said at once, and does not pass for a transaction with what comes after it."""
    async with database.async_engine.connect() as connection:
        driver = await driver_of(connection)
        transport, driver._transport = driver._transport, NoBegin()
        for id_ in (2, 3):
            with pytest.raises(TransactionError, match="pgbouncer=True"):
                await connection.execute(INSERT, {"id": id_})
        driver._transport = transport
        await connection.execute(INSERT, {"id": 4})
    assert ids(url) == [1, 2, 3]
    await assert_as_new(database, url)


async def test_a_plan_that_has_become_invalid(database: Database, url: str) -> None:
    """It is SQLAlchemy's error, and the next transaction prepares the statement again."""
    star = text("select * from t")
    await unit(database, star)
    execute(url, "alter table t add column n integer")
    with pytest.raises(DBAPIError, match="cached statement plan is invalid"):
        await unit(database, star)
    async with session_scope(database) as session:
        assert [tuple(row) for row in await session.execute(star)] == [(1, None)]
    await assert_as_new(database, url)


async def test_a_type_that_has_changed(database: Database, url: str) -> None:
    """asyncpg finds that out when it reads the rows."""
    execute(url, "create type pair as (a integer, b integer)")
    execute(url, "create table pairs as select cast((1, 2) as pair) as value")
    pairs = text("select value from pairs")
    await unit(database, pairs)
    execute(url, "alter type pair add attribute c integer")
    with suppress(DBAPIError):
        await unit(database, pairs)
    async with session_scope(database) as session:
        assert len((await session.execute(SELECT)).all()) == 1
    await assert_as_new(database, url)


# --- time, cancellation and the network


async def test_a_first_statement_that_takes_too_long(url: str) -> None:
    """command_timeout: the connection is given up, and nothing is written by another one."""
    sleep = text("select pg_sleep(:seconds)")
    async with (
        FaultProxy(url) as proxy,
        open_database(proxy.url, connect_args={"command_timeout": 0.2}) as database,
    ):
        await unit(database, sleep, {"seconds": 0})
        with pytest.raises(TimeoutError):
            await unit(database, sleep, {"seconds": 60})

        async def swallowed() -> None:
            async with session_scope(database) as session:
                with pytest.raises(TimeoutError):
                    await session.execute(sleep, {"seconds": 60})
                with pytest.raises(PendingRollbackError):
                    await session.execute(INSERT, {"id": 2})

        with pytest.raises(TransactionAbortedError):
            await swallowed()
        assert not proxy.sent(b"C\0\0\0\6P\0")  # nothing more is asked of that connection
        assert ids(url) == [1]
        await assert_as_new(database, url)


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@pytest.mark.parametrize("first", [2, "not to be encoded"])
def test_cancelled_at_every_await(url: str, loop: str, first: Any) -> None:
    """Nothing is committed, nothing stays open, and the next one works."""

    async def work(database: Database) -> None:
        async with session_scope(database) as session:
            with suppress(DBAPIError):
                await session.execute(INSERT, {"id": first})
            await session.execute(INSERT, {"id": 3})
            raise LookupError

    async def main(how: Cancelling) -> None:
        async with open_database(url) as database:
            for number in itertools.count(1):
                await warm(database.async_engine)
                interruption = Interruption(number, how)
                task = asyncio.create_task(interruption.run(work(database)))
                await asyncio.wait((task,))
                if not interruption.happened:
                    break
                assert task.cancelled() or task.exception() is None
                await assert_as_new(database, url)
            assert isinstance(task.exception(), LookupError)
            assert number > 3  # the statements and ROLLBACK

    factory = pytest.importorskip("uvloop").new_event_loop if loop == "uvloop" else None
    for how in CANCELLING:
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(main(how))
    assert ids(url) == [1]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("needle", [b"BEGIN", b"B\0\0\0"])
async def test_the_connection_is_lost(url: str, needle: bytes, when: When) -> None:
    """With BEGIN, or between it and the statement: an error of a lost connection, and the next
    unit of work finds a new one."""
    async with FaultProxy(url) as proxy, open_database(proxy.url) as database:
        proxy.cut(needle, when)
        with pytest.raises(DBAPIError, match="closed in the middle of operation") as lost:
            await unit(database, INSERT, {"id": 2})
        assert lost.value.connection_invalidated
        assert ids(url) == [1]
        await assert_as_new(database, url)


async def test_a_connection_that_died_in_the_pool(url: str) -> None:
    """It is found by the first statement, or by `pool_pre_ping`, as it always was."""
    for ping in (False, True):
        pool = {"pool_size": 1, "max_overflow": 0, "pool_pre_ping": ping}
        database = Database(in_clear("asyncpg", url), engine_kwargs=pool)
        await warm(database.async_engine)
        for connection in connections(url):
            execute(url, "select pg_terminate_backend(%s)", connection.id)
        await until(lambda: not connections(url))
        if not ping:
            with pytest.raises(DBAPIError) as lost:
                await unit(database, INSERT, {"id": 2})
            assert lost.value.connection_invalidated
        await unit(database, INSERT, {"id": 2 + ping})
        await database.dispose()
    assert ids(url) == [1, 2, 3]


@pytest.mark.parametrize("ask", ["a statement", "one that is not to be encoded"])
async def test_the_server_hangs(url: str, ask: str) -> None:
    """command_timeout holds for it, and the connection is not used any more."""
    async with (
        FaultProxy(url) as proxy,
        open_database(proxy.url, connect_args={"command_timeout": 0.2}) as database,
    ):
        proxy.stall(b"BEGIN", "before")
        proxy.refuses = True  # where asyncpg would ask to cancel it
        async with asyncio.timeout(5):
            with pytest.raises((TimeoutError, DBAPIError)):
                await unit(database, INSERT, {"id": 2 if ask == "a statement" else "x"})
        proxy.refuses = False
        await proxy.cut_all()
        await assert_as_new(database, url)
        assert ids(url) == [1]


# --- others who use the driver's connection


async def test_a_transaction_begun_by_hand(database: Database, url: str) -> None:
    """It is refused to begin another one in it, as ever, and that one goes on."""
    async with database.async_engine.connect() as connection:
        driver = await driver_of(connection)
        await driver.execute("BEGIN")
        await driver.execute("insert into t values (2)")
        with pytest.raises(DBAPIError, match="manually started transaction"):
            await connection.execute(SELECT)
        await driver.execute("COMMIT")
    assert ids(url) == [1, 2]


async def test_a_transaction_of_the_driver_ended_by_hand(database: Database, url: str) -> None:
    """asyncpg takes it for open, and its COMMIT is not to end what others begin."""
    async with database.async_engine.connect() as connection:
        driver = await driver_of(connection)
        async with driver.transaction():
            await driver.execute("COMMIT")
            with pytest.raises(DBAPIError, match="SAVEPOINT can only be used in transaction"):
                await connection.execute(INSERT, {"id": 2})
    assert ids(url) == [1]
    await assert_as_new(database, url)


async def test_a_connection_terminated_by_hand(database: Database, url: str) -> None:
    """The error is that of a closed connection, and the next unit of work has another."""
    async with database.async_engine.connect() as connection:
        driver = await driver_of(connection)
        driver.terminate()
        with pytest.raises(DBAPIError, match="connection is closed"):
            await connection.execute(INSERT, {"id": 2})
    await assert_as_new(database, url)


async def test_a_transaction_of_the_driver(database: Database, url: str) -> None:
    """A savepoint is set in it, as ever."""
    async with database.async_engine.connect() as connection:
        driver = await driver_of(connection)
        async with driver.transaction():
            await connection.execute(INSERT, {"id": 2})
            await connection.commit()
            assert ids(url) == [1]
        async with driver.transaction():
            await connection.execute(INSERT, {"id": 3})
            await connection.rollback()
    assert ids(url) == [1, 2]


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_a_connection_that_is_busy(url: str, loop: str) -> None:
    """The statement is refused, and no BEGIN gets into what somebody else does by hand. Where it
    has, which uvloop cannot take back, that connection is used no more."""

    async def main() -> None:
        async with open_database(url) as database:
            async with database.async_engine.connect() as connection:
                driver = await driver_of(connection)
                busy = asyncio.create_task(driver.fetch("select pg_sleep(0.1)"))
                await asyncio.sleep(0)  # in which it is sent
                with pytest.raises(DBAPIError, match="another operation is in progress") as error:
                    await connection.execute(SELECT)
                assert error.value.connection_invalidated is driver.is_closed()
                assert driver.is_closed() is (loop == "uvloop")
                if not driver.is_closed():
                    await busy
                    await driver.execute("insert into t values (2)")
                    assert ids(url) == [1, 2]
                    return
                with suppress(asyncpg.PostgresError, asyncpg.InterfaceError, OSError):
                    await busy
            await assert_as_new(database, url)

    factory = pytest.importorskip("uvloop").new_event_loop if loop == "uvloop" else None
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(main())


async def test_while_another_statement_is_cancelled(url: str) -> None:
    """BEGIN is not sent into that: it waits for the end of it, as the statement does."""
    async with FaultProxy(url) as proxy, open_database(proxy.url) as database:
        async with database.async_engine.connect() as connection:
            driver = await driver_of(connection)
            busy = asyncio.create_task(driver.fetch("select pg_sleep(60)"))
            await asyncio.sleep(0)  # in which it is sent
            busy.cancel()
            with suppress(asyncio.CancelledError):
                await busy
            begun = proxy.sent(BEGIN_ALONE)
            await connection.execute(INSERT, {"id": 2})
            assert proxy.sent(BEGIN_ALONE) == begun + 1
            assert ids(url) == [1]
            await connection.commit()
        assert ids(url) == [1, 2]


class Telling(asyncpg.Connection):  # type: ignore[misc]
    """A connection class of an application that wants to know what is executed."""

    executed: ClassVar[list[str]] = []

    async def execute(self, query: str, *args: Any, **kwargs: Any) -> str:
        self.executed.append(query)
        tag: str = await super().execute(query, *args, **kwargs)
        return tag


async def test_who_replaces_execute_is_told_of_commit(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a connection class of its own, or in asyncpg's, as what traces does: at any time."""
    async with open_database(url, connect_args={"connection_class": Telling}) as database:
        Telling.executed.clear()
        await unit(database, INSERT, {"id": 2})
        assert Telling.executed == ["COMMIT;"]
    async with open_database(url) as database:
        await unit(database, INSERT, {"id": 3})
        traced: list[str] = []
        own = asyncpg.Connection.execute

        async def tracing(self: Any, query: str, *args: Any, **kwargs: Any) -> Any:
            traced.append(query)
            return await own(self, query, *args, **kwargs)

        monkeypatch.setattr("asyncpg.Connection.execute", tracing)
        await unit(database, INSERT, {"id": 4})
        assert traced == ["COMMIT;"]
    assert ids(url) == [1, 2, 3, 4]


async def test_connections_of_asyncpgs_pool(url: str) -> None:
    """What stands before a connection is left alone: BEGIN is its own."""
    dsn = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
    pool = await asyncpg.create_pool(dsn, min_size=1, max_size=1)

    async def acquire(*args: Any, **kwargs: Any) -> Any:
        return await pool.acquire()

    database = Database(url, engine_kwargs={"async_creator": acquire, "pool_size": 1})
    for id_ in (2, 3):
        await unit(database, INSERT, {"id": id_})
    await database.dispose()
    pool.terminate()
    assert ids(url) == [1, 2, 3]


async def test_an_asyncpg_that_lacks_what_is_needed(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """BEGIN is its own, and nothing fails."""
    monkeypatch.setattr("repom.dialects.pipelined_begin._OF_PROTOCOL", ("not_there",))
    async with FaultProxy(url) as proxy, open_database(proxy.url) as database:
        begun = proxy.sent(BEGIN_ALONE)
        await unit(database, INSERT, {"id": 2})
        assert proxy.sent(BEGIN_ALONE) == begun + 1
    assert ids(url) == [1, 2]
