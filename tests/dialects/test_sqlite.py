"""SQLite: real transactions, settings, URLs, and writers in line."""

import asyncio
import gc
import os
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import URL, Connection, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import IntegrityError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.orm import Session

from repom.begin import BeginOptions
from repom.database import Database
from repom.dialects import aiosqlite_threads
from repom.dialects.sqlite import SQLite, private_memory
from repom.dialects.write_queue import WriteQueue, write_queue
from repom.errors import (
    ConfigurationError,
    DatabaseFileError,
    DatabaseUnreachableError,
    TransactionAbortedError,
    WouldDeadlockError,
)
from repom.transaction import session_scope, sync_session_scope
from tests.dialects.drivers import Driver, open_driver
from tests.support.polling import block_until, until
from tests.support.reader import execute, rows

NOBODY = 65534  # the user id

WRITER = BeginOptions("IMMEDIATE")
READER = BeginOptions("DEFERRED")


@pytest.fixture(params=["aiosqlite", "pysqlite"])
async def driver(request: pytest.FixtureRequest) -> AsyncIterator[Driver]:
    """Both drivers, with a table `t (n)` that holds 0."""
    async with open_driver(request, request.param) as driver:
        execute(driver.url, "create table t (n integer not null)")
        execute(driver.url, "insert into t values (0)")
        yield driver


@pytest.fixture
async def database(sqlite_url: str) -> AsyncIterator[Database]:
    """A file with a table `t (n)` that holds 0."""
    execute(sqlite_url, "create table t (n integer not null)")
    execute(sqlite_url, "insert into t values (0)")
    database = Database(sqlite_url)
    yield database
    await database.dispose()


def numbers(url: str) -> list[int]:
    return [n for (n,) in rows(url, "select n from t order by n")]


def is_locked(url: str) -> bool:
    """Whether somebody holds the write lock of the file."""
    connection = sqlite3.connect(make_url(url).database or "", timeout=0, isolation_level=None)
    try:
        connection.execute("BEGIN IMMEDIATE")
    except sqlite3.OperationalError:
        return True
    finally:
        connection.close()
    return False


def no_thread_of_aiosqlite() -> bool:
    """False for a moment after a failed connect: aiosqlite does not wait for its thread."""
    return not any("_connection_worker" in thread.name for thread in threading.enumerate())


def statement(sql: str) -> Callable[[Session], Any]:
    return lambda session: session.execute(text(sql))


# --- transactions -----------------------------------------------------------------------------


async def test_a_savepoint_after_a_select_is_really_rolled_back(driver: Driver) -> None:
    """Python's driver alone begins no transaction at a SELECT, and RELEASE would commit."""

    def work_(session: Session) -> None:
        session.execute(text("select * from t"))
        savepoint = session.begin_nested()
        session.execute(text("insert into t values (1)"))
        savepoint.rollback()
        with session.begin_nested():
            session.execute(text("insert into t values (2)"))
        session.rollback()

    async with driver.work() as work:
        await work.do(work_)
    assert numbers(driver.url) == [0]


async def test_two_selects_of_a_transaction_see_the_same(driver: Driver) -> None:
    """The first SELECT is inside the transaction, so nothing changes under it."""
    async with driver.work() as work:
        count = text("select count(*) from t")
        assert await work.do(lambda session: session.scalar(count)) == 1
        execute(driver.url, "insert into t values (1)")
        assert await work.do(lambda session: session.scalar(count)) == 1


async def test_ddl_is_rolled_back(driver: Driver) -> None:
    """CREATE TABLE belongs to the transaction, and so does what was written before it."""
    async with driver.work() as work:
        await work.do(statement("insert into t values (1)"))
        await work.do(statement("create table other (n integer)"))
        await work.do(Session.rollback)
    assert numbers(driver.url) == [0]
    assert rows(driver.url, "select name from sqlite_master") == [("t",)]


@pytest.mark.parametrize("what", ["insert", "ddl", "savepoint"])
async def test_work_after_an_auto_rollback_is_not_committed(driver: Driver, what: str) -> None:
    """SQLite has ended the transaction, and would let each statement that follows commit itself,
    and RELEASE the savepoint, too."""
    execute(driver.url, "create unique index u on t (n)")

    def swallow_and_go_on(session: Session) -> None:
        with pytest.raises(IntegrityError):
            session.execute(text("insert or rollback into t values (0)"))
        if what == "insert":
            session.execute(text("insert into t values (1)"))
        elif what == "ddl":
            session.execute(text("create table other (n integer)"))
        else:
            with session.begin_nested():
                session.execute(text("insert into t values (2)"))

    async with driver.work() as work:
        await work.do(swallow_and_go_on)
        assert isinstance(await work.commit(), TransactionAbortedError)
    assert numbers(driver.url) == [0]
    assert rows(driver.url, "select name from sqlite_master where type = 'table'") == [("t",)]


