"""One engine for each event loop, and nothing left of it when the loop has ended."""

import asyncio
import gc
import logging
import threading
import warnings
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import AsyncEngine

from repom.begin import BeginOptions
from repom.database import Database
from repom.loops import _let_transports_close
from tests.dialects.drivers import in_clear
from tests.support.cancelling import CANCELLING, Cancelling, cancelled_at
from tests.support.faultproxy import FaultProxy
from tests.support.polling import block_until, until
from tests.support.reader import connections

RunMain = Callable[[Coroutine[Any, Any, Any]], Any]

DRIVERS = ["asyncpg", "psycopg", "aiomysql", "aiosqlite"]


@pytest.fixture(params=DRIVERS)
def url(request: pytest.FixtureRequest) -> str:
    """The URL of an empty database, with each async driver."""
    kind = {"asyncpg": "postgres", "psycopg": "postgres", "aiomysql": "mysql"}.get(request.param)
    found = make_url(request.getfixturevalue(f"{kind or 'sqlite'}_url"))
    drivername = f"{found.get_backend_name()}+{request.param}"
    return found.set(drivername=drivername).render_as_string(hide_password=False)


@pytest.fixture(params=["asyncio", "uvloop"])
def run_main(request: pytest.FixtureRequest) -> RunMain:
    """`asyncio.run` of either loop."""
    module: Any = pytest.importorskip(request.param)
    run: RunMain = module.run
    return run


@pytest.fixture(params=["asyncio", "uvloop"])
def new_loop(request: pytest.FixtureRequest) -> Callable[[], asyncio.AbstractEventLoop]:
    """`new_event_loop` of either loop."""
    module: Any = pytest.importorskip(request.param)
    make: Callable[[], asyncio.AbstractEventLoop] = module.new_event_loop
    return make


async def use(database: Database) -> AsyncEngine:
    """Open two connections, and put them back into the pool."""
    engine = database.async_engine
    async with engine.connect() as first, engine.connect() as second:
        for connection in (first, second):
            assert (await connection.execute(text("select 1"))).scalar() == 1
    return engine


def open_connections(url: str) -> int:
    """As the server sees it; for SQLite, how many threads aiosqlite has."""
    if not url.startswith("sqlite"):
        return len(connections(url))
    return sum("_connection_worker" in thread.name for thread in threading.enumerate())


def test_one_run_after_the_other_each_leaves_nothing(url: str, run_main: RunMain) -> None:
    """Two `asyncio.run()` of one `Database` never meet the other's loop, and the end of each
    closes its connections, without anybody asking for it."""
    database = Database(url)
    first = run_main(use(database))
    block_until(lambda: open_connections(url) == 0)
    second = run_main(use(database))
    block_until(lambda: open_connections(url) == 0)
    assert first is not second


