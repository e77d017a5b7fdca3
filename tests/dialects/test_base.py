"""The two truths of COMMIT, and what every dialect has in common."""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from typing import Any

import pytest
from sqlalchemy import Engine, event, insert, select, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError, IntegrityError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from sqlalchemy.pool import (
    AsyncAdaptedQueuePool,
    NullPool,
    Pool,
    QueuePool,
    SingletonThreadPool,
    StaticPool,
)

from repom import session_scope, sync_session_scope
from repom.awaited_pool import AwaitedQueuePool
from repom.conflicts import is_conflict
from repom.database import Database
from repom.dialects import Support, support_for
from repom.errors import CommitOutcomeUnknown, DatabaseUnreachableError, TransactionAbortedError
from repom.lending import LendingQueuePool
from tests.dialects.drivers import KINDS, Driver, in_clear, open_driver
from tests.support.faultproxy import FaultProxy
from tests.support.polling import until
from tests.support.reader import connections, execute, rows

PASSWORD = "s3cret-Pa55"

#: COMMIT of a new row is answered with the SQLSTATE `STATE`.
ANSWERING = """
create function answer() returns trigger language plpgsql as
  $$ begin raise exception 'ambiguous' using errcode = 'STATE'; end $$;
create constraint trigger answer after insert on truth
  deferrable initially deferred for each row execute function answer()
"""


class Base(DeclarativeBase):
    pass


class Row(Base):
    __tablename__ = "truth"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    name: Mapped[str]


@pytest.fixture(params=KINDS)
async def driver(request: pytest.FixtureRequest) -> AsyncIterator[Driver]:
    """Each driver, with the table and row 1 in it."""
    async with open_driver(request, request.param) as driver:
        await prepare(driver.url)
        yield driver


async def prepare(url: str) -> None:
    execute(url, "create table truth (id integer primary key, name varchar(5) not null)")
    execute(url, "insert into truth values (1, '0')")


def ids(url: str) -> set[int]:
    return {id_ for (id_,) in rows(url, "select id from truth")}


def told(error: BaseException | None) -> str:
    """All that an error and the errors in its chain say."""
    if error is None:
        return ""
    return f"{error!r}{error}{told(error.__cause__)}{told(error.__context__)}"


# --- truth 1: COMMIT of an aborted transaction -----------------------------------------------

# Each writes row 2, fails at something, and swallows the error, which it returns.


def add_row_2(session: Session) -> None:
    session.execute(insert(Row).values(id=2, name="a"))


def swallow(work: Callable[[], Any]) -> Exception | None:
    try:
        work()
    except SQLAlchemyError as error:
        return error
    return None


def duplicate(session: Session) -> Exception | None:
    return swallow(lambda: session.execute(insert(Row).values(id=1, name="b")))


def by_flush(session: Session) -> Exception | None:
    session.add(Row(id=2, name="a"))
    session.flush()
    session.add(Row(id=1, name="b"))
    return swallow(session.flush)


def by_execute(session: Session) -> Exception | None:
    add_row_2(session)
    return duplicate(session)


def by_connection(session: Session) -> Exception | None:
    add_row_2(session)
    connection = session.connection()
    return swallow(lambda: connection.execute(insert(Row).values(id=1, name="b")))


def by_executemany(session: Session) -> Exception | None:
    add_row_2(session)
    connection = session.connection()
    many = [{"id": 3, "name": "a"}, {"id": 1, "name": "b"}]
    return swallow(lambda: connection.execute(insert(Row), many))


def twice(session: Session) -> Exception | None:
    add_row_2(session)
    first = duplicate(session)
    swallow(lambda: session.execute(select(Row)))
    return first


def in_savepoint(session: Session) -> Exception | None:
    add_row_2(session)

    def nested() -> None:
        with session.begin_nested():
            session.add(Row(id=1, name="b"))
            session.flush()

    swallow(nested)
    return None