async def test_a_refused_commit_ends_the_transaction(driver: Driver) -> None:
    """SQLite leaves it open when a deferred constraint fails, and SQLAlchemy takes it for over:
    the connection would go back to the pool with its lock."""
    execute(driver.url, "create table parent (id integer primary key)")
    execute(
        driver.url,
        "create table child (id integer references parent (id) deferrable initially deferred)",
    )
    connection: Any
    if driver.is_async:
        connection = await driver.database.async_bind(WRITER).connect()
        await connection.execute(text("insert into child values (1)"))
        with pytest.raises(IntegrityError):
            await connection.commit()
        await connection.close()
    else:
        with driver.database.sync_bind(WRITER).connect() as connection:
            connection.execute(text("insert into child values (1)"))
            with pytest.raises(IntegrityError):
                connection.commit()
    assert not is_locked(driver.url)
    assert line(driver.database).holder() is None
    async with driver.work(WRITER) as work:
        await work.do(statement("insert into t values (1)"))
        assert await work.commit() is None
    assert rows(driver.url, "select * from child") == []


@pytest.mark.parametrize(
    ("configured", "asked", "locks"),
    [
        (None, READER, False),
        (None, WRITER, True),
        ("IMMEDIATE", READER, True),
        ("DEFERRED", WRITER, False),
    ],
)
@pytest.mark.parametrize("name", ["aiosqlite", "pysqlite"])
async def test_when_the_write_lock_is_taken(
    request: pytest.FixtureRequest, name: str, configured: Any, asked: BeginOptions, locks: bool
) -> None:
    """A transaction takes the write lock at its first statement, a SELECT too, if it was asked
    to begin IMMEDIATE; the database's `sqlite_begin` decides before that."""
    async with open_driver(request, name, sqlite_begin=configured) as driver:
        execute(driver.url, "create table t (n integer)")
        async with driver.work(asked) as work:
            assert not is_locked(driver.url)
            await work.do(statement("select * from t"))
            assert is_locked(driver.url) == locks
        assert not is_locked(driver.url)


@pytest.mark.parametrize("options", [READER, WRITER], ids=str)
async def test_isolation_level_autocommit_begins_nothing(
    driver: Driver, options: BeginOptions
) -> None:
    """SQLAlchemy's AUTOCOMMIT stays what it is, so VACUUM works and a statement is committed at
    once; the next user of the pooled connection has real transactions again."""
    autocommit = options._replace(isolation_level="AUTOCOMMIT")
    async with driver.work(autocommit) as work:
        await work.do(statement("insert into t values (1)"))
        assert numbers(driver.url) == [0, 1]
        await work.do(statement("vacuum"))
    async with driver.work(options) as work:
        await work.do(statement("insert into t values (2)"))
    assert numbers(driver.url) == [0, 1]


async def test_an_engine_in_autocommit_begins_nothing(sqlite_url: str) -> None:
    """The same as an option of the engine."""
    execute(sqlite_url, "create table t (n integer)")
    database = Database(sqlite_url, engine_kwargs={"isolation_level": "AUTOCOMMIT"})
    async with database.async_engine.connect() as connection:
        await connection.execute(text("insert into t values (1)"))
        await connection.execute(text("vacuum"))
    with database.engine.connect() as sync_connection:
        sync_connection.execute(text("insert into t values (2)"))
    assert numbers(sqlite_url) == [1, 2]
    await database.dispose()


async def test_autocommit_holds_no_place_in_the_line(database: Database) -> None:
    """It is no transaction that others would have to wait for; as an option of the session it
    does not even wait itself."""
    eager = Database(database.url, engine_kwargs={"isolation_level": "AUTOCOMMIT"})
    async with session_scope(eager) as session:
        await session.execute(text("insert into t values (1)"))
        assert line(database).holder() is None
    await eager.dispose()
    place = line(database).acquire("somebody", 0)
    async with session_scope(database, isolation_level="AUTOCOMMIT") as session:
        await session.execute(text("insert into t values (2)"))
    place.release()
    assert numbers(str(database.url)) == [0, 1, 2]


@pytest.mark.parametrize("level", ["SERIALIZABLE", "READ UNCOMMITTED"])
async def test_other_isolation_levels_keep_the_real_begin(driver: Driver, level: str) -> None:
    """SQLAlchemy switches the driver's own BEGIN on for them, which must not disturb."""
    async with driver.work(BeginOptions("IMMEDIATE", level)) as work:
        await work.do(statement("select * from t"))
        assert is_locked(driver.url)
        await work.do(statement("insert into t values (1)"))
        assert await work.commit() is None
    assert numbers(driver.url) == [0, 1]


async def test_rollback_cannot_be_switched_off(driver: Driver) -> None:
    """`skip_autocommit_rollback` takes the driver's word for being in autocommit, so that word
    has to be true."""
    try:
        database = Database(driver.url, engine_kwargs={"skip_autocommit_rollback": True})
        engine = database.async_engine if driver.is_async else database.engine
    except TypeError:
        pytest.skip("this SQLAlchemy does not know it")
    del engine
    driver.database = database
    async with driver.work() as work:
        await work.do(statement("insert into t values (1)"))
    assert numbers(driver.url) == [0]
    assert not is_locked(driver.url)