def test_two_threads_with_loops_at_once(url: str) -> None:
    """Each has connections of its own."""
    database = Database(url)
    together = threading.Barrier(2, timeout=10)
    engines: list[AsyncEngine] = []

    async def main() -> None:
        for _ in range(5):
            together.wait()
            engines.append(await use(database))

    workers = [threading.Thread(target=asyncio.run, args=(main(),)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(engines) == 10
    assert len(set(engines)) == 2
    block_until(lambda: open_connections(url) == 0)


def test_a_loop_that_was_just_closed_is_cleared_up_at_the_next_use(
    url: str,
    new_loop: Callable[[], asyncio.AbstractEventLoop],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Nobody shut its async generators down. The next loop's first use closes its connections,
    says so in one WARNING without the password, and leaves Python nothing to complain about.
    (uvloop complains itself when it is closed.)"""
    database = Database(url)
    loop = new_loop()
    loop.run_until_complete(use(database))
    is_uvloop = type(loop).__module__.startswith("uvloop")
    with warnings.catch_warnings():
        if is_uvloop:
            warnings.simplefilter("ignore", ResourceWarning)
        loop.close()
        with caplog.at_level(logging.WARNING, "repom"), asyncio.Runner() as runner:
            runner.run(use(database))
            if not is_uvloop:  # whose sockets are closed by its own clearing up
                block_until(lambda: open_connections(url) == 2)
        gc.collect()
    [message] = warnings_of_repom(caplog)
    assert message.startswith("2 connection(s) to ")
    assert "asyncio.run()" in message
    block_until(lambda: open_connections(url) == 0)


def test_a_session_that_survived_its_loop_is_cleared_up_at_the_next_use(
    url: str, run_main: RunMain, caplog: pytest.LogCaptureFixture
) -> None:
    """Never closed, and still held by somebody: on SQLite its transaction would lock everybody
    else out, and on a server it would stay open."""
    database = Database(url)

    async def leave_open() -> list[Any]:
        session = database.session_class(database.async_bind(BeginOptions("IMMEDIATE")))
        await session.execute(text("select 1"))
        return [session]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # asyncio, uvloop and SQLAlchemy find fault with it, too
        left = run_main(leave_open())

        async def write() -> None:
            async with database.async_bind(BeginOptions("IMMEDIATE")).begin() as connection:
                await connection.execute(text("create table t (n integer)"))
            block_until(lambda: open_connections(url) == 1)

        with caplog.at_level(logging.WARNING, "repom"):
            run_main(write())
        assert [message[:15] for message in warnings_of_repom(caplog)] == ["1 connection(s)"]
        left.clear()
        gc.collect()
    block_until(lambda: open_connections(url) == 0)


def warnings_of_repom(caplog: pytest.LogCaptureFixture) -> list[str]:
    """asyncio's debug mode logs what is slow, too."""
    return [record.getMessage() for record in caplog.records if record.name == "repom"]


def test_a_closed_loop_that_left_no_connection_is_not_worth_a_word(
    sqlite_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It has only asked for the engine."""
    database = Database(sqlite_url)

    async def ask() -> AsyncEngine:
        return database.async_engine

    loop = asyncio.new_event_loop()
    loop.run_until_complete(ask())
    loop.close()
    asyncio.run(use(database))
    assert warnings_of_repom(caplog) == []


def test_tasks_of_a_closed_loop_are_left_alone() -> None:
    """One that was waiting for its connection must not be woken when that is closed on another
    loop, where it could do anything."""
    loop = asyncio.new_event_loop()
    answer = loop.create_future()
    went_on = []

    async def query() -> None:
        went_on.append(await answer)

    task = loop.create_task(query())
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    _let_transports_close(loop)
    answer.set_result("lost")
    assert went_on == []
    # The rest is about this test: let the task go without a complaint.
    task._log_destroy_pending = False  # type: ignore[attr-defined]
    coroutine: Any = task.get_coro()
    coroutine.close()


async def test_after_dispose_the_next_use_opens_new_connections(url: str) -> None:
    """`dispose()` closes what there is, twice if asked to, and ends nothing for good."""
    database = Database(url)
    first = await use(database)
    await database.dispose()
    await database.dispose()
    block_until(lambda: open_connections(url) == 0)
    assert await use(database) is not first
    await database.dispose()
    block_until(lambda: open_connections(url) == 0)


@pytest.mark.parametrize("how", CANCELLING)
async def test_dispose_cancelled_at_any_await_closes_all_the_same(
    url: str, how: Cancelling
) -> None:
    """Nobody could find what it had left open; and aiosqlite's threads keep a process alive."""
    database = Database(url)
    for number in range(1, 20):
        await use(database)
        was_cancelled = await cancelled_at(number, how, database.dispose())
        await until(lambda: open_connections(url) == 0)
        if not was_cancelled:  # those of psycopg and aiomysql are closed without any await
            break
    assert number < 19


async def test_dispose_does_not_wait_for_ever(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A server that hangs does not answer asyncpg's good-bye; what is left is cut off."""
    monkeypatch.setattr("repom.loops.CLOSE_TIMEOUT", 0.1)
    async with FaultProxy(postgres_url) as proxy:
        database = Database(in_clear("asyncpg", proxy.url))
        await use(database)
        proxy.stall(b"X\0\0\0\4", "before")
        async with asyncio.timeout(10):
            await database.dispose()
        assert proxy.struck.is_set()
        await until(lambda: len(connections(postgres_url)) == 1)  # the proxy's, which hangs
    block_until(lambda: open_connections(postgres_url) == 0)
    (message,) = [record.getMessage() for record in caplog.records if record.name == "repom"]
    assert "connection(s) to postgresql+asyncpg://" in message
    assert "did not close within 0.1 s" in message


async def test_a_connection_in_use_is_closed_when_it_comes_back(url: str) -> None:
    """`dispose()` lets it finish; SQLAlchemy alone would then keep it open for ever."""
    database = Database(url)
    engine = database.async_engine
    async with engine.connect() as connection:
        await connection.execute(text("select 1"))
        await database.dispose()
        assert (await connection.execute(text("select 1"))).scalar() == 1
    block_until(lambda: open_connections(url) == 0)
    async with engine.connect() as connection:  # by somebody who has kept the engine
        await connection.execute(text("select 1"))
    block_until(lambda: open_connections(url) == 0)


async def test_retire_closes_what_nobody_uses(url: str) -> None:
    """`retire()` leaves an engine alone while a connection of it is out, and closes it after that.
    The next use opens new connections."""
    database = Database(url)
    engine = await use(database)
    async with engine.connect() as connection:
        database.retire()
        assert not database.is_idle
        assert database.async_engine is engine
        assert (await connection.execute(text("select 1"))).scalar() == 1
    assert database.is_idle
    database.retire()
    assert database.async_engine is not engine
    await until(lambda: open_connections(url) == 0)
    await use(database)
    await database.dispose()


def test_retire_from_another_thread(url: str) -> None:
    """A loop closes its own connections, unless one was taken before it has come to it."""
    database = Database(url)

    def retire() -> None:
        thread = threading.Thread(target=database.retire)
        thread.start()
        thread.join()

    async def main() -> None:
        engine = await use(database)
        retire()
        async with engine.connect() as connection:
            await connection.execute(text("select 1"))
            assert database.async_engine is engine
        retire()
        await until(lambda: open_connections(url) == 0)
        assert database.async_engine is not engine

    asyncio.run(main())


def test_an_unfinished_async_generator_does_not_keep_its_connection(url: str) -> None:
    """The end of `asyncio.run()` closes generators at the same time as it disposes."""
    database = Database(url)

    async def numbers() -> AsyncGenerator[int, None]:
        async with database.async_engine.connect() as connection:
            for n in (1, 2):
                await connection.execute(text("select 1"))
                yield n

    kept = []

    async def main() -> None:
        generator = numbers()
        kept.append(generator)
        assert await anext(generator) == 1

    asyncio.run(main())
    block_until(lambda: open_connections(url) == 0)


def test_outside_a_loop_there_is_no_async_engine(sqlite_url: str) -> None:
    """asyncio's own error says so."""
    with pytest.raises(RuntimeError, match="no running event loop"):
        _ = Database(sqlite_url).async_engine


async def test_one_loop_has_one_engine(sqlite_url: str) -> None:
    """Whoever asks, and from whichever task."""
    database = Database(sqlite_url)

    async def ask() -> AsyncEngine:
        return database.async_engine

    assert await asyncio.create_task(ask()) is database.async_engine
    async with aclosing(_engines(database)) as engines:
        async for engine in engines:
            assert engine is database.async_engine
    await database.dispose()


async def _engines(database: Database) -> AsyncGenerator[AsyncEngine, None]:
    yield database.async_engine
