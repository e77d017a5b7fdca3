"""One logical database: its engines, its sessions, and its life."""

import asyncio
import contextlib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, MetaData, String, make_url, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from sqlalchemy.pool import NullPool, QueuePool

from repom.awaited_pool import AwaitedQueuePool
from repom.begin import BeginOptions
from repom.config import RepomConfig
from repom.database import Database
from repom.errors import (
    ConfigurationError,
    DatabaseFileError,
    DatabaseUnreachableError,
    DatabaseURLError,
    MissingDriverError,
)
from repom.lending import LendingQueuePool
from tests.support.polling import until
from tests.support.reader import connections, execute, rows


class Base(DeclarativeBase):
    pass


class Item(Base):
    __tablename__ = "items"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(9), default="a")


class MySession(AsyncSession):
    """As SQLModel's, which adds a method."""

    async def mine(self) -> str:
        return "mine"


class MySyncSession(Session):
    """The same in the sync world."""

    def mine(self) -> str:
        return "mine"


def names(url: str) -> list[str]:
    return [name for (name,) in rows(url, "select name from items order by id")]


# --- engines ----------------------------------------------------------------------------------


async def test_one_url_gives_both_engines(database_url: str) -> None:
    """Either is made when it is first used, with the driver of its world, and is kept."""
    database = Database(database_url)
    assert isinstance(database.async_engine, AsyncEngine)
    assert isinstance(database.engine, Engine)
    assert database.async_engine is database.async_engine
    assert database.engine is database.engine
    assert database.async_engine.dialect.is_async
    assert not database.engine.dialect.is_async
    await database.ping()
    with database.engine.connect() as connection:
        assert connection.execute(text("select 1")).scalar() == 1
    await database.dispose()


@pytest.mark.parametrize(
    "url",
    ["sqlite+aiosqlite:///{}", "sqlite+pysqlite:///{}", "sqlite:///{}"],
)
async def test_the_driver_of_one_world_is_replaced_in_the_other(tmp_path: Path, url: str) -> None:
    """Whichever of the two the URL names."""
    database = Database(url.format(tmp_path / "db"))
    assert database.async_engine.dialect.driver == "aiosqlite"
    assert database.engine.dialect.driver == "pysqlite"
    await database.dispose()


def test_making_a_database_does_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """No driver is imported and no file is touched when a module that has one is imported."""
    monkeypatch.setattr("repom.urls.find_spec", lambda name: None)
    database = Database("postgresql://app:secret@nowhere.invalid/shop")
    assert "secret" not in repr(database)
    assert repr(database) == "<Database postgresql://app:***@nowhere.invalid/shop>"
    assert database.sessionmaker is database.sessionmaker


def test_an_unreadable_url_is_an_error_at_once() -> None:
    """And the password in it stays where it is."""
    with pytest.raises(DatabaseURLError) as e:
        Database("postgresql://app:se@cret@host/shop")
    assert "cret" not in str(e.value)


@pytest.mark.parametrize(
    ("url", "line"),
    [
        ("postgresql://h/x", 'pip install "repom[postgres]"'),
        ("postgresql+psycopg://h/x", 'pip install "repom[postgres]"'),
        ("mysql://h/x", 'pip install "repom[mysql]"'),
    ],
)
async def test_a_missing_driver_is_an_error_with_the_line_to_run(
    monkeypatch: pytest.MonkeyPatch, url: str, line: str
) -> None:
    """Found by `check()`, so before the first request."""
    monkeypatch.setattr("repom.urls.find_spec", lambda name: None)
    database = Database(url)
    with pytest.raises(MissingDriverError, match="is not installed") as e:
        database.check()
    assert line in str(e.value)
    with pytest.raises(MissingDriverError):
        _ = database.async_engine


