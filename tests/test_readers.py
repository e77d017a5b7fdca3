"""Which reader is chosen, by what is known of it, and what is asked for that.

Here the server of the tests is its own reader, which has everything at once. Real replicas, that
are late and that fail: tests/cluster/test_readers.py.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import pytest
from sqlalchemy import Connection, make_url, text
from sqlalchemy.orm import Session

from repom import Database, atomic, current_scope, session_scope, sync_session_scope
from repom.errors import ReadOnlyError, TransactionError
from repom.own_writes import OwnWrites, own_writes
from repom.reader import CHECK_EVERY, Reader
from tests.support.faultproxy import FaultProxy
from tests.support.polling import block_until
from tests.support.reader import execute, open_transactions, rows
from tests.support.sockets import free_port

READ_BY = "SELECT current_setting('application_name')"


def named(url: str, name: str) -> str:
    """The URL, by which the server calls its connections so."""
    found = make_url(url).update_query_dict({"application_name": name})
    return found.render_as_string(hide_password=False)


def with_readers(url: str, count: int = 2, **kwargs: Any) -> Database:
    readers = [named(url, f"reader {number}") for number in range(count)]
    return Database(named(url, "writer"), readers=readers, **kwargs)


def reader_of(database: Database, number: int = 0) -> Reader:
    assert database.readers is not None
    return database.readers.all[number]


def in_flight(database: Database) -> list[int]:
    assert database.readers is not None
    return [reader.in_flight for reader in database.readers.all]


@pytest.fixture
async def database(postgres_url: str) -> AsyncIterator[Database]:
    """One with two readers."""
    execute(postgres_url, "CREATE TABLE item (id INTEGER PRIMARY KEY)")
    database = with_readers(postgres_url)
    yield database
    await database.dispose()


async def read_by(database: Database, **options: Any) -> str:
    """Who answers in a unit of work that only reads."""
    options = {"read_only": True, **options}
    async with session_scope(database, **options) as session:
        return str(await session.scalar(text(READ_BY)))


# --- which one


async def test_what_only_reads_goes_to_readers(database: Database) -> None:
    """In turns, where they have the same load; what may write goes to the writer."""
    found = [await read_by(database) for _ in range(4)]
    assert found == ["reader 0", "reader 1", "reader 0", "reader 1"]
    assert await read_by(database, read_only="snapshot") == "reader 0"
    assert await read_by(database, read_only=False) == "writer"


def test_sync_sessions(postgres_url: str) -> None:
    """They are routed alike."""
    database = with_readers(postgres_url)
    found = []
    for _ in range(3):
        with sync_session_scope(database, read_only=True) as session:
            found.append(session.scalar(text(READ_BY)))
    assert found == ["reader 0", "reader 1", "reader 0"]
    database.dispose_sync()


async def test_the_one_with_the_least_in_flight(database: Database) -> None:
    """Counted from the first statement to the end of the unit of work, whatever that is."""
    async with session_scope(database, read_only=True) as one:
        assert in_flight(database) == [0, 0]
        await one.execute(text("SELECT 1"))
        assert in_flight(database) == [1, 0]
        assert [await read_by(database) for _ in range(3)] == ["reader 1"] * 3
        await one.rollback()
        assert in_flight(database) == [0, 0]
        await one.execute(text("SELECT 1"))
    with pytest.raises(ReadOnlyError):
        async with session_scope(database, read_only=True) as session:
            await session.execute(text("INSERT INTO item VALUES (1)"))
    with suppress(ZeroDivisionError):
        async with session_scope(database, read_only=True) as session:
            await session.execute(text("SELECT 1"))
            raise ZeroDivisionError
    assert in_flight(database) == [0, 0]


async def test_one_unit_of_work_has_one_reader(database: Database) -> None:
    """From its first statement to its last, in blocks too."""
    async with session_scope(database, read_only=True) as session:
        async with atomic():
            found = {str(await session.scalar(text(READ_BY)))}
        found |= {str(await session.scalar(text(READ_BY))) for _ in range(3)}
        await current_scope().commit()
        assert len(found) == 1
        # What comes after it is another transaction.
        assert await session.scalar(text(READ_BY)) not in found


async def test_nobody_reads_from_what_is_not_known(database: Database) -> None:
    """While the first one asks the readers, the others do not wait for that."""
    first, second = await asyncio.gather(read_by(database), read_by(database))
    assert {first, second} == {"reader 0", "writer"}
    later = time.monotonic() + 3 * CHECK_EVERY
    assert not any(reader_of(database, number).is_usable(later) for number in (0, 1))


async def test_how_often_readers_are_asked(postgres_url: str) -> None:
    """Once in a while; between, a SELECT is one round trip."""
    clear = make_url(postgres_url).update_query_dict({"sslmode": "disable"})
    async with FaultProxy(clear.render_as_string(hide_password=False)) as proxy:
        database = Database(postgres_url, readers=[proxy.url])
        for _ in range(3):
            await read_by(database)
        before = proxy.round_trips
        reader_of(database).next_check = float("inf")
        for _ in range(5):
            assert await read_by(database) is not None
        assert proxy.round_trips - before == 5
        await database.dispose()


async def test_an_on_begin_that_fails(postgres_url: str) -> None:
    """The transaction stays where it has begun: nothing is executed elsewhere, without what
    `on_begin` was to set."""
    calls = []

    def on_begin(connection: Connection) -> None:
        calls.append(connection.scalar(text(READ_BY)))
        if len(calls) == 1:
            raise LookupError

    database = with_readers(postgres_url, on_begin=on_begin)
    async with session_scope(database, read_only=True) as session:
        with pytest.raises(LookupError):
            await session.execute(text("SELECT 1"))
        with pytest.raises(TransactionError):
            await session.execute(text("SELECT 1"))
        await session.rollback()
        assert await session.scalar(text(READ_BY)) == "reader 1"
    assert calls == ["reader 0", "reader 1"]
    assert in_flight(database) == [0, 0]
    await database.dispose()


# --- readers that are not fit


async def test_a_reader_that_is_down(postgres_url: str, caplog: pytest.LogCaptureFixture) -> None:
    """It is left out, which is said once; the writer serves where there is no other."""
    nowhere = f"postgresql://u:secret@127.0.0.1:{free_port()}/nowhere"
    database = Database(named(postgres_url, "writer"), readers=[nowhere])
    with caplog.at_level(logging.INFO, "repom"):
        found = [await read_by(database) for _ in range(3)]
        reader_of(database).next_check = 0
        await read_by(database)
    assert found == ["writer"] * 3
    (record,) = caplog.records
    assert "is not read from until it recovers" in record.message
    assert "secret" not in record.message
    await database.dispose()


async def test_a_reader_that_goes_down_and_comes_back(
    postgres_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Who cannot connect to it reads elsewhere; when its time has come, it is asked again."""
    clear = make_url(named(postgres_url, "reader")).update_query_dict({"sslmode": "disable"})
    async with FaultProxy(clear.render_as_string(hide_password=False)) as proxy:
        database = Database(
            named(postgres_url, "writer"), readers=[proxy.url, named(postgres_url, "other")]
        )
        await read_by(database)
        reader = reader_of(database)
        reader.next_check = float("inf")  # not found out by asking
        await reader.database.dispose()
        proxy.refuses = True
        reader.turn = 0  # now it is
        assert await read_by(database) == "other"
        assert not reader.is_fit
        assert [await read_by(database) for _ in range(3)] == ["other"] * 3
        proxy.refuses = False
        reader.next_check = 0
        assert {await read_by(database) for _ in range(2)} == {"reader", "other"}
        assert in_flight(database) == [0, 0]
        await database.dispose()


