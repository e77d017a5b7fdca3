"""`Database(on_begin=...)`: what is set for one transaction, and seen by no other."""

import asyncio
import itertools
import random
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import Column, Connection, MetaData, String, Table, insert, select, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from repom import (
    Database,
    atomic,
    current_scope,
    on_commit,
    run_transaction,
    session_scope,
    sync_session_scope,
)
from repom.errors import ConfigurationError, ReadOnlyError, TransactionError
from tests.support.cancelling import CANCELLING, cancelled_at
from tests.support.reader import connections, rows
from tests.support.tenants import choose_rows, choose_schema, tenant, tenants_url

#: Two transactions after another have the same connection, so what one leaves, the other finds.
ONE = {"pool_size": 1, "max_overflow": 0}

WRITE = text("INSERT INTO note (text) VALUES (:text)")
READ = text("SELECT DISTINCT tenant FROM note")
SETTING = text("SELECT current_setting('app.tenant', true)")


@pytest.fixture(params=["asyncpg", "psycopg"])
def rows_url(request: pytest.FixtureRequest, postgres_url: str) -> Iterator[str]:
    """A table that tenants share, with each async driver."""
    with tenants_url(postgres_url) as url:
        driver = make_url(url).set(drivername=f"postgresql+{request.param}")
        yield driver.render_as_string(hide_password=False)


@pytest.fixture
def calls() -> list[str]:
    return []


@pytest.fixture
def counted(sqlite_url: str, calls: list[str]) -> Iterator[Database]:
    """A database that notes its begins."""
    database = Database(sqlite_url, on_begin=lambda connection: calls.append("begin"))
    yield database
    database.dispose_sync()


async def seen(database: Database) -> list[str]:
    """Whose rows a transaction of the running tenant sees."""
    async with session_scope(database) as session:
        return list(await session.scalars(READ))


# --- no tenant ever sees what is another's


async def one_of_many(database: Database, name: str, number: int, chance: random.Random) -> None:
    """A transaction that looks, and ends in one of many ways."""
    tenant.set(name)
    way = chance.choice(["commit", "rollback", "error", "raise", "inner", "early", "savepoint"])
    try:
        async with session_scope(database, inner_commits="allow") as session:
            for _ in range(2):
                await session.execute(WRITE, {"text": f"{way} {number}"})
                assert (await session.scalars(READ)).all() == [name]
                if way == "rollback":
                    await session.rollback()
                elif way == "inner":
                    await session.commit()
                elif way == "early":
                    await current_scope().commit()
                elif way == "savepoint":
                    with pytest.raises(DBAPIError):
                        async with atomic():
                            await session.execute(text("SELECT 1 / 0"))
                elif way == "error":
                    await session.execute(text("SELECT 1 / 0"))
                elif way == "raise":
                    raise LookupError(way)
                assert set(await session.scalars(READ)) <= {name}
    except (LookupError, DBAPIError):
        assert way in ("error", "raise")


async def test_row_level_security_with_one_connection(rows_url: str, postgres_url: str) -> None:
    """200 transactions of two tenants, on one connection in turn, see only what is their own,
    whatever the one before has ended by: commit, rollback, an error, one that was swallowed."""
    database = Database(rows_url, engine_kwargs=ONE, on_begin=choose_rows)
    chance = random.Random(7)
    work = [
        one_of_many(database, name, number, chance) for number in range(100) for name in ("a", "b")
    ]
    await asyncio.gather(*work)
    count = "SELECT tenant, count(*) > 50 FROM note GROUP BY tenant ORDER BY tenant"
    assert rows(postgres_url, count) == [("a", True), ("b", True)]
    assert len(connections(postgres_url)) == 1
    await database.dispose()


@pytest.mark.parametrize("how", CANCELLING)
async def test_row_level_security_and_cancellation(rows_url: str, how: Any) -> None:
    """Cancelled at any await, that of `on_begin` too, a transaction leaves the next one nothing."""
    database = Database(rows_url, engine_kwargs=ONE, on_begin=choose_rows)

    async def write_as(name: str) -> None:
        tenant.set(name)
        async with session_scope(database) as session:
            await session.execute(WRITE, {"text": "x"})
            assert (await session.scalars(READ)).all() == [name]

    await write_as("b")
    for number in itertools.count(1):
        if not await cancelled_at(number, how, write_as("a")):
            break
        assert await seen(database) == ["b"]
    assert number > 5
    await database.dispose()