@pytest.mark.parametrize(
    ("url", "error", "words"),
    [
        ("sqlite://", MissingDriverError, 'pip install "repom[async]"'),
        ("postgresql://h/x", MissingDriverError, 'pip install "repom[postgres]"'),
        ("mysql://h/x", MissingDriverError, 'pip install "repom[mysql]"'),
        ("postgresql+pygresql://h/x", DatabaseURLError, "No async driver is known"),
        ("postgresql://h/x?gssencmode=require", DatabaseURLError, "gssencmode"),
    ],
)
async def test_sync_code_needs_no_async_driver(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    url: str,
    error: type[Exception],
    words: str,
) -> None:
    """`check()` lets an application of `def` endpoints start, with a warning; who asks for the
    async side meets the error."""
    for driver in ("aiosqlite", "asyncpg", "aiomysql"):
        monkeypatch.setitem(sys.modules, driver, None)
    monkeypatch.setattr("repom.urls._import_driver", lambda url: None)  # PyGreSQL, for instance
    database = Database(url)
    database.check()
    [warning] = caplog.messages
    assert f"<Database {url}> can be used by sync code only." in warning
    assert words in warning
    with pytest.raises(error, match=re.escape(words)):
        _ = database.async_engine


def test_engine_kwargs_are_laid_over_the_defaults() -> None:
    """The application's before repom's; the database's own dict is never shared."""
    given = {"pool_size": 3, "echo": False}
    database = Database("sqlite://", engine_kwargs=given)
    assert database.engine_kwargs == {**RepomConfig.DEFAULT_ENGINE_KWARGS, **given}
    database.engine_kwargs["pool_size"] = 4
    assert given["pool_size"] == 3
    assert Database("sqlite://").engine_kwargs == RepomConfig.DEFAULT_ENGINE_KWARGS


async def test_pool_options_reach_the_pool(database_url: str) -> None:
    """In both worlds; SQLAlchemy's own names for them."""
    kwargs = {"pool_size": 2, "max_overflow": 1, "pool_timeout": 7, "pool_recycle": 60}
    database = Database(database_url, engine_kwargs=kwargs)
    for pool, kind in (
        (database.async_engine.pool, AwaitedQueuePool),
        (database.engine.pool, LendingQueuePool),
    ):
        assert isinstance(pool, QueuePool)
        assert type(pool) is kind
        assert (pool.size(), pool._max_overflow, pool.timeout(), pool._recycle) == (2, 1, 7, 60)
    await database.dispose()


async def test_new_engines_are_the_callers_own(database_url: str) -> None:
    """With all that repom adds, and with options of their own."""
    database = Database(database_url)
    async_engine = database.new_async_engine(poolclass=NullPool)
    engine = database.new_engine(poolclass=NullPool)
    assert async_engine is not database.async_engine
    assert engine is not database.engine
    assert isinstance(async_engine.pool, NullPool)
    assert isinstance(engine.pool, NullPool)
    async with async_engine.connect() as connection:
        await connection.execute(text("select 1"))
    await database.dispose()
    await async_engine.dispose()


async def test_connect_args_of_the_url_and_of_the_application_are_both_used(
    postgres_url: str,
) -> None:
    """`connect_timeout` has to become an argument for asyncpg; what the application gives is
    added, and wins where both speak of the same."""
    seen: list[dict[str, Any]] = []
    database = Database(
        f"{postgres_url}?connect_timeout=7",
        engine_kwargs={"connect_args": {"server_settings": {"application_name": "mine"}}},
    )
    async with database.async_engine.connect() as connection:
        name = await connection.execute(text("select current_setting('application_name')"))
        assert name.scalar() == "mine"
    support = database.async_support()
    seen.append(support.connect_args({"server_settings": {}}))
    seen.append(support.connect_args({"timeout": 3}))
    assert seen == [{"timeout": 7.0, "server_settings": {}}, {"timeout": 3}]
    await database.dispose()