async def test_a_reader_that_does_not_answer(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever asks it waits for a limited time."""
    monkeypatch.setattr("repom.replication.ANSWER_WITHIN", 0.2)
    clear = make_url(postgres_url).update_query_dict({"sslmode": "disable"})
    async with FaultProxy(clear.render_as_string(hide_password=False)) as proxy:
        database = Database(named(postgres_url, "writer"), readers=[proxy.url])
        proxy.stall(b"pg_is_in_recovery", "before")
        async with asyncio.timeout(5):
            assert await read_by(database) == "writer"
        await database.dispose()


# --- own writes


async def test_what_was_written_in_this_task(database: Database) -> None:
    """Until its position is known, only the writer will do; other tasks are not concerned."""
    await read_by(database)

    async def write() -> str:
        async with session_scope(database) as session:
            await session.execute(text("INSERT INTO item VALUES (1)"))
        return await read_by(database)

    assert await asyncio.create_task(write()) == "writer"
    assert await read_by(database) != "writer"


async def test_what_was_rolled_back(database: Database) -> None:
    """It concerns nobody, and neither does a savepoint that was released in it."""
    await read_by(database)
    async with session_scope(database) as session:
        async with atomic():
            await session.execute(text("INSERT INTO item VALUES (1)"))
        current_scope().rollback_only()
    assert own_writes.get() is None
    assert await read_by(database) != "writer"


async def test_a_position(database: Database) -> None:
    """A reader has to have it: it is asked if need be, and left out if it has not."""
    assert database.readers is not None
    await read_by(database)
    own = OwnWrites()
    token = own_writes.set(own)
    try:
        own.note(database.readers)
        assert await read_by(database) == "writer"
        await own.locate()
        assert own.positions[database.readers.key] > 0
        assert await read_by(database) != "writer"
        own.positions[database.readers.key] = 2**62
        assert await read_by(database) == "writer"
    finally:
        own_writes.reset(token)
    assert in_flight(database) == [0, 0]


async def test_a_server_that_tells_no_position(mysql_url: str) -> None:
    """For a while only the writer will do."""
    database = Database(mysql_url, readers=[mysql_url])
    assert database.readers is not None

    async def reader_served() -> bool:
        before = reader_of(database).turn
        async with session_scope(database, read_only=True) as session:
            await session.execute(text("SELECT 1"))
        return reader_of(database).turn > before

    assert await reader_served()
    own = OwnWrites()
    token = own_writes.set(own)
    own.note(database.readers)
    await own.locate()
    assert not await reader_served()
    own.require_writer(database.readers.key, 0)
    assert await reader_served()
    own_writes.reset(token)
    await database.dispose()


# --- the database around them


async def test_what_is_disposed_of(database: Database, postgres_url: str) -> None:
    """The connections of the readers, too."""
    for _ in range(3):
        await read_by(database)
    await database.dispose()
    names = "SELECT application_name FROM pg_stat_activity WHERE application_name LIKE 'reader%'"
    block_until(lambda: rows(postgres_url, names) == [])


async def test_a_session_class_with_a_bind_of_its_own(postgres_url: str) -> None:
    """What the application binds elsewhere stays there."""

    class Elsewhere(Session):
        def get_bind(self, *args: Any, **kwargs: Any) -> Any:
            bind = super().get_bind(*args, **kwargs)
            return self.info["engine"] if self.info.get("elsewhere") else bind

    other = Database(named(postgres_url, "elsewhere"))
    database = with_readers(
        postgres_url,
        sync_session_class=Elsewhere,
        session_kwargs={"info": {"engine": other.engine}},
    )
    with sync_session_scope(database, read_only=True) as session:
        assert session.scalar(text(READ_BY)) == "reader 0"
        session.info["elsewhere"] = True
        assert session.scalar(text(READ_BY)) == "elsewhere"
    assert in_flight(database) == [0, 0]
    database.dispose_sync()
    other.dispose_sync()
    block_until(lambda: open_transactions(postgres_url) == 0)