def in_deep_savepoint(session: Session) -> Exception | None:
    add_row_2(session)

    def nested() -> None:
        with session.begin_nested(), session.begin_nested():
            session.execute(insert(Row).values(id=1, name="b"))

    swallow(nested)
    return None


def healed_by_hand(session: Session) -> Exception | None:
    add_row_2(session)
    session.execute(text("SAVEPOINT x"))
    duplicate(session)
    session.execute(text("ROLLBACK TO SAVEPOINT x"))
    return None


def healed_then_failed(session: Session) -> Exception | None:
    healed_by_hand(session)
    return missing_table(session)


def after_rollback(session: Session) -> Exception | None:
    duplicate(session)
    session.rollback()
    add_row_2(session)
    return None


def wrong_type(session: Session) -> Exception | None:
    # asyncpg refuses the argument by itself, and the server never hears of it.
    add_row_2(session)
    cast = text("select cast(:x as integer)").bindparams(x="not a number")
    return swallow(lambda: session.execute(cast))


def missing_table(session: Session) -> Exception | None:
    add_row_2(session) if session.get(Row, 2) is None else None
    return swallow(lambda: session.execute(text("select * from nope")))


def insert_or_rollback(session: Session) -> Exception | None:
    # On SQLite it ends the transaction; for the others it is a syntax error.
    add_row_2(session)
    doomed = text("INSERT OR ROLLBACK INTO truth VALUES (1, 'b')")
    return swallow(lambda: session.execute(doomed))


CASES = [
    by_flush,
    by_execute,
    by_connection,
    by_executemany,
    twice,
    in_savepoint,
    in_deep_savepoint,
    healed_by_hand,
    healed_then_failed,
    after_rollback,
    wrong_type,
    missing_table,
    insert_or_rollback,
]


async def test_commit_returns_if_and_only_if_the_row_is_there(driver: Driver) -> None:
    """COMMIT never succeeds silently without committing, whatever was swallowed before it; and
    the error with which it is refused has the swallowed one as its cause."""
    lies, wrong_causes = [], []
    for case in CASES:
        async with driver.work() as work:
            swallowed = await work.do(case)
            refused = await work.commit()
        if (refused is None) != (2 in ids(driver.url)):
            lies.append((case.__name__, refused))
        if isinstance(refused, TransactionAbortedError):
            assert isinstance(swallowed, DBAPIError)
            if refused.__cause__ is not swallowed.orig:
                wrong_causes.append((case.__name__, refused.__cause__))
        execute(driver.url, "delete from truth where id <> 1")
    assert lies == []
    assert wrong_causes == []


async def test_a_refused_commit_leaves_nothing_on_the_pooled_connection(driver: Driver) -> None:
    """The only connection of the pool is usable after it, and holds no transaction."""
    async with driver.work() as work:
        await work.do(insert_or_rollback)
        await work.commit()
    async with driver.work() as work:
        await work.do(lambda session: session.execute(insert(Row).values(id=7, name="c")))
        assert await work.commit() is None
    assert 7 in ids(driver.url)
    execute(driver.url, "drop table truth")  # which a transaction left open would block


async def test_an_earlier_transaction_of_the_connection_is_not_blamed(driver: Driver) -> None:
    """Who rolls an aborted transaction back can commit the next one on the same connection."""
    async with driver.work() as work:
        await work.do(insert_or_rollback)
        await work.do(Session.rollback)
        await work.do(add_row_2)
        assert await work.commit() is None
    assert 2 in ids(driver.url)


async def test_what_is_begun_after_the_commit_of_a_scope_is_rolled_back(driver: Driver) -> None:
    """Right after that COMMIT the pool has nothing to roll back, and does not. That is over with
    the next transaction of the connection, also with one that nobody told SQLAlchemy of."""

    def add_row(session: Session, id_: int) -> None:
        session.execute(insert(Row).values(id=id_, name="a"))

    def add_row_raw(session: Session, id_: int) -> None:
        cursor = session.connection().connection.cursor()
        cursor.execute(f"INSERT INTO truth VALUES ({id_}, 'a')")
        cursor.close()

    for add in (add_row, add_row_raw):
        if driver.is_async:
            async with session_scope(driver.database) as session:
                await session.run_sync(add_row, 2)
        else:
            with sync_session_scope(driver.database) as sync_session:
                add_row(sync_session, 2)
        async with driver.work() as work:
            await work.do(partial(add, id_=3))
        assert ids(driver.url) == {1, 2}
        execute(driver.url, "delete from truth where id = 2")


