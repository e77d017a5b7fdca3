"""Many databases, of which few are connected to at a time."""

import asyncio
import gc
import random
import threading
import weakref
from contextlib import AsyncExitStack

import pytest
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from repom import Database, DatabaseCache, session_scope, sync_session_scope
from repom.errors import ConfigurationError
from tests.support.polling import block_until, until
from tests.support.tenants import NAMES, connected, texts

WRITE = text("INSERT INTO note VALUES (:text)")
READ = text("SELECT DISTINCT text FROM note")


@pytest.fixture
def cache(tenant_urls: dict[str, str]) -> DatabaseCache:
    return DatabaseCache(tenant_urls.__getitem__, max_open=2)


async def use(database: Database) -> None:
    async with session_scope(database) as session:
        await session.execute(text("SELECT 1"))


def use_sync(database: Database) -> None:
    with sync_session_scope(database) as session:
        session.execute(text("SELECT 1"))


def opened(cache: DatabaseCache) -> list[str]:
    """The tenants whose databases are open, by their letters."""
    names = {cache[name]: name for name in NAMES}
    return [names[database] for database in cache.open]


# --- which are closed


async def test_the_least_recently_used_is_closed(
    cache: DatabaseCache, tenant_urls: dict[str, str]
) -> None:
    """One too many, and the pool of the one that was used longest ago is closed."""
    kept = [cache[name] for name in NAMES]
    for name, expected in [("a", "a"), ("b", "ab"), ("a", "ba"), ("c", "ac"), ("d", "cd")]:
        await use(cache[name])
        assert opened(cache) == list(expected)
    await until(lambda: connected(tenant_urls.values()) == 2)
    await use(kept[0])
    assert opened(cache) == ["d", "a"], "it is used again like any other"
    await cache.dispose()
    await until(lambda: connected(tenant_urls.values()) == 0)


async def test_what_is_in_use_is_not_closed(
    cache: DatabaseCache, tenant_urls: dict[str, str]
) -> None:
    """However long ago it was used: it counts, and is closed when it is one too many after that."""
    async with AsyncExitStack() as stack:
        sessions = {}
        for name in "abc":
            await use(cache[name])
            sessions[name] = await stack.enter_async_context(session_scope(cache[name]))
            await sessions[name].execute(WRITE, {"text": name})
        for name in "dede":
            await use(cache[name])
        assert opened(cache) == ["a", "b", "c", "e"]
        for name, session in sessions.items():
            assert (await session.scalars(READ)).all() == [name]
    assert opened(cache) == ["b", "a"], "in the order in which they were left: c, b, a"
    assert [texts(tenant_urls[name]) for name in "abc"] == [["a"], ["b"], ["c"]]
    await until(lambda: connected(tenant_urls.values()) == 2)
    await cache.dispose()


async def test_a_session_that_has_not_begun(
    cache: DatabaseCache, tenant_urls: dict[str, str]
) -> None:
    """It finds its pool closed, connects all the same, and leaves no connection there."""
    await use(cache["a"])
    async with session_scope(cache["a"]) as session:
        for name in "bc":
            await use(cache[name])
        await until(lambda: connected(tenant_urls.values()) == 2)
        await session.execute(WRITE, {"text": "late"})
        engine = session.get_bind()  # or the garbage collector would close what is left in it
    assert texts(tenant_urls["a"]) == ["late"]
    await until(lambda: connected(tenant_urls.values()) <= 2)
    await cache.dispose()
    await until(lambda: connected(tenant_urls.values()) == 0)
    del engine