async def test_binds_share_the_pool_and_are_made_once(database_url: str) -> None:
    """How transactions begin is no reason for connections of its own."""
    database = Database(database_url)
    for options in (BeginOptions("DEFERRED"), BeginOptions("IMMEDIATE", "SERIALIZABLE")):
        bind = database.async_bind(options)
        assert bind is database.async_bind(options)
        assert bind.pool is database.async_engine.pool
        sync_bind = database.sync_bind(options)
        assert sync_bind is database.sync_bind(options)
        assert sync_bind.pool is database.engine.pool
    # The plain engine costs nothing at each statement, an engine with options a little.
    assert database.async_bind(BeginOptions("DEFERRED")) is database.async_engine
    assert database.sync_bind(BeginOptions("DEFERRED")) is database.engine
    await database.dispose()


@pytest.mark.parametrize(
    ("asked", "postgres", "mysql"),
    [
        ("SERIALIZABLE", "serializable", "SERIALIZABLE"),
        ("REPEATABLE READ", "repeatable read", "REPEATABLE-READ"),
        (None, "read committed", "REPEATABLE-READ"),
    ],
)
async def test_the_isolation_level_is_that_of_the_bind(
    postgres_url: str, mysql_url: str, asked: str | None, postgres: str, mysql: str
) -> None:
    """And the next user of the pooled connection has the default again."""
    for url, sql, level in (
        (postgres_url, "show transaction_isolation", postgres),
        (mysql_url, "select @@session.tx_isolation", mysql),
    ):
        database = Database(url, engine_kwargs={"pool_size": 1, "max_overflow": 0})
        async with database.async_bind(BeginOptions(isolation_level=asked)).connect() as connection:
            assert (await connection.execute(text(sql))).scalar() == level
        default = {postgres_url: "read committed", mysql_url: "REPEATABLE-READ"}[url]
        async with database.async_bind(BeginOptions()).connect() as connection:
            assert (await connection.execute(text(sql))).scalar() == default
        await database.dispose()


def test_who_is_told_of_engines(sqlite_url: str) -> None:
    """Of all that the database makes for its sessions: for reading and for its readers, too."""
    database = Database(sqlite_url, readers=[sqlite_url])
    told: list[tuple[Database, Engine]] = []
    database.on_engine = lambda of, engine: told.append((of, engine))
    assert database.readers is not None
    reader = database.readers.all[0].database
    engines = [database.engine, database.for_reading().engine, reader.for_reading().engine]
    assert told == [(database, engine) for engine in engines]
    database.dispose_sync()


# --- sessions ---------------------------------------------------------------------------------


async def test_the_sessionmaker_can_be_made_at_import(database_url: str) -> None:
    """It finds the engine of the running loop at each call; arguments are those of
    `async_sessionmaker`."""
    database = Database(database_url, session_class=MySession)
    maker = await asyncio.to_thread(lambda: database.sessionmaker)  # where no loop runs
    await database.create_all(Base.metadata)
    async with maker() as session:
        assert await session.mine() == "mine"
        item = Item()
        session.add(item)
        await session.commit()
        assert item.name == "a"  # expire_on_commit is off
    async with maker(expire_on_commit=True, autoflush=False) as session:
        assert session.sync_session.expire_on_commit
        assert not session.sync_session.autoflush
        assert session.bind is database.async_engine
    async with maker.begin() as session:
        session.add(Item(name="b"))
    with contextlib.suppress(ZeroDivisionError):
        async with maker.begin() as session:
            session.add(Item(name="c"))
            raise ZeroDivisionError
    assert names(database_url) == ["a", "b"]
    await database.dispose()


def test_one_sessionmaker_serves_all_loops(sqlite_url: str) -> None:
    """Also those of two `asyncio.run()`."""
    database = Database(sqlite_url)
    maker = database.sessionmaker

    async def add() -> None:
        await database.create_all(Base.metadata)
        async with maker.begin() as session:
            session.add(Item())

    asyncio.run(add())
    asyncio.run(add())
    assert names(sqlite_url) == ["a", "a"]