async def test_a_commit_that_a_constraint_refuses_is_not_called_unknown(
    postgres_url: str, sqlite_url: str
) -> None:
    """A deferred constraint fails COMMIT with its own error; what is done on the connection
    after that, and be it a dead one, is no matter of that COMMIT."""
    for name, url in (("asyncpg", postgres_url), ("aiosqlite", sqlite_url)):
        driver = Driver(name, url)
        execute(url, "create table parent (id integer primary key)")
        execute(
            url,
            "create table child (parent_id integer"
            " references parent (id) deferrable initially deferred)",
        )
        async with driver.work() as work:
            await work.do(lambda session: session.execute(text("insert into child values (1)")))
            assert isinstance(await work.commit(), IntegrityError)
            await work.do(Session.rollback)
        async with driver.database.async_engine.connect() as connection:
            assert (await connection.execute(text("select * from child"))).all() == []
        await driver.database.dispose()


# --- truth 2: a connection lost in COMMIT -----------------------------------------------------


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", ["asyncpg", "psycopg", "aiomysql"])
async def test_a_connection_cut_in_commit_leaves_the_outcome_unknown(
    request: pytest.FixtureRequest, name: str, when: Any
) -> None:
    """The client hears the same whether the server has seen COMMIT or not, so repom claims
    neither; the pool is healthy afterwards."""
    url = request.getfixturevalue(KINDS[name].fixture)
    await prepare(url)
    in_clear = {"asyncpg": "?ssl=disable", "psycopg": "?sslmode=disable"}.get(name, "")
    async with FaultProxy(url) as proxy:
        driver = Driver(name, proxy.url + in_clear)
        async with driver.work() as work:
            await work.do(add_row_2)
            proxy.cut(b"COMMIT", when)
            error = await work.commit()
        assert isinstance(error, CommitOutcomeUnknown)
        assert not isinstance(error, SQLAlchemyError)
        assert isinstance(error.__cause__, Exception)
        async with driver.work() as work:
            assert await work.do(lambda session: session.scalar(text("select 1"))) == 1
        await driver.database.dispose()
    assert (2 in ids(url)) == (when == "after")


@pytest.mark.parametrize("state", ["40003", "08007", "XXA00"])
@pytest.mark.parametrize("name", ["asyncpg", "psycopg", "psycopg-sync", "psycopg2"])
async def test_a_server_that_does_not_know_leaves_the_outcome_unknown(
    request: pytest.FixtureRequest, name: str, state: str
) -> None:
    """CockroachDB answers COMMIT so when it has lost the node that commits. The connection is
    there still, and serves the next."""
    async with open_driver(request, name) as driver:
        await prepare(driver.url)
        execute(driver.url, ANSWERING.replace("STATE", state))
        async with driver.work() as work:
            await work.do(add_row_2)
            error = await work.commit()
        assert isinstance(error, CommitOutcomeUnknown)
        assert str(error).startswith("the server does not know what became of COMMIT: ")
        assert error.__cause__ is not None
        assert not is_conflict(error)
        execute(driver.url, "drop trigger answer on truth")
        async with driver.work() as work:
            await work.do(add_row_2)
            assert await work.commit() is None
        assert len(connections(driver.url)) == 1


async def test_an_error_of_that_name_in_a_statement_is_an_ordinary_one(postgres_url: str) -> None:
    """COMMIT has not been sent."""
    driver = Driver("asyncpg", postgres_url)
    async with driver.work() as work:
        with pytest.raises(DBAPIError):
            await work.do(
                lambda session: session.execute(
                    text("do $$ begin raise exception using errcode = '40003'; end $$")
                )
            )
        assert isinstance(await work.commit(), TransactionAbortedError)
    await driver.database.dispose()