@pytest.mark.parametrize("read_only", [True, "snapshot"])
async def test_units_of_work_that_only_read(rows_url: str, read_only: Any) -> None:
    """They have the tenant as well, though they need a transaction for that: for each of their
    statements, and for nobody else's."""
    database = Database(rows_url, engine_kwargs=ONE, on_begin=choose_rows)
    for name in "ab":
        tenant.set(name)
        async with session_scope(database) as session:
            await session.execute(WRITE, {"text": "x"})

    async def look_as(name: str) -> None:
        tenant.set(name)
        async with session_scope(database, read_only=read_only) as session:
            for _ in range(2):
                assert (await session.scalars(READ)).all() == [name]
                assert await session.scalar(SETTING) == name
            await session.rollback()
            assert (await session.scalars(READ)).all() == [name]

    await asyncio.gather(*(look_as(name) for name in "ab" * 20))
    with pytest.raises(ReadOnlyError):
        async with session_scope(database, read_only=read_only) as session:
            await session.execute(WRITE, {"text": "y"})
    await look_as("b")
    async with database.for_reading().async_engine.connect() as connection:
        assert await connection.scalar(SETTING) == ""
    with sync_session_scope(database, read_only=read_only) as sync_session:
        for _ in range(2):
            assert sync_session.scalars(READ).all() == [tenant.get()]
    await database.dispose()


async def test_readers(rows_url: str) -> None:
    """A replica is asked as the tenant, too."""
    database = Database(rows_url, readers=[rows_url], engine_kwargs=ONE, on_begin=choose_rows)
    for name in "abab":
        tenant.set(name)
        async with session_scope(database) as session:
            await session.execute(WRITE, {"text": "x"})

    async def look_as(name: str) -> None:
        tenant.set(name)
        async with session_scope(database, read_only=True) as session:
            for _ in range(2):
                assert (await session.scalars(READ)).all() == [name]

    await asyncio.gather(*(look_as(name) for name in "ab" * 10))
    await database.dispose()


async def test_nothing_is_left_on_the_connection(rows_url: str) -> None:
    """A session that no `on_begin` was called for, on the connection of one it was called for,
    has no tenant: PostgreSQL has forgotten it with the transaction."""
    database = Database(rows_url, engine_kwargs=ONE, on_begin=choose_rows)
    tenant.set("a")
    async with session_scope(database) as session:
        await session.execute(WRITE, {"text": "x"})
        assert await session.scalar(SETTING) == "a"
    async with database.async_engine.connect() as connection:
        assert await connection.scalar(SETTING) == ""
        assert (await connection.scalars(READ)).all() == []
    await database.dispose()


async def test_schemas_with_one_connection(postgres_url: str) -> None:
    """The same statement means the tenant's table, prepared by the driver or not."""
    names = ["a", "b", "Public, b"]
    with tenants_url(postgres_url, "a", "b") as url:
        database = Database(url, engine_kwargs=ONE, on_begin=choose_schema)

        async def write_as(name: str) -> None:
            tenant.set(name)
            async with session_scope(database) as session:
                await session.execute(WRITE, {"text": f"of {name}"})
                assert (await session.scalars(READ)).all() == [name]

        await asyncio.gather(*(write_as(name) for name in names[:2] * 50))
        with pytest.raises(DBAPIError, match='relation "note" does not exist'):
            await write_as(names[2])
        for name in names[:2] * 2:
            tenant.set(name)
            async with session_scope(database, read_only=True) as session:
                assert (await session.scalars(READ)).all() == [name]
        for name in names[:2]:
            assert rows(postgres_url, f"SELECT count(*) FROM {name}.note") == [(50,)]
        await database.dispose()


async def test_schemas_by_translation(postgres_url: str) -> None:
    """`on_begin` may set options of the connection, too, which end with the transaction."""
    note = Table("note", MetaData(), Column("tenant", String), Column("text", String))

    def translate(connection: Connection) -> None:
        connection.execution_options(schema_translate_map={None: tenant.get()})

    with tenants_url(postgres_url, "a", "b") as url:
        database = Database(url, engine_kwargs=ONE, on_begin=translate)
        for name in "abab":
            tenant.set(name)
            async with session_scope(database) as session:
                await session.execute(insert(note).values(tenant=name, text="x"))
                assert set(await session.scalars(select(note.c.tenant))) == {name}
        for name in "ab":
            assert rows(postgres_url, f"SELECT count(*) FROM {name}.note") == [(2,)]
        await database.dispose()


# --- where it is called


async def test_each_transaction_has_its_own(counted: Database, calls: list[str]) -> None:
    """At the first statement, again after each end, and not for a savepoint."""
    async with session_scope(counted, inner_commits="allow") as session:
        assert calls == []
        await session.execute(text("SELECT 1"))
        await session.execute(text("SELECT 1"))
        async with atomic():
            await session.execute(text("SELECT 1"))
        assert len(calls) == 1
        await session.commit()
        await session.execute(text("SELECT 1"))
        assert len(calls) == 2
        await session.rollback()
        async with session.begin_nested():
            await session.execute(text("SELECT 1"))
        assert len(calls) == 3
        await current_scope().commit()
        await session.execute(text("SELECT 1"))
        assert len(calls) == 4


async def test_callbacks_and_scopes_inside(counted: Database, calls: list[str]) -> None:
    """A callback's own transaction, and a scope inside a scope."""

    async def look() -> None:
        async with session_scope(counted) as session:
            await session.execute(text("SELECT 1"))

    async with session_scope(counted, sqlite_begin="DEFERRED") as session:
        await session.execute(text("SELECT 1"))
        on_commit(look)
        async with session_scope(counted, sqlite_begin="DEFERRED") as inner:
            await inner.execute(text("SELECT 1"))
        assert len(calls) == 2
    assert len(calls) == 3