def test_the_sync_sessionmaker(database_url: str) -> None:
    """A plain `sessionmaker` of the application's class, usable again after `dispose_sync()`."""
    database = Database(database_url, sync_session_class=MySyncSession)
    database.create_all_sync(Base.metadata)
    for _ in range(2):
        with database.sync_sessionmaker.begin() as session:
            assert isinstance(session, MySyncSession)
            item = Item()
            session.add(item)
        assert item.name == "a"
        database.dispose_sync()
    assert names(database_url) == ["a", "a"]


async def test_session_kwargs_are_laid_over_the_defaults(sqlite_url: str) -> None:
    """For sessions of both worlds."""
    database = Database(sqlite_url, session_kwargs={"autoflush": False, "info": {"a": 1}})
    sync_session = database.sync_sessionmaker()
    for session in (database.sessionmaker().sync_session, sync_session):
        assert not session.autoflush
        assert not session.expire_on_commit
        assert session.info == {"a": 1}
    sync_session.close()
    database = Database(sqlite_url, session_kwargs={"expire_on_commit": True})
    assert database.sessionmaker().sync_session.expire_on_commit
    await database.dispose()


# --- life-cycle -------------------------------------------------------------------------------


async def test_create_all_makes_what_is_missing(database_url: str) -> None:
    """In either world, and as often as one likes."""
    database = Database(database_url)
    await database.create_all(Base.metadata)
    more = MetaData()
    Item.__table__.to_metadata(more, name="more")  # type: ignore[attr-defined]
    await database.create_all(Base.metadata)
    await asyncio.to_thread(database.create_all_sync, more)
    await asyncio.to_thread(database.create_all_sync, Base.metadata)
    execute(database_url, "insert into items (name) values ('x')")
    execute(database_url, "insert into more (name) values ('x')")
    await database.dispose()