@pytest.mark.parametrize(
    ("name", "noticed"),
    [("asyncpg", False), ("asyncpg", True), ("psycopg", False), ("psycopg-sync", False)],
)
async def test_a_backend_terminated_before_commit_is_an_ordinary_error(
    request: pytest.FixtureRequest, name: str, noticed: bool
) -> None:
    """The server said that it ended the connection, so COMMIT has certainly not happened,
    whether the driver had noticed before or not; the pool is healthy afterwards."""
    async with open_driver(request, name) as driver:
        await prepare(driver.url)
        async with driver.work() as work:
            await work.do(add_row_2)
            connection = await work.driver_connection()
            for found in connections(driver.url):
                execute(driver.url, "select pg_terminate_backend(%s, 5000)", found.id)
            if noticed:
                await until(connection.is_closed)
            error = await work.commit()
        assert isinstance(error, DBAPIError)
        async with driver.work() as work:
            assert await work.do(lambda session: session.scalar(text("select 1"))) == 1
        assert 2 not in ids(driver.url)


@pytest.mark.parametrize("name", ["asyncpg", "psycopg", "psycopg-sync"])
async def test_an_aborted_transaction_on_a_dead_connection_is_an_error_too(
    request: pytest.FixtureRequest, name: str
) -> None:
    """Whichever of the two is noticed, nothing was committed; and the connection does not go
    back to the pool."""
    async with open_driver(request, name) as driver:
        await prepare(driver.url)
        async with driver.work() as work:
            await work.do(by_execute)
            for found in connections(driver.url):
                execute(driver.url, "select pg_terminate_backend(%s, 5000)", found.id)
            assert isinstance(await work.commit(), (TransactionAbortedError, DBAPIError))
        async with driver.work() as work:
            assert await work.do(lambda session: session.scalar(text("select 1"))) == 1


async def test_behind_a_pooler_a_termination_is_not_believed(postgres_url: str) -> None:
    """PgBouncer can end the client's connection while the server commits, so there the outcome
    is unknown."""
    driver = Driver("asyncpg", postgres_url, pgbouncer=True)
    async with driver.work() as work:
        pid = await work.do(lambda session: session.scalar(text("select pg_backend_pid()")))
        execute(postgres_url, "select pg_terminate_backend(%s, 5000)", pid)
        assert isinstance(await work.commit(), CommitOutcomeUnknown)
    await driver.database.dispose()


async def test_a_connection_lost_in_a_statement_is_an_ordinary_error(postgres_url: str) -> None:
    """No COMMIT was under way, also when an earlier one of the connection has succeeded."""
    driver = Driver("asyncpg", postgres_url)
    async with driver.database.async_engine.connect() as connection:
        pid = (await connection.execute(text("select pg_backend_pid()"))).scalar()
        await connection.commit()
        execute(postgres_url, "select pg_terminate_backend(%s, 5000)", pid)
        with pytest.raises(DBAPIError):
            await connection.execute(text("select 1"))
    await driver.database.dispose()


def is_committing(url: str) -> bool:
    return any(found.state == "active" and "COMMIT" in found.query for found in connections(url))


async def test_a_commit_that_is_cancelled_frees_the_connection(postgres_url: str) -> None:
    """Outside a scope nothing shields COMMIT: cancelled, it raises just that, and its
    connection is closed."""
    driver = Driver("asyncpg", postgres_url)
    execute(postgres_url, "create table slow (id integer)")
    execute(
        postgres_url,
        "create function wait() returns trigger language plpgsql"
        " as 'begin perform pg_sleep(10); return null; end'",
    )
    execute(
        postgres_url,
        "create constraint trigger slow after insert on slow deferrable initially deferred"
        " for each row execute function wait()",
    )

    async def write() -> None:
        async with driver.database.async_engine.begin() as connection:
            await connection.execute(text("insert into slow values (1)"))

    task = asyncio.create_task(write())
    await until(lambda: is_committing(postgres_url))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    for found in connections(postgres_url):
        execute(postgres_url, "select pg_terminate_backend(%s, 5000)", found.id)
    await driver.database.dispose()