async def test_many_at_once(cache: DatabaseCache, tenant_urls: dict[str, str]) -> None:
    """200 units of work of five tenants, 20 at a time, some of which fail or are cancelled: each
    is in the right database, and no more pools are open than two and those in use."""
    chance, limit = random.Random(7), asyncio.Semaphore(20)
    in_use: dict[str, int] = dict.fromkeys(NAMES, 0)
    most, expected = 0, dict.fromkeys(NAMES, 0)

    async def work(number: int) -> None:
        nonlocal most
        name, way = chance.choice(NAMES), chance.choice(["commit"] * 3 + ["raise", "fail"])
        async with limit:
            in_use[name] += 1
            try:
                async with session_scope(cache[name]) as session:
                    await session.execute(WRITE, {"text": name})
                    assert (await session.scalars(READ)).all() == [name]
                    if way == "fail":
                        await session.execute(text("SELECT nonsense"))
                    if way == "raise":
                        raise LookupError
            finally:
                in_use[name] -= 1
                used = sum(map(bool, in_use.values()))
                most = max(most, len(cache.open))
                assert len(cache.open) <= cache.max_open + used
        expected[name] += 1

    tasks = [asyncio.create_task(work(number)) for number in range(200)]
    for task in tasks[::10]:
        asyncio.get_running_loop().call_later(chance.random() / 10, task.cancel)
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    wrong = (AssertionError, MemoryError)
    assert not [each for each in outcomes if isinstance(each, wrong)]
    kinds = {type(each) for each in outcomes}
    assert {type(None), LookupError} <= kinds
    assert any(issubclass(kind, SQLAlchemyError) for kind in kinds)
    found = {name: texts(tenant_urls[name]) for name in NAMES}
    assert all(set(found[name]) == {name} for name in NAMES)
    assert all(len(found[name]) >= expected[name] for name in NAMES)
    # What is cancelled in its COMMIT is committed all the same.
    more = sum(map(len, found.values())) - sum(expected.values())
    assert more <= sum(isinstance(each, asyncio.CancelledError) for each in outcomes)
    assert most > 2, "or this test shows nothing"
    assert len(cache.open) == 2
    if not tenant_urls["a"].startswith("sqlite"):
        await until(lambda: connected(tenant_urls.values()) == 2)
    await cache.dispose()
    await until(lambda: connected(tenant_urls.values()) == 0)


@pytest.mark.parametrize("tenant_urls", ["postgresql"], indirect=True)
async def test_units_of_work_that_only_read(
    cache: DatabaseCache, tenant_urls: dict[str, str]
) -> None:
    """Their pools are those of the same database: closed with them, and in use with them."""
    async with AsyncExitStack() as stack:
        reading = await stack.enter_async_context(session_scope(cache["a"], read_only=True))
        await reading.execute(READ)
        for name in "abcd":
            await use(cache[name])
        assert opened(cache) == ["a", "d"]
        await reading.execute(READ)
    for name in "bc":
        async with session_scope(cache[name], read_only=True) as session:
            await session.execute(READ)
    assert opened(cache) == ["b", "c"]
    await until(lambda: connected(tenant_urls.values()) == 2)
    with sync_session_scope(cache["a"], read_only=True) as sync_session:
        sync_session.execute(READ)
    assert opened(cache) == ["c", "a"]
    await use(cache["b"])
    await use(cache["c"])
    await until(lambda: connected(tenant_urls.values()) == 2)
    await cache.dispose()


@pytest.mark.parametrize("tenant_urls", ["postgresql"], indirect=True)
async def test_databases_with_readers(tenant_urls: dict[str, str]) -> None:
    """The pools of the readers are those of the same database as well."""

    def make(name: str) -> Database:
        return Database(tenant_urls[name], readers=[tenant_urls[name]])

    cache = DatabaseCache(make, max_open=1)
    kept = [cache[name] for name in NAMES]
    for name in "abcdeabcde":  # the second time the readers need not be asked how they are
        async with session_scope(cache[name], read_only=True) as session:
            await session.execute(READ)
        assert opened(cache) == [name]
    await until(lambda: connected(tenant_urls.values()) == 1)
    async with session_scope(cache["e"], read_only=True) as session:
        await session.execute(READ)
        for name in "abc":
            await use(cache[name])
        assert opened(cache) == ["e", "c"]
    await cache.dispose()
    assert len(kept) == len(NAMES)


# --- sync code, and other loops


@pytest.mark.parametrize("tenant_urls", ["postgresql"], indirect=True)
def test_sync_sessions(cache: DatabaseCache, tenant_urls: dict[str, str]) -> None:
    """Pools of sync sessions are closed, too; the server tells."""
    for name in NAMES:
        use_sync(cache[name])
    assert opened(cache) == ["d", "e"]
    block_until(lambda: connected(tenant_urls.values()) == 2)
    cache.dispose_sync()
    assert opened(cache) == []