async def test_a_plain_connection_that_could_not_begin_tries_again(database: Database) -> None:
    """SQLAlchemy must know that BEGIN has failed, or the next statement of the connection runs
    outside any transaction and commits itself."""
    eager = Database(database.url, sqlite_begin="IMMEDIATE")
    engine = eager.async_engine
    async with engine.connect() as first, engine.connect() as second:
        await first.execute(text("select * from t"))
        with pytest.raises(WouldDeadlockError):
            await second.execute(text("insert into t values (1)"))
        await first.rollback()
        await second.execute(text("insert into t values (1)"))
        assert second.in_transaction()
        await second.rollback()
    assert rows(str(database.url), "select * from t") == [(0,)]
    await eager.dispose()


# --- settings ---------------------------------------------------------------------------------


async def test_settings_of_every_connection(driver: Driver) -> None:
    """Foreign keys are enforced, readers do not block writers (WAL), a lock is waited for, and
    a power cut loses nothing (synchronous FULL)."""
    expected = {"foreign_keys": 1, "journal_mode": "wal", "busy_timeout": 30000, "synchronous": 2}

    def settings(session: Session) -> dict[str, Any]:
        return {name: session.scalar(text(f"pragma {name}")) for name in expected}

    async with driver.work() as work:
        assert await work.do(settings) == expected


@pytest.mark.parametrize(
    ("query", "connect_args", "milliseconds"),
    [("", {}, 30000), ("?timeout=2", {}, 2000), ("?timeout=2", {"timeout": 3}, 3000)],
)
@pytest.mark.parametrize("name", ["aiosqlite", "pysqlite"])
async def test_the_busy_timeout_can_be_chosen(
    sqlite_url: str, name: str, query: str, connect_args: dict[str, Any], milliseconds: int
) -> None:
    """In the URL, and before that in connect_args, as for every option of SQLAlchemy."""
    driver = Driver(name, sqlite_url + query)
    driver.database.engine_kwargs["connect_args"] = connect_args
    async with driver.work() as work:
        timeout = await work.do(lambda session: session.scalar(text("pragma busy_timeout")))
        assert timeout == milliseconds
    await driver.database.dispose()


async def test_a_connection_class_of_the_application_is_kept(sqlite_url: str) -> None:
    """`factory` in connect_args is combined with repom's own class."""

    class Mine(sqlite3.Connection):
        def mine(self) -> str:
            return "mine"

    database = Database(sqlite_url, engine_kwargs={"connect_args": {"factory": Mine}})
    with database.sync_bind(WRITER).connect() as connection:
        connection.execute(text("select 1"))
        driver_connection: Any = connection.connection.driver_connection
        assert driver_connection.mine() == "mine"
        assert is_locked(sqlite_url)
    await database.dispose()


@pytest.mark.parametrize("option", ["creator", "async_creator"])
async def test_a_creator_is_refused(sqlite_url: str, option: str) -> None:
    """Its connections could not do what repom promises, so it is an error that says what to
    write instead."""
    database = Database(sqlite_url, engine_kwargs={option: lambda: None})
    with pytest.raises(ConfigurationError, match=rf"'{option}'.*\n.*connect_args"):
        await database.ping()


# --- URLs and files ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["with space.db", "100%25.db", "what?.db", "größe.db", "日本.db", "a#b&c=d.db", "'q'.db"],
)
async def test_a_file_may_have_any_name(tmp_path: Path, name: str) -> None:
    """Sync and async engines open exactly this file."""
    path = tmp_path / name
    database = Database(URL.create("sqlite", database=str(path)))
    async with database.async_engine.begin() as connection:
        await connection.execute(text("create table t (n integer)"))
    with database.engine.connect() as sync_connection:
        assert sync_connection.execute(text("select * from t")).all() == []
    await database.dispose()
    assert os.listdir(tmp_path) == [name]


async def test_the_folder_of_the_file_is_made(tmp_path: Path) -> None:
    """So that `data/db.sqlite3` works in an empty folder."""
    database = Database(f"sqlite:///{tmp_path}/some/where/db.sqlite3")
    await database.ping()
    assert (tmp_path / "some/where/db.sqlite3").exists()
    await database.dispose()


