"""The async pool: who waits for a connection gets one that comes back."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from repom import Database
from repom.awaited_pool import AwaitedQueuePool
from tests.support.polling import until


class Watched:
    """An engine whose pool keeps one connection of three, and what it opens and closes."""

    def __init__(self, engine: AsyncEngine) -> None:
        self.engine = engine
        self.opened = self.closed = 0
        event.listen(engine.sync_engine, "connect", self._opens)
        event.listen(engine.sync_engine, "close", self._closes)

    def _opens(self, *_: Any) -> None:
        self.opened += 1

    def _closes(self, *_: Any) -> None:
        self.closed += 1

    @property
    def pool(self) -> AwaitedQueuePool:
        pool = self.engine.pool
        assert isinstance(pool, AwaitedQueuePool)
        return pool

    @property
    def waiting(self) -> int:
        """How many wait for a connection."""
        queue: asyncio.Queue[Any] = self.pool._queue
        return len(queue._getters)  # type: ignore[attr-defined]  # asyncio's own, not our count

    async def connections(self, number: int) -> list[AsyncConnection]:
        return [await self.engine.connect() for _ in range(number)]


Watch = Callable[..., Awaitable[Watched]]


@pytest.fixture
async def watch(sqlite_url: str) -> AsyncIterator[Watch]:
    """Makes such an engine, with other options of the pool if they are given."""
    made: list[Database] = []

    async def watch(**options: Any) -> Watched:
        # Without a ROLLBACK to wait for, what is closed together comes back together.
        usual = {
            "pool_size": 1,
            "max_overflow": 2,
            "pool_timeout": 30,
            "pool_reset_on_return": None,
        }
        kwargs = {**usual, **options}
        made.append(Database(sqlite_url, engine_kwargs=kwargs))
        return Watched(made[-1].async_engine)

    yield watch
    for database in made:
        await database.dispose()


async def close_together(connections: list[AsyncConnection]) -> None:
    """Give them back in the same turn of the event loop."""
    await asyncio.gather(*(connection.close() for connection in connections))


async def test_who_waits_gets_a_connection_that_comes_back(watch: Watch) -> None:
    """Though the pool keeps only one, and all three come back before anybody has taken one."""
    watched = await watch()
    held = await watched.connections(3)
    waiting = [asyncio.create_task(watched.connections(1)) for _ in range(3)]
    await until(lambda: watched.waiting == 3)

    await close_together(held)
    got = [connection for each in await asyncio.gather(*waiting) for connection in each]

    assert (watched.opened, watched.closed) == (3, 0)
    await close_together(got)


async def test_what_nobody_waits_for_is_closed_beyond_the_size_of_the_pool(watch: Watch) -> None:
    """As SQLAlchemy's pool does it, also when somebody has waited before."""
    watched = await watch()
    held = await watched.connections(3)
    waiting = asyncio.create_task(watched.connections(1))
    await until(lambda: watched.waiting == 1)

    await close_together(held)
    await close_together(await waiting)

    assert (watched.opened, watched.closed) == (3, 2)
    assert watched.pool.checkedin() == 1
    assert watched.pool.checkedout() == 0


@pytest.mark.parametrize("how", ["cancelled", "timed out"])
async def test_who_has_given_up_waits_no_more(watch: Watch, how: str) -> None:
    """Nothing is kept for somebody who was cancelled, or has waited for too long."""
    watched = await watch(pool_timeout=30 if how == "cancelled" else 0.05)
    held = await watched.connections(3)
    waiting = asyncio.create_task(watched.connections(1))
    await until(lambda: watched.waiting == 1)
    if how == "cancelled":
        waiting.cancel()
    await asyncio.wait((waiting,))
    assert waiting.cancelled() or waiting.exception() is not None

    await close_together(held)

    assert (watched.pool.checkedin(), watched.closed) == (1, 2)


async def test_who_begins_to_wait_while_one_is_closed_opens_another(watch: Watch) -> None:
    """Its place is free only when it is closed, which takes a while."""
    watched = await watch(max_overflow=1)
    late: list[asyncio.Task[list[AsyncConnection]]] = []

    def ask(*_: object) -> None:  # one takes what is in the pool, and the other has to wait
        late.extend(asyncio.create_task(watched.connections(1)) for _ in range(2))

    event.listen(watched.pool, "close", ask, once=True)
    await close_together(await watched.connections(2))

    async with asyncio.timeout(10):  # and not the 30 s of the pool
        got = [connection for task in late for connection in await task]
    assert (watched.opened, watched.closed, watched.pool.checkedout()) == (3, 1, 2)
    await close_together(got)


async def test_those_who_give_up_at_the_last_moment_leave_nothing_behind(watch: Watch) -> None:
    """In the same turn in which connections come back for them."""
    watched = await watch()
    held = await watched.connections(3)
    waiting = [asyncio.create_task(watched.connections(1)) for _ in range(3)]
    await until(lambda: watched.waiting == 3)

    def cancel(*_: object) -> None:
        if watched.pool.checkedin() == 2:  # and here comes the third
            for task in waiting:
                task.cancel()

    event.listen(watched.pool, "checkin", cancel)
    await close_together(held)
    await asyncio.wait(waiting)

    assert all(task.cancelled() for task in waiting)
    assert (watched.pool.checkedin(), watched.pool.checkedout(), watched.closed) == (1, 0, 2)


@pytest.mark.parametrize(("use_lifo", "comes_out"), [(False, 0), (True, 1)])
async def test_the_order_is_that_of_the_option(
    watch: Watch, use_lifo: bool, comes_out: int
) -> None:
    """`pool_use_lifo`: the connection that came back last, or first."""
    watched = await watch(pool_size=2, pool_use_lifo=use_lifo)
    held = await watched.connections(2)
    drivers = [(await connection.get_raw_connection()).driver_connection for connection in held]
    for connection in held:
        await connection.close()

    (taken,) = await watched.connections(1)

    assert (await taken.get_raw_connection()).driver_connection is drivers[comes_out]
    await taken.close()


async def test_a_pool_without_a_size_keeps_all(watch: Watch) -> None:
    """`pool_size=0` is SQLAlchemy's word for no limit."""
    watched = await watch(pool_size=0)

    await close_together(await watched.connections(4))

    assert (watched.pool.checkedin(), watched.closed) == (4, 0)