# --- connecting -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def closed_port() -> Iterator[int]:
    """A port that is taken, so that nobody else gets it, and that nobody listens on."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


async def connect(driver: Driver) -> None:
    if driver.is_async:
        await driver.database.ping()
    else:
        with driver.database.engine.connect():
            pass


@pytest.mark.parametrize("wrong", ["port", "host", "login", "database"])
@pytest.mark.parametrize("name", [name for name in KINDS if "sqlite" not in name])
async def test_an_unreachable_server_is_one_error_for_all_drivers(
    request: pytest.FixtureRequest, closed_port: int, name: str, wrong: str
) -> None:
    """`DatabaseUnreachableError` says where and why in two lines, has the driver's error as its
    cause, and no text in its chain holds the password."""
    pytest.importorskip(KINDS[name].module)
    url = make_url(request.getfixturevalue(KINDS[name].fixture)).set(password=PASSWORD)
    changes: dict[str, dict[str, Any]] = {
        "port": {"port": closed_port},
        "host": {"host": "nowhere.invalid"},
        "login": {"username": "nobody_we_know"},
        "database": {"database": "no_such_database"},
    }
    if wrong == "database":  # the server has to let us in first
        url = url.set(password=make_url(request.getfixturevalue(KINDS[name].fixture)).password)
    driver = Driver(name, url.set(**changes[wrong]).render_as_string(hide_password=False))
    [named] = changes[wrong].values()
    with pytest.raises(DatabaseUnreachableError, match=str(named)) as e:
        await connect(driver)
    assert isinstance(e.value, ConnectionError)
    assert isinstance(e.value.__cause__, Exception)
    assert len(str(e.value).splitlines()) == 2
    assert PASSWORD not in told(e.value)
    await driver.database.dispose()


@pytest.mark.parametrize("name", ["asyncpg", "psycopg"])
async def test_a_connection_lost_in_the_first_look_at_a_server(
    postgres_url: str, name: str
) -> None:
    """It is the error of a lost connection, and the next one finds the server as it is."""
    async with FaultProxy(postgres_url) as proxy:
        proxy.cut(b"pg_catalog.version", "before")
        database = Database(in_clear(name, proxy.url))
        with pytest.raises(DBAPIError) as lost:
            await database.async_engine.connect()
        assert lost.value.connection_invalidated
        async with database.async_engine.connect() as connection:
            assert await connection.scalar(text("select 1")) == 1
            assert connection.dialect.server_version_info
        await database.dispose()


async def test_a_wrong_connect_argument_explains_itself(postgres_url: str) -> None:
    """A typing error in connect_args is the driver's TypeError, and no unreachable server."""
    database = Database(postgres_url, engine_kwargs={"connect_args": {"no_such_argument": 1}})
    with pytest.raises(TypeError, match="no_such_argument"):
        await database.ping()
    await database.dispose()


async def test_a_do_connect_listener_of_the_application_is_heard(postgres_url: str) -> None:
    """SQLAlchemy's way to fetch a password for each connection works beside repom."""
    database = Database(postgres_url)
    seen = []

    @event.listens_for(database.async_engine.sync_engine, "do_connect")
    def provide_token(dialect: Any, record: Any, cargs: Any, cparams: Any) -> None:
        cparams["password"] = PASSWORD
        seen.append(cparams["user"])

    await database.ping()
    assert seen == [make_url(postgres_url).username]
    await database.dispose()


