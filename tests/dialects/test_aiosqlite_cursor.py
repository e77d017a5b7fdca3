"""aiosqlite: cursors that take one step of the connection's thread for each statement."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine

from repom.database import Database

CREATE = "create table t (id integer primary key, name text not null)"


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    database = Database(f"sqlite:///{tmp_path / 'repom.db'}")
    async with database.async_engine.begin() as connection:
        await connection.execute(text(CREATE))
    yield database
    await database.dispose()


class Steps:
    """The queue of the connection's thread, which counts what is put into it."""

    def __init__(self, queue: Any) -> None:
        self.count = 0
        self._queue = queue

    def put_nowait(self, item: object) -> None:
        self.count += 1
        self._queue.put_nowait(item)


@pytest.mark.parametrize(
    ("sql", "parameters"),
    [
        ("select * from t", None),
        ("insert into t (name) values ('a') returning id", None),
        ("insert into t (name) values (:name)", {"name": "a"}),
        ("insert into t (name) values (:name)", [{"name": "a"}, {"name": "b"}]),
        ("update t set name = 'b'", None),
    ],
)
async def test_one_step_for_a_statement(database: Database, sql: str, parameters: Any) -> None:
    """BEGIN is in it, too."""
    async with database.async_engine.connect() as connection:
        driver: Any = (await connection.get_raw_connection()).driver_connection
        queue, driver._tx = driver._tx, Steps(driver._tx)
        await connection.execute(text(sql), parameters)
        steps, driver._tx = driver._tx, queue
    assert steps.count == 1


async def seen(connection: AsyncConnection) -> list[object]:
    """What the dialect gets to know of each kind of statement."""
    found: list[object] = []

    async def note(sql: str, parameters: Any = None, *, executed: bool = True) -> Any:
        try:
            result = await connection.execute(text(sql), parameters)
        except DBAPIError as error:
            return found.append((type(error), type(error.orig), str(error.orig)))
        if result.returns_rows:
            return found.append((list(result.keys()), [tuple(row) for row in result]))
        return found.append((result.rowcount, result.lastrowid if executed else None))

    await note(CREATE)
    await note("insert into t (name) values (:name)", {"name": "a"})
    await note("insert into t (name) values ('b')")
    many = [{"name": "c"}, {"name": "d"}]
    await note("insert into t (name) values (:name)", many, executed=False)
    await note("insert into t (name) values ('e') returning id, name")
    await note("update t set name = 'z' where id > 2")
    await note("select id, name from t order by id")
    await note("select id from t where id = :id", {"id": 100})
    await note("insert into t (name) values (null)")
    await note("insert into t (id, name) values (1, 'again')")
    await note("select nothing")
    await note("select :id", {"id": object()})
    await note("delete from t")
    return found


async def test_the_dialect_gets_to_know_the_same(tmp_path: Path) -> None:
    """Columns, rows, counts, new ids and errors, as by SQLAlchemy's own cursor."""
    results = []
    for engine in (
        create_async_engine(f"sqlite+aiosqlite:///{tmp_path / 'own.db'}"),
        Database(f"sqlite:///{tmp_path / 'repom.db'}").async_engine,
    ):
        async with engine.connect() as connection:
            results.append(await seen(connection))
        await engine.dispose()
    assert results[0] == results[1]


async def test_the_cursor_is_a_dbapi_cursor(database: Database) -> None:
    """Code that asks the dialect's connection for one finds what PEP 249 says."""

    def work(connection: Any) -> None:
        cursor = connection.connection.cursor()
        cursor.executemany("insert into t values (?, ?)", [(n, str(n)) for n in range(6)])
        assert (cursor.description, cursor.rowcount) == (None, 6)
        cursor.setinputsizes(None)
        cursor.execute("select id from t order by id")
        assert [column[0] for column in cursor.description] == ["id"]
        assert cursor.fetchone() == (0,)
        assert cursor.fetchmany() == [(1,)]
        assert cursor.fetchmany(2) == [(2,), (3,)]
        assert next(iter(cursor)) == (4,)
        assert cursor.fetchall() == [(5,)]
        assert (cursor.fetchone(), cursor.fetchmany(), cursor.fetchall()) == (None, [], [])
        cursor.execute("select id from t")
        cursor.close()
        assert cursor.fetchall() == []

    async with database.async_engine.connect() as connection:
        await connection.run_sync(work)


async def test_rows_that_are_fetched_bit_by_bit_are_not_fetched_at_once(
    database: Database,
) -> None:
    """A stream of many rows does not need the memory for all of them."""
    counted = "with recursive n (i) as (select 1 union all select i + 1 from n) select i from n"
    async with database.async_engine.connect() as connection:
        result = await connection.stream(text(counted))  # which has no end
        first = await result.fetchmany(2)
        await result.close()
    assert [row.i for row in first] == [1, 2]