def test_a_relative_path_is_below_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for SQLAlchemy; a later change of the working directory changes nothing."""
    monkeypatch.chdir(tmp_path)
    database = Database("sqlite:///data/db.sqlite3")
    with database.engine.connect() as connection:
        connection.execute(text("select 1"))
    assert (tmp_path / "data/db.sqlite3").exists()
    database.dispose_sync()


@pytest.mark.parametrize("place", ["below a file", "below /proc"])
async def test_an_impossible_place_is_an_error_that_names_it(tmp_path: Path, place: str) -> None:
    """Found by `check()`, so before the first request."""
    (tmp_path / "file").touch()
    folder = tmp_path / "file" if place == "below a file" else Path("/proc/nowhere")
    database = Database(f"sqlite:///{folder}/db.sqlite3")
    with pytest.raises(DatabaseFileError, match=f"{folder}/db.sqlite3: .*\n.*permission") as e:
        database.check()
    assert isinstance(e.value, OSError)
    with pytest.raises(DatabaseFileError):
        await database.ping()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("unwritable", ["the folder", "the file"])
def test_a_place_that_may_not_be_written_is_an_error_that_names_it(unwritable: str) -> None:
    """Both have to be writable: SQLite writes more files beside the first. (As the user nobody,
    since root may write everywhere, in a folder that nobody can reach.)"""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "db.sqlite3")
        path.touch()
        path.chmod(0o644 if unwritable == "the file" else 0o666)
        Path(folder).chmod(0o755 if unwritable == "the folder" else 0o777)
        support = SQLite(make_url(f"sqlite:///{path}"), {}, is_async=False)
        name = path if unwritable == "the file" else folder
        os.setresuid(NOBODY, NOBODY, 0)
        try:
            with pytest.raises(DatabaseFileError, match=f"{path}: {name} is not writable"):
                support.check()
        finally:
            os.setresuid(0, 0, 0)


async def test_what_is_no_database_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    """And the half-opened connection is closed."""
    path = tmp_path / "letter.txt"
    path.write_text("Dear reader, " * 100)
    database = Database(f"sqlite:///{path}")
    for attempt in (database.ping, lambda: asyncio.to_thread(database.engine.connect)):
        with pytest.raises(DatabaseFileError, match=f"{path}: file is not a database"):
            await attempt()
    gc.collect()  # and with it, a ResourceWarning of Python 3.13
    await database.dispose()
    await until(no_thread_of_aiosqlite)


@pytest.mark.parametrize("form", ["file:{}?mode=ro&uri=true", "file://{}?uri=true&mode=ro"])
async def test_a_read_only_url_reads_only(sqlite_url: str, form: str) -> None:
    """`mode=ro` opens a database as it is, without trying to change its journal mode."""
    execute(sqlite_url, "create table t (n integer)")
    path = make_url(sqlite_url).database or ""
    database = Database("sqlite:///" + form.format(path))
    database.check()
    async with database.async_engine.connect() as connection:
        assert (await connection.execute(text("select * from t"))).all() == []
        with pytest.raises(OperationalError, match="readonly"):
            await connection.execute(text("insert into t values (1)"))
    with database.engine.connect() as sync_connection:
        assert sync_connection.execute(text("select * from t")).all() == []
    await database.dispose()


async def test_a_missing_file_opened_for_reading_is_an_error(tmp_path: Path) -> None:
    """Nothing is created for a `mode=ro` URL."""
    database = Database(f"sqlite:///file:{tmp_path}/gone/db?mode=ro&uri=true")
    with pytest.raises(DatabaseFileError, match=f"{tmp_path}/gone/db"):
        await database.ping()
    assert os.listdir(tmp_path) == []
    await database.dispose()
    await until(no_thread_of_aiosqlite)


def test_one_file_has_one_line_of_writers_whatever_it_is_called(tmp_path: Path) -> None:
    """By a plain path, a relative one, a link, or a URI."""
    (tmp_path / "link").symlink_to(tmp_path)
    names = [
        f"{tmp_path}/x y.db",
        f"{os.path.relpath(tmp_path)}/x y.db",
        f"{tmp_path}/./link/x y.db",
    ]
    urls = [URL.create("sqlite", database=name) for name in names]
    for name in (f"file:{tmp_path}/x%20y.db", f"file://localhost{tmp_path}/x%20y.db"):
        urls.append(URL.create("sqlite", database=name, query={"uri": "true"}))
    assert {SQLite(url, {}, is_async=False).path for url in urls} == {f"{tmp_path}/x y.db"}


# --- memory -----------------------------------------------------------------------------------

MEMORY = [
    "sqlite://",
    "sqlite:///:memory:",
    "sqlite+aiosqlite://",
    "sqlite:///file::memory:?uri=true",
    "sqlite:///file::memory:?cache=shared&uri=true",
    "sqlite:///file:name?mode=memory&uri=true",
]


async def write_number(database: Database, n: int) -> None:
    async with database.async_bind(WRITER).begin() as connection:
        await connection.execute(text("create table if not exists t (n integer)"))
        await connection.execute(text("insert into t values (:n)"), {"n": n})


async def read_numbers(database: Database) -> list[int]:
    async with database.async_engine.connect() as connection:
        return list((await connection.execute(text("select n from t order by n"))).scalars())


@pytest.mark.parametrize("url", MEMORY)
def test_a_memory_database_is_one_for_all_loops_and_the_sync_engine(url: str) -> None:
    """What one event loop has written, the next one reads, and so do sync code and a thread with
    a loop of its own; no connection has to stay open for that."""
    database = Database(url)
    asyncio.run(write_number(database, 1))
    asyncio.run(write_number(database, 2))
    with database.sync_bind(WRITER).begin() as connection:
        connection.execute(text("insert into t values (3)"))
    seen: list[list[int]] = []
    thread = threading.Thread(target=lambda: seen.append(asyncio.run(read_numbers(database))))
    thread.start()
    thread.join()
    assert seen == [[1, 2, 3]]
    with database.engine.connect() as connection:
        assert connection.execute(text("select n from t order by n")).scalars().all() == [1, 2, 3]
    database.dispose_sync()


@pytest.mark.parametrize("url", MEMORY)
def test_two_memory_databases_are_two(url: str) -> None:
    """Each `Database` has its own, whatever the URL says."""
    first, second = Database(url), Database(url)
    asyncio.run(write_number(first, 1))
    asyncio.run(write_number(second, 2))
    assert asyncio.run(read_numbers(first)) == [1]
    assert asyncio.run(read_numbers(second)) == [2]


def test_a_closed_connection_leaves_no_lock_with_whoever_holds_its_cursor() -> None:
    """A half-read one, in the traceback of a cancelled request for instance: until it was
    collected nobody could write to a memory database."""
    database = Database("sqlite://?timeout=0")
    for n in (1, 2):
        asyncio.run(write_number(database, n))
    connection = database.engine.raw_connection()
    cursor = connection.driver_connection.cursor()  # type: ignore[union-attr]
    assert cursor.execute("select n from t").fetchone() == (1,)
    connection.invalidate()
    asyncio.run(write_number(database, 3))
    with pytest.raises(sqlite3.ProgrammingError, match="closed"):
        cursor.fetchone()
    database.dispose_sync()


def test_a_memory_database_is_freed_with_its_object() -> None:
    """Nothing keeps the data of a `Database` that nobody holds any more."""
    database = Database("sqlite://")
    asyncio.run(write_number(database, 1))
    name = database.memory_safe_url.database
    del database
    gc.collect()
    fresh = sqlite3.connect(f"{name}?vfs=memdb", uri=True)
    assert fresh.execute("select * from sqlite_master").fetchall() == []
    fresh.close()


@pytest.mark.parametrize(
    "url", ["sqlite:///x.db", "sqlite:///file:name?mode=memory&cache=shared&uri=true"]
)
def test_what_other_code_can_open_by_name_is_left_alone(url: str) -> None:
    """Only memory databases without a name are replaced."""
    assert private_memory(make_url(url)) == make_url(url)


async def test_sessions_of_a_memory_database_take_turns() -> None:
    """It has one lock for readers and writers, so they wait for each other instead of failing
    with "database is locked"."""
    database = Database("sqlite://")
    await write_number(database, 0)

    async def increment() -> None:
        async with database.async_engine.begin() as connection:
            n = (await connection.execute(text("select n from t"))).scalar_one()
            await asyncio.sleep(0)
            await connection.execute(text("update t set n = :n"), {"n": n + 1})

    await asyncio.gather(*(increment() for _ in range(20)))
    assert await read_numbers(database) == [20]
    await database.dispose()


# --- writers ----------------------------------------------------------------------------------


def test_no_write_is_lost_and_none_fails(sqlite_url: str) -> None:
    """50 read-modify-writes at once: 20 tasks on each of two event loops in two threads, and
    10 threads with the sync engine."""
    execute(sqlite_url, "create table t (n integer)")
    execute(sqlite_url, "insert into t values (0)")
    database = Database(sqlite_url)
    read, write = text("select n from t"), text("update t set n = :n")

    async def in_task() -> None:
        async with database.async_bind(WRITER).begin() as connection:
            n = (await connection.execute(read)).scalar_one()
            await asyncio.sleep(0.001)  # so that others get at it, if they can
            await connection.execute(write, {"n": n + 1})

    async def tasks() -> None:
        await asyncio.gather(*(in_task() for _ in range(20)))

    def in_thread() -> None:
        with database.sync_bind(WRITER).begin() as connection:
            n = connection.execute(read).scalar_one()
            time.sleep(0.001)
            connection.execute(write, {"n": n + 1})

    errors: list[BaseException] = []

    def run(work: Callable[[], Any]) -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    works = [lambda: asyncio.run(tasks())] * 2 + [in_thread] * 10
    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    database.dispose_sync()
    assert errors == []
    assert numbers(sqlite_url) == [50]


@contextmanager
def other_process_holds_lock(url: str) -> Iterator[Callable[[], None]]:
    """Another process holds the write lock in the block; yields what makes it let go."""
    script = (
        "import sqlite3, sys; c = sqlite3.connect(sys.argv[1], isolation_level=None);"
        "c.execute('BEGIN IMMEDIATE'); print(flush=True); sys.stdin.read(); c.execute('COMMIT')"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, make_url(url).database or ""],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdout.readline()
    try:
        yield process.stdin.close
    finally:
        process.stdin.close()
        process.wait()
        process.stdout.close()


async def test_a_writer_of_another_process_is_waited_for(driver: Driver) -> None:
    """Also by the first connection to a file that is not in WAL mode yet, for which SQLite
    itself does not wait."""
    with other_process_holds_lock(driver.url) as let_go:
        threading.Timer(0.1, let_go).start()
        async with driver.work(WRITER) as work:
            await work.do(statement("insert into t values (1)"))
            assert await work.commit() is None
    assert numbers(driver.url) == [0, 1]


@pytest.mark.parametrize("name", ["aiosqlite", "pysqlite"])
async def test_waiting_for_too_long_is_an_error_that_says_so(sqlite_url: str, name: str) -> None:
    """It is SQLAlchemy's OperationalError in both cases: where writers of this process did not
    finish, naming the time and the file, and where another process did not."""
    execute(sqlite_url, "create table t (n integer)")
    driver = Driver(name, sqlite_url + "?timeout=0.05")
    path = make_url(sqlite_url).database or ""
    async with driver.work(WRITER) as work:  # which switches the file to WAL
        await work.do(statement("select * from t"))
    place = write_queue(path).acquire("somebody", 0)
    async with driver.work(WRITER) as work:
        with pytest.raises(
            OperationalError, match=rf"waited 0\.05 s for .* writers of {path}"
        ) as e:
            await work.do(statement("select * from t"))
        assert isinstance(e.value.orig, sqlite3.OperationalError)
    place.release()
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        async with driver.work(WRITER) as work:
            with pytest.raises(OperationalError, match="database is locked"):
                await work.do(statement("select * from t"))
    assert write_queue(path).holder() is None
    await driver.database.dispose()


def test_a_file_that_stays_locked_while_it_is_switched_to_wal_is_an_error(
    sqlite_url: str,
) -> None:
    """There, too, the waiting has an end; and nobody is told to look for a permission."""
    execute(sqlite_url, "create table t (n integer)")
    database = Database(sqlite_url + "?timeout=0.05")
    with (
        other_process_holds_lock(sqlite_url),
        pytest.raises(DatabaseUnreachableError, match="another process has locked it"),
    ):
        database.engine.connect()


def line(database: Database) -> WriteQueue:
    """The line of writers of its file."""
    return write_queue(os.path.realpath(database.url.database or ""))


@asynccontextmanager
async def waiting(database: Database) -> AsyncIterator[None]:
    """Another task that wants to write; it must have done so when the block is left."""

    async def write() -> None:
        async with database.async_bind(WRITER).begin() as connection:
            await connection.execute(text("insert into t values (1)"))

    before = len(line(database)._line)
    task = asyncio.create_task(write())
    await until(lambda: len(line(database)._line) > before)
    yield
    await asyncio.wait_for(task, 10)
    assert line(database).holder() is None


async def commit(connection: AsyncConnection) -> None:
    await connection.commit()


async def roll_back(connection: AsyncConnection) -> None:
    await connection.rollback()


async def close(connection: AsyncConnection) -> None:
    await connection.close()


async def invalidate(connection: AsyncConnection) -> None:
    await connection.invalidate()


async def lose(connection: AsyncConnection) -> None:
    raw: Any = (await connection.get_raw_connection()).driver_connection
    await raw.close()


@pytest.mark.parametrize("end", [commit, roll_back, close, invalidate, lose])
async def test_the_place_in_the_line_is_given_up_with_the_transaction(
    database: Database, end: Callable[[AsyncConnection], Awaitable[None]]
) -> None:
    """However it ends, the next writer comes in."""
    connection = await database.async_bind(WRITER).connect()
    await connection.execute(text("select * from t"))
    async with waiting(database):
        await end(connection)
    if end is lose:
        await connection.invalidate()
    await connection.close()


async def test_a_closed_connection_holds_no_lock(driver: Driver) -> None:
    """Also while somebody has a cursor of it, as the traceback of a cancelled task does: SQLite
    would keep the connection for that, with its locks."""
    async with driver.work(WRITER) as work:
        await work.do(statement("insert into t values (1), (2)"))
        raw: Any = await work.driver_connection()
        raw = getattr(raw, "_conn", raw)
        cursor = await asyncio.to_thread(raw.execute, "select * from t")
        assert is_locked(driver.url)
        await work.do(Session.invalidate)
        await until(lambda: not is_locked(driver.url))  # aiosqlite's thread closes it
        raw.close()  # as often as one likes
    with pytest.raises(sqlite3.ProgrammingError, match="closed"):
        cursor.fetchone()


def thread_that_outlives(work: Callable[[], Coroutine[Any, Any, None]]) -> threading.Thread | None:
    """That of aiosqlite which is still there when the event loop of `work` is closed."""
    before = set(threading.enumerate())
    asyncio.run(work())
    left = set(threading.enumerate()) - before
    return left.pop() if left else None


def test_a_loop_waits_for_what_a_cancelled_statement_still_tells_it(sqlite_url: str) -> None:
    """Its thread cannot be stopped, and pytest would fail the test for an exception that ends it:
    as when a server stops that has cancelled a request."""
    executing = threading.Event()

    class Slow(sqlite3.Connection):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.create_function("be_slow", 0, self._be_slow)

        def _be_slow(self) -> None:
            executing.set()
            time.sleep(0.3)  # longer than it takes to close the loop

    database = Database(sqlite_url, engine_kwargs={"connect_args": {"factory": Slow}})

    async def execute() -> None:
        async with database.async_engine.connect() as connection:
            await connection.execute(text("select be_slow()"))

    async def cancel() -> None:
        task = asyncio.create_task(execute())
        await until(executing.is_set)
        task.cancel()
        await asyncio.wait((task,))

    assert thread_that_outlives(cancel) is None


def test_a_process_ends_that_has_forgotten_a_connection(sqlite_url: str) -> None:
    """The garbage collector closes it, when no thread can start any more."""
    code = f"""