async def test_connections_of_the_applications_own_making_keep_the_truth(
    postgres_url: str,
) -> None:
    """`async_creator`, which cloud connectors need, bypasses the connect arguments: COMMIT of an
    aborted transaction is refused all the same."""
    asyncpg: Any = pytest.importorskip("asyncpg")
    database = Database(
        postgres_url, engine_kwargs={"async_creator": lambda: asyncpg.connect(postgres_url)}
    )
    async with database.async_engine.connect() as connection:
        with pytest.raises(DBAPIError):
            await connection.execute(text("select * from nope"))
        with pytest.raises(TransactionAbortedError):
            await connection.commit()
    await database.dispose()


async def test_no_engine_event_is_registered(driver: Driver) -> None:
    """A single one makes SQLAlchemy prepare for all of them at every statement."""
    engine: Any = driver.database.engine
    if driver.is_async:
        engine = driver.database.async_engine.sync_engine
    assert not engine._has_events


# --- pools ------------------------------------------------------------------------------------

QUEUE = {"pool_size": 3, "max_overflow": 4, "pool_timeout": 5, "pool_use_lifo": True}


def support(is_async: bool) -> Support:
    driver = "asyncpg" if is_async else "psycopg"
    return support_for(make_url(f"postgresql+{driver}://"), {}, is_async=is_async)


@pytest.mark.parametrize(
    ("given", "is_async", "used"),
    [
        (None, True, AwaitedQueuePool),
        (None, False, LendingQueuePool),
        (QueuePool, True, AwaitedQueuePool),
        (QueuePool, False, LendingQueuePool),
        (AsyncAdaptedQueuePool, True, AwaitedQueuePool),
        (AsyncAdaptedQueuePool, False, LendingQueuePool),
        (NullPool, True, NullPool),
        (NullPool, False, NullPool),
        (StaticPool, True, StaticPool),
        (SingletonThreadPool, False, SingletonThreadPool),
    ],
)
def test_one_poolclass_serves_both_worlds(
    given: type[Pool] | None, is_async: bool, used: type[Pool]
) -> None:
    """The pool of one world is replaced by its twin of the other; options that it does not
    take are left out, and all others are kept."""
    kwargs = support(is_async).engine_kwargs({**QUEUE, "poolclass": given, "pool_pre_ping": True})
    assert kwargs["poolclass"] is used
    assert kwargs["pool_pre_ping"] is True
    assert kwargs.keys() >= QUEUE.keys() if issubclass(used, QueuePool) else True
    assert issubclass(used, QueuePool) or not kwargs.keys() & QUEUE.keys()


async def test_pools_log_by_the_names_that_sqlalchemy_documents(database_url: str) -> None:
    """So that `logging.getLogger("sqlalchemy.pool")` is all that users need to know."""
    database = Database(database_url)
    for pool in (database.async_engine.pool, database.engine.pool):
        logger: Any = pool.logger
        assert logger.name.startswith("sqlalchemy.pool.")
    await database.dispose()


@pytest.mark.parametrize(
    "poolclass", [None, NullPool, StaticPool, QueuePool, AsyncAdaptedQueuePool]
)
async def test_the_default_pool_options_never_stop_an_engine_from_being_made(
    database_url: str, poolclass: type[Pool] | None
) -> None:
    """What `RepomConfig.engine_kwargs` gives by default is usable with every pool."""
    kwargs = {} if poolclass is None else {"poolclass": poolclass}
    database = Database(database_url, engine_kwargs=kwargs)
    engines: list[AsyncEngine | Engine] = [database.async_engine, database.engine]
    for engine in engines:
        assert isinstance(engine.pool, (poolclass or QueuePool, QueuePool))
    await database.ping()
    await database.dispose()


def test_a_dialect_that_repom_knows_nothing_of_is_left_alone() -> None:
    """Other drivers get an engine with the same pool options and no claims about COMMIT."""
    for url in ("oracle+oracledb://host/x", "postgresql+pg8000://host/x", "sqlite+pysqlcipher://"):
        plain = support_for(make_url(url), {"a": 1}, is_async=False)
        assert type(plain) is Support
        assert plain.connect_args({"b": 2}) == {"a": 1, "b": 2}
        assert not plain.aborts(ValueError(), object())
        plain.check()
        plain.abandon(object())