async def test_ping_tells_whether_the_database_answers(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a readiness check."""
    database = Database(postgres_url)
    await database.ping()
    gone = Database(make_url(postgres_url).set(port=1))
    with pytest.raises(DatabaseUnreachableError, match=":1/"):
        await gone.ping()
    await database.dispose()
    await gone.dispose()


def test_check_asks_no_server(tmp_path: Path) -> None:
    """What is wrong with the configuration is known without; what the server thinks is not."""
    Database("postgresql://nobody@nowhere.invalid/x").check()
    Database(f"sqlite:///{tmp_path}/data/db").check()
    assert (tmp_path / "data").is_dir()
    (tmp_path / "file").touch()
    unusable = {
        f"sqlite:///{tmp_path}/file/db": DatabaseFileError,
        "db2://host/x": ConfigurationError,
        "postgresql+pg8000://host/x": DatabaseURLError,
    }
    for url, error in unusable.items():
        with pytest.raises(error):
            Database(url).check()


async def test_dispose_closes_both_worlds(postgres_url: str) -> None:
    """The running loop's connections and those of the sync engine; the next use opens new ones."""
    database = Database(postgres_url)
    for _ in range(2):
        await database.ping()
        await asyncio.to_thread(_ping_sync, database)
        assert len(connections(postgres_url)) == 2
        await database.dispose()
        await until(lambda: not connections(postgres_url))


def _ping_sync(database: Database) -> None:
    with database.sync_bind(BeginOptions()).connect() as connection:
        connection.execute(text("select 1"))


def test_a_sync_connection_in_use_is_closed_when_it_comes_back(postgres_url: str) -> None:
    """`dispose_sync()` lets it finish; SQLAlchemy alone would then keep it open for ever."""
    database = Database(postgres_url)
    with database.engine.connect() as connection:
        database.dispose_sync()
        assert connection.execute(text("select 1")).scalar() == 1


def test_dispose_of_what_was_never_used(database_url: str) -> None:
    """Costs nothing, and makes nothing."""
    database = Database(database_url)
    database.dispose_sync()
    asyncio.run(database.dispose())


# --- configuration ----------------------------------------------------------------------------


class Config(RepomConfig):
    db_url = "sqlite:///of-the-config.db"
    pgbouncer = True
    sqlite_begin = "IMMEDIATE"

    @property
    def engine_kwargs(self) -> dict[str, Any]:
        return super().engine_kwargs | {"pool_size": 3}

    @property
    def session_kwargs(self) -> dict[str, Any]:
        return super().session_kwargs | {"autoflush": False}


@pytest.mark.parametrize("given", [True, False], ids=["given", "of the process"])
def test_from_config_takes_everything(given: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """URL, engine and session arguments, and what the dialects want to know."""
    config = Config()
    monkeypatch.setattr("repom.database.get_config", lambda: config)
    database = Database.from_config(config if given else None)
    assert str(database.url) == "sqlite:///of-the-config.db"
    assert database.engine_kwargs["pool_size"] == 3
    assert database.session_kwargs == {"expire_on_commit": False, "autoflush": False}
    assert database.pgbouncer is True
    assert database.sqlite_begin == "IMMEDIATE"


def test_a_password_that_was_given_as_an_option_is_hidden() -> None:
    """In `repr()` as in messages."""
    shown: Callable[[str], str] = lambda url: repr(Database(url))  # noqa: E731
    assert "secret" not in shown("postgresql://app@host/shop?password=secret")
    assert "secret" not in shown("postgresql://app:secret@host/shop")


async def test_another_database_stands_in(sqlite_url: str, database_url: str) -> None:
    """In tests: all engines and sessions are its own, those of factories made before too, and
    what is asked of the one is done by the other. Afterwards all is as before."""
    database, other = Database(f"{sqlite_url}.not-there"), Database(database_url)
    make_async, make_sync = database.sessionmaker, database.sync_sessionmaker
    database.stand_in = other
    database.check()
    await database.ping()
    await database.create_all(Base.metadata)
    database.create_all_sync(Base.metadata)
    async with make_async.begin() as session:
        session.add(Item(name="async"))
    with make_sync.begin() as sync_session:
        sync_session.add(Item(name="sync"))
    options = BeginOptions("IMMEDIATE")
    assert database.async_engine is other.async_engine
    assert database.async_bind(options) is other.async_bind(options)
    assert database.engine is other.engine
    assert database.sync_bind(options) is other.sync_bind(options)
    assert rows(database_url, "SELECT name FROM items ORDER BY name") == [("async",), ("sync",)]
    await database.dispose()
    database.stand_in = None
    assert database.engine is not other.engine
    assert make_sync().get_bind() is database.engine
    database.dispose_sync()
    other.dispose_sync()
    assert not await asyncio.to_thread(Path(str(database.url.database)).exists)


def test_the_sync_sessionmaker_outlives_dispose(sqlite_url: str) -> None:
    """One that was kept does not go on with an engine that has ended."""
    database = Database(sqlite_url)
    make = database.sync_sessionmaker
    before = make().get_bind()
    database.dispose_sync()
    assert make().get_bind() is database.engine is not before
    database.dispose_sync()


def test_the_same_database_elsewhere() -> None:
    """`at()` keeps all but the URL."""
    given: dict[str, Any] = {
        "engine_kwargs": {"echo": True},
        "session_kwargs": {"autoflush": False},
        "session_class": type("Async", (AsyncSession,), {}),
        "sync_session_class": type("Sync", (Session,), {}),
        "sqlite_begin": "DEFERRED",
        "pgbouncer": True,
    }
    database = Database("postgresql://host/a", **given)
    other = database.at("postgresql://host/b")
    assert other.url.database == "b"
    for name in given:
        assert getattr(other, name) == getattr(database, name)