import asyncio
from repom import Database

database = Database({sqlite_url!r})
kept = []

async def main():
    kept.append(await database.async_engine.connect())

asyncio.run(main())
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=20)
    assert run.returncode == 0


def test_a_connection_thrown_away_may_outlive_its_loop(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If it takes too long to wait for it. Its thread does not tell its end to the closed loop."""
    monkeypatch.setattr(aiosqlite_threads, "LIMIT", 0.1)
    loop_is_closed = threading.Event()

    class Slow(sqlite3.Connection):
        def close(self) -> None:
            loop_is_closed.wait(10)
            super().close()

    database = Database(sqlite_url, engine_kwargs={"connect_args": {"factory": Slow}})

    async def throw_away() -> None:
        async with database.async_engine.connect() as connection:
            await connection.invalidate()

    thread = thread_that_outlives(throw_away)
    loop_is_closed.set()
    assert thread is not None
    thread.join(10)  # pytest fails the test if an exception ends it
    assert not thread.is_alive()


@pytest.mark.parametrize("end", [Connection.commit, Connection.rollback, Connection.close])
async def test_sync_writers_give_their_place_up_too(
    database: Database, end: Callable[[Connection], None]
) -> None:
    """The line has one order for both worlds."""
    connection = await asyncio.to_thread(database.sync_bind(WRITER).connect)
    await asyncio.to_thread(connection.execute, text("select * from t"))
    async with waiting(database):
        await asyncio.to_thread(end, connection)
    await asyncio.to_thread(connection.close)


@pytest.mark.parametrize("world", ["async", "sync"])
async def test_a_forgotten_session_gives_its_place_up(database: Database, world: str) -> None:
    """Collected with an open transaction, it does not block the writers for ever."""
    session: Any
    if world == "async":
        session = database.session_class(database.async_bind(WRITER))
        await session.execute(text("select * from t"))
    else:
        session = Session(database.sync_bind(WRITER))
        await asyncio.to_thread(session.execute, text("select * from t"))
    async with waiting(database):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # SQLAlchemy and aiosqlite say that it was forgotten
            del session
            gc.collect()


async def test_a_forgotten_connection_without_a_pool_gives_its_place_up(
    database: Database,
) -> None:
    """Detached, it is nobody's business but the garbage collector's."""
    connection = await asyncio.to_thread(database.sync_bind(WRITER).connect)
    await asyncio.to_thread(connection.execute, text("select * from t"))
    connection.detach()
    async with waiting(database):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)  # of Python 3.13
            del connection
            gc.collect()


async def test_a_scope_cancelled_while_it_begins_gives_its_place_up(database: Database) -> None:
    """BEGIN is still waiting for another process in the connection's thread when the task is
    cancelled: the lock that it then gets is given back, and so is its place."""
    url = str(database.url)

    async def begin() -> None:
        async with database.async_bind(WRITER).connect() as connection:
            await connection.execute(text("select * from t"))

    await database.ping()  # so that the file is in WAL mode
    with other_process_holds_lock(url) as let_go:
        task = asyncio.create_task(begin())
        await until(lambda: line(database).holder() is not None)
        await asyncio.sleep(0)  # BEGIN is on its way to the thread
        task.cancel()
        let_go()
        with pytest.raises(asyncio.CancelledError):
            await task
    await until(lambda: line(database).holder() is None)  # by the connection's thread
    await write_number(database, 5)
    assert numbers(url) == [0, 5]


async def test_a_waiter_that_is_cancelled_leaves_the_line(database: Database) -> None:
    """The one behind it moves up."""
    connection = await database.async_bind(WRITER).connect()
    await connection.execute(text("select * from t"))
    first = asyncio.create_task(write_number(database, 2))
    await until(lambda: len(line(database)._line) == 2)
    async with waiting(database):
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        await connection.close()
    assert await read_numbers(database) == [0, 1]


@pytest.mark.parametrize("name", ["aiosqlite", "pysqlite"])
async def test_who_waits_in_line_has_no_connection(
    request: pytest.FixtureRequest, name: str
) -> None:
    """However many writers wait, the pool has one for a reader."""
    async with open_driver(request, name) as driver:  # in whose pool there is one
        execute(driver.url, "create table t (n integer not null)")
        database = driver.database

        def write() -> None:
            with sync_session_scope(database) as session:
                session.execute(text("insert into t values (1)"))

        place = line(database).acquire("somebody", 0)
        writing = asyncio.create_task(
            write_number(database, 1) if driver.is_async else asyncio.to_thread(write)
        )
        await until(lambda: len(line(database)._line) == 2)
        async with driver.work(READER) as reader:
            await reader.do(statement("select * from t"))
        place.release()
        await writing
        assert numbers(driver.url) == [1]


@pytest.mark.parametrize("name", ["aiosqlite", "pysqlite"])
async def test_who_gets_no_connection_gives_its_place_up(sqlite_url: str, name: str) -> None:
    """The pool is empty, and stays so for longer than `pool_timeout`."""
    execute(sqlite_url, "create table t (n integer)")
    driver = Driver(name, sqlite_url)
    driver.database.engine_kwargs["pool_timeout"] = 0.05
    async with driver.work(READER) as reader, driver.work(WRITER) as writer:
        await reader.do(statement("select * from t"))
        with pytest.raises(PoolTimeout):
            await writer.do(statement("insert into t values (1)"))
        assert line(driver.database).holder() is None
    await driver.database.dispose()


async def test_dispose_lets_the_writer_that_is_at_work_finish(database: Database) -> None:
    """It gives its place up when it ends."""
    connection = await database.async_bind(WRITER).connect()
    await connection.execute(text("insert into t values (2)"))
    await database.dispose()
    async with waiting(database):
        await connection.commit()
    await connection.close()
    assert await read_numbers(database) == [0, 1, 2]


# --- waiting for oneself ----------------------------------------------------------------------


async def test_a_task_that_would_wait_for_itself_is_told_at_once(database: Database) -> None:
    """It holds the lock and wants it again: no waiting helps."""
    async with database.async_bind(WRITER).connect() as outer:
        await outer.execute(text("select * from t"))
        with pytest.raises(WouldDeadlockError, match="enclosing one holds the write lock"):
            await database.async_bind(WRITER).connect()
        async with database.async_bind(READER).connect() as reader:
            await reader.execute(text("select * from t"))  # readers need no turn


async def test_another_task_may_wait(database: Database) -> None:
    """What this task holds, it can still end while the other one waits."""
    connection = await database.async_bind(WRITER).connect()
    await connection.execute(text("select * from t"))
    async with waiting(database):
        await connection.commit()
    await connection.close()
    assert await read_numbers(database) == [0, 1]


async def test_a_scope_inside_a_scope_of_the_same_task_is_told_at_once(database: Database) -> None:
    """However many scopes are between them; a task of its own may wait."""
    with pytest.raises(WouldDeadlockError):  # noqa: PT012 - it is to leave the scopes
        async with session_scope(database) as outer:
            await outer.execute(text("select * from t"))
            async with session_scope(Database("sqlite://")), session_scope(database) as inner:
                await inner.execute(text("select * from t"))
    assert line(database).holder() is None

    async def child() -> None:
        async with session_scope(database) as session:
            await session.execute(text("insert into t values (1)"))

    async with session_scope(database) as outer:
        await outer.execute(text("select * from t"))
        task = asyncio.create_task(child())
        await until(lambda: len(line(database)._line) == 2)
    await task
    assert await read_numbers(database) == [0, 1]


async def test_a_scope_inside_a_scope_is_told_at_once_though_the_pool_is_empty(
    sqlite_url: str,
) -> None:
    """It does not wait for a connection first: all of them may be in the hands of writers that
    wait for the enclosing scope."""
    execute(sqlite_url, "create table t (n integer)")
    database = Database(sqlite_url, engine_kwargs={"pool_size": 1, "max_overflow": 0})
    async with session_scope(database) as outer:
        await outer.execute(text("select * from t"))
        async with session_scope(database) as inner:
            with pytest.raises(WouldDeadlockError):
                await inner.execute(text("select * from t"))
    await database.dispose()


def test_a_sync_scope_inside_a_scope_is_told_at_once(sqlite_url: str) -> None:
    """The outer one ends after the inner one, in whichever threads they are."""
    execute(sqlite_url, "create table t (n integer)")
    database, other = Database(sqlite_url), Database("sqlite://")
    with sync_session_scope(database) as outer:
        outer.execute(text("select * from t"))
        with sync_session_scope(other), sync_session_scope(database) as inner:  # noqa: SIM117
            with pytest.raises(WouldDeadlockError):
                inner.execute(text("select * from t"))
    with sync_session_scope(database) as session:
        session.execute(text("select * from t"))
    database.dispose_sync()
    other.dispose_sync()


def test_a_sync_scope_of_another_thread_may_wait(sqlite_url: str) -> None:
    """It is enclosed by nothing, so the one that holds the lock can end before it."""
    execute(sqlite_url, "create table t (n integer)")
    database = Database(sqlite_url)

    def write() -> None:
        with sync_session_scope(database) as session:
            session.execute(text("insert into t values (1)"))

    thread = threading.Thread(target=write)
    with sync_session_scope(database) as session:
        session.execute(text("select * from t"))
        thread.start()
        block_until(lambda: len(line(database)._line) == 2)
    thread.join()
    assert numbers(sqlite_url) == [1]
    database.dispose_sync()


async def test_sync_code_that_would_block_the_holders_loop_is_told_at_once(
    database: Database,
) -> None:
    """While it waited, the task that holds the lock could not go on."""
    async with database.async_bind(WRITER).connect() as connection:
        await connection.execute(text("select * from t"))
        with pytest.raises(WouldDeadlockError), database.sync_bind(WRITER).connect() as sync:
            sync.execute(text("select * from t"))