async def test_each_attempt(counted: Database, calls: list[str]) -> None:
    """What is repeated after a conflict is another transaction."""

    async def lose() -> None:
        await current_scope().session().execute(text("SELECT 1"))
        if len(calls) < 3:
            raise LookupError

    await run_transaction(
        lose, database=counted, retry_on=lambda error: isinstance(error, LookupError)
    )
    assert len(calls) == 3


def test_sync_sessions(counted: Database, calls: list[str]) -> None:
    """In the sync world as well."""
    with sync_session_scope(counted) as session:
        session.execute(text("SELECT 1"))
    assert len(calls) == 1


async def test_sessions_of_the_factories(counted: Database, calls: list[str]) -> None:
    """The plain sessions of the database have it, too."""
    async with counted.sessionmaker() as session:
        await session.execute(text("SELECT 1"))
    with counted.sync_sessionmaker() as sync_session:
        sync_session.execute(text("SELECT 1"))
    assert len(calls) == 2


async def test_classes_of_the_application(sqlite_url: str, calls: list[str]) -> None:
    """Sessions are still of its classes, by whichever way these are given."""

    class Mine(AsyncSession):
        pass

    class MineBelow(Session):
        pass

    database = Database(
        sqlite_url,
        session_class=Mine,
        sync_session_class=MineBelow,
        session_kwargs={"info": {"mine": 1}},
        on_begin=lambda connection: calls.append("begin"),
    )
    async with session_scope(database.at(sqlite_url)) as session:
        await session.execute(text("SELECT 1"))
        assert (isinstance(session, Mine), session.info["mine"]) == (True, 1)
    with sync_session_scope(database) as sync_session:
        sync_session.execute(text("SELECT 1"))
        assert isinstance(sync_session, MineBelow)
    below = Database(
        sqlite_url,
        session_kwargs={"sync_session_class": MineBelow},
        on_begin=lambda connection: calls.append("begin"),
    )
    async with session_scope(below) as session:
        await session.execute(text("SELECT 1"))
        assert isinstance(session.sync_session, MineBelow)
    assert len(calls) == 3
    for each in (database, below):
        await each.dispose()


def test_the_classes_of_a_database_without_it_stay_as_they_are(sqlite_url: str) -> None:
    """What is not used costs nothing."""
    database = Database(sqlite_url)
    assert (database.session_class, database.sync_session_class) == (AsyncSession, Session)
    assert "info" not in database.session_kwargs


# --- what is wrong


@pytest.mark.parametrize("fails", ["before", "statement"])
async def test_an_error_that_is_swallowed(sqlite_url: str, fails: str) -> None:
    """Nothing is executed in a transaction without its `on_begin`; the next one may succeed."""
    calls: list[str] = []

    def on_begin(connection: Connection) -> None:
        calls.append("begin")
        if len(calls) == 1 and fails == "before":
            raise LookupError("no tenant")
        if len(calls) == 1:
            connection.execute(text("SELECT nonsense"))

    database = Database(sqlite_url, on_begin=on_begin)
    async with session_scope(database) as session:
        with pytest.raises((LookupError, DBAPIError)) as first:
            await session.execute(text("SELECT 1"))

        async def in_a_savepoint() -> None:
            async with atomic():
                await session.execute(text("SELECT 1"))

        for refused in (
            lambda: session.scalar(text("SELECT 1")),
            lambda: session.run_sync(lambda sync: sync.connection().scalars(text("SELECT 1"))),
            in_a_savepoint,
        ):
            with pytest.raises(TransactionError, match="on_begin of this database") as again:
                await refused()
            assert again.value.__cause__ is first.value
        await session.rollback()
        assert await session.scalar(text("SELECT 1")) == 1
    assert len(calls) == 2
    await database.dispose()


@pytest.mark.parametrize("where", ["scope", "engine", "connection"])
async def test_autocommit_is_refused(sqlite_url: str, where: str) -> None:
    """Where no transaction is, nothing can be set for it, so no statement is executed."""
    kwargs = {"isolation_level": "AUTOCOMMIT"} if where == "engine" else {}
    database = Database(sqlite_url, engine_kwargs=kwargs, on_begin=lambda connection: None)
    level = "AUTOCOMMIT" if where == "scope" else None
    options = {"isolation_level": "AUTOCOMMIT"} if where == "connection" else None
    async with session_scope(database, isolation_level=level) as session:
        with pytest.raises(ConfigurationError, match="AUTOCOMMIT"):
            await session.connection(execution_options=options)
    await database.dispose()


async def test_a_coroutine_function_is_refused(sqlite_url: str) -> None:
    """It would never have run."""

    async def on_begin(connection: Connection) -> None:
        raise AssertionError

    database = Database(sqlite_url, on_begin=on_begin)
    with pytest.raises(ConfigurationError, match="Write a plain function"):
        async with session_scope(database) as session:
            await session.execute(text("SELECT 1"))
    await database.dispose()