def test_other_event_loops(cache: DatabaseCache, tenant_urls: dict[str, str]) -> None:
    """What one loop uses makes way for what another one uses, each closing its own connections."""
    ready, done = threading.Event(), threading.Event()

    async def elsewhere() -> None:
        for name in "ab":
            await use(cache[name])
        ready.set()
        await until(done.is_set)
        await until(lambda: connected(tenant_urls.values()) == 2)  # both of the other loop
        await cache.dispose()

    async def here() -> None:
        assert await asyncio.to_thread(ready.wait, 10)
        for name in "cd":
            await use(cache[name])
        assert opened(cache) == ["c", "d"]
        done.set()
        await asyncio.to_thread(thread.join)
        await cache.dispose()

    thread = threading.Thread(target=lambda: asyncio.run(elsewhere()))
    thread.start()
    asyncio.run(here())
    block_until(lambda: connected(tenant_urls.values()) == 0)


async def test_dispose_waits_for_what_is_being_closed(
    cache: DatabaseCache, tenant_urls: dict[str, str]
) -> None:
    """When it has returned, no connection is left, and no task."""
    for name in NAMES:
        await use(cache[name])
    tasks = asyncio.all_tasks()
    assert len(tasks) > 1
    await cache.dispose()
    assert asyncio.all_tasks() == {asyncio.current_task()}
    await until(lambda: connected(tenant_urls.values()) == 0)


def test_a_loop_that_ends_closes_what_it_has_not_come_to(
    cache: DatabaseCache, tenant_urls: dict[str, str]
) -> None:
    """The run ends in the same turn of the loop in which a pool is given up."""

    async def main() -> None:
        for name in NAMES:
            await use(cache[name])

    asyncio.run(main())
    block_until(lambda: connected(tenant_urls.values()) == 0)


# --- what a key stands for


def test_a_key_is_one_object_while_somebody_has_it(sqlite_url: str) -> None:
    """Then it is made anew: a key that nobody uses costs nothing."""
    made: list[str] = []

    def make(key: str) -> str:
        made.append(key)
        return sqlite_url

    cache = DatabaseCache(make, max_open=1)
    database = cache["a"]
    assert cache["a"] is database
    use_sync(database)
    gone = weakref.ref(database)
    del database
    gc.collect()
    assert cache["a"] is gone(), "it is open"
    cache.dispose_sync()
    gc.collect()
    assert gone() is None
    assert repr(cache["a"]) == f"<Database {sqlite_url}>"
    assert made == ["a", "a"]
    assert repr(cache) == "<DatabaseCache of 0 open databases, at most 1>"


def test_two_keys_of_one_database(sqlite_url: str) -> None:
    """Tenants may share one, as they do on a shard."""
    shard = Database(sqlite_url)
    cache = DatabaseCache(lambda key: shard, max_open=1)
    assert cache["a"] is cache["b"] is shard
    use_sync(shard)
    assert cache.open == [shard]
    cache.dispose_sync()


def test_a_key_that_there_is_not() -> None:
    """What `make` raises is not remembered."""
    known: dict[str, str] = {}
    cache = DatabaseCache(known.__getitem__, max_open=1)
    with pytest.raises(KeyError):
        cache["a"]
    known["a"] = "sqlite://"
    assert isinstance(cache["a"], Database)


def test_what_is_no_database() -> None:
    """The error names the key."""
    cache = DatabaseCache(lambda key: 17, max_open=1)  # type: ignore[arg-type,return-value]
    with pytest.raises(ConfigurationError, match="the database 'a' is a int"):
        cache["a"]


def test_one_database_in_two_caches() -> None:
    """Each would close what the other one counts as open."""
    shard = Database("sqlite://")
    one, other = (DatabaseCache(lambda key: shard, max_open=1) for _ in range(2))
    assert one["a"] is shard
    with pytest.raises(ConfigurationError, match="in another DatabaseCache already"):
        other["a"]


def test_room_for_none() -> None:
    with pytest.raises(ValueError, match="max_open=0: at least 1"):
        DatabaseCache(str, max_open=0)


def test_threads_that_ask_at_once_get_one_object(sqlite_url: str) -> None:
    """Though several may make one."""
    barrier = threading.Barrier(8)

    def make(key: str) -> str:
        barrier.wait(10)
        return sqlite_url

    cache = DatabaseCache(make, max_open=1)
    found: list[Database] = []
    threads = [threading.Thread(target=lambda: found.append(cache["a"])) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1
