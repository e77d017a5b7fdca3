import threading
from collections.abc import Iterator

import anyio
import anyio.to_thread
import pytest
from sqlalchemy import Engine

from repom import Database
from repom.lending import place_lent
from tests.support.polling import until


@pytest.fixture
def engine(sqlite_url: str) -> Iterator[Engine]:
    """An engine with a pool of one connection."""
    database = Database(sqlite_url, engine_kwargs={"pool_size": 1, "max_overflow": 0})
    yield database.engine
    database.dispose_sync()


def places() -> float:
    """How many threads may run now."""
    return anyio.to_thread.current_default_thread_limiter().total_tokens


async def test_thread_that_waits_lends_its_place() -> None:
    """One more thread may run meanwhile, and not afterwards."""
    before, inside, leave = places(), threading.Event(), threading.Event()

    def wait() -> None:
        with place_lent():
            inside.set()
            leave.wait()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(anyio.to_thread.run_sync, wait)
        await until(inside.is_set)
        assert places() == before + 1
        leave.set()
    await until(lambda: places() == before)


async def test_failure_gives_the_place_back() -> None:
    before = places()

    def fail() -> None:
        with place_lent():
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await anyio.to_thread.run_sync(fail)
    await until(lambda: places() == before)


def test_other_threads_have_no_place_to_lend() -> None:
    with place_lent():
        pass


async def test_only_who_waits_for_the_pool_lends(engine: Engine) -> None:
    """A connection that is free costs no turn of the event loop."""
    limiter = anyio.to_thread.current_default_thread_limiter()
    before = limiter.total_tokens

    def connect() -> float:
        with engine.connect():
            return limiter.total_tokens

    assert await anyio.to_thread.run_sync(connect) == before
    held = engine.connect()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(anyio.to_thread.run_sync, connect)
        await until(lambda: limiter.total_tokens == before + 1)
        held.close()
    await until(lambda: limiter.total_tokens == before)
