"""PgBouncer in transaction mode: a connection of the client is many connections of the server.

What a driver has prepared on one of them is missing on the next, and what two clients have
prepared under one name collides.
"""

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator

import pytest
from sqlalchemy import text
from sqlalchemy.engine import make_url

from repom import Database, session_scope
from repom.begin import ReadOnly
from repom.errors import ReadOnlyError
from tests.cluster.conftest import Cluster
from tests.support.reader import execute, rows
from tests.support.tenants import choose_rows, tenant

TRANSACTIONS = 500
AT_ONCE = 20

#: Its arguments: a URL, and the id of the first row it writes. Prints the errors it has met.
CLIENT = f"""
import asyncio, collections, json, sys
from sqlalchemy import text
from repom import Database, session_scope

async def main(url, first):
    database = Database(url, pgbouncer=True, engine_kwargs={{"pool_size": {AT_ONCE}}})
    errors, ids = collections.Counter(), iter(range(first, first + {TRANSACTIONS}))

    async def work():
        for id_ in ids:
            try:
                async with session_scope(database) as session:
                    await session.execute(text("INSERT INTO item VALUES (:id)"), {{"id": id_}})
                    await session.execute(text("SELECT id FROM item WHERE id = :id"), {{"id": id_}})
            except Exception as error:
                errors[str(error)[:200]] += 1

    await asyncio.gather(*(work() for _ in range({AT_ONCE})))
    await database.dispose()
    print(json.dumps(errors))

asyncio.run(main(sys.argv[1], int(sys.argv[2])))
"""


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
def test_two_clients_at_once(pgbouncer: Cluster, postgres_url: str, driver: str) -> None:
    """All transactions of both succeed, and no statement stays prepared on the server."""
    execute(postgres_url, "CREATE TABLE item (id INTEGER PRIMARY KEY)")
    url = make_url(pgbouncer.urls()["REPOM_PGBOUNCER_URL"]).set(drivername=f"postgresql+{driver}")
    clients = [
        subprocess.Popen(
            [sys.executable, "-c", CLIENT, url.render_as_string(False), str(first)],
            stdout=subprocess.PIPE,
        )
        for first in (0, TRANSACTIONS)
    ]
    errors = [json.loads(client.communicate(timeout=100)[0]) for client in clients]
    assert errors == [{}, {}]
    assert rows(postgres_url, "SELECT count(*) FROM item") == [(2 * TRANSACTIONS,)]


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
async def test_units_of_work_that_only_read(
    pgbouncer: Cluster, postgres_url: str, driver: str
) -> None:
    """They share the connections of the server with those that write, and no setting passes from
    the one kind to the other: every write of the first is refused, and none of the others."""
    execute(postgres_url, "CREATE TABLE item (id INTEGER PRIMARY KEY)")
    url = make_url(pgbouncer.urls()["REPOM_PGBOUNCER_URL"]).set(drivername=f"postgresql+{driver}")
    database = Database(url, pgbouncer=True, engine_kwargs={"pool_size": AT_ONCE})

    async def insert(id_: int, read_only: ReadOnly) -> None:
        async with session_scope(database, read_only=read_only) as session:
            await session.execute(text("SELECT count(*) FROM item"))
            await session.execute(text("INSERT INTO item VALUES (:id)"), {"id": id_})

    async def work(ids: Iterator[int]) -> None:
        for id_ in ids:
            await insert(2 * id_, False)
            with pytest.raises(ReadOnlyError):
                await insert(2 * id_ + 1, True)
            with pytest.raises(ReadOnlyError):
                await insert(2 * id_ + 1, "snapshot")

    ids = iter(range(TRANSACTIONS // 5))
    await asyncio.gather(*(work(ids) for _ in range(AT_ONCE)))
    await database.dispose()
    assert rows(postgres_url, "SELECT count(*), sum(id % 2) FROM item") == [(TRANSACTIONS // 5, 0)]


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
async def test_what_on_begin_has_set(pgbouncer: Cluster, driver: str) -> None:
    """Transactions of 20 tenants on three connections of the server: each finds its own tenant, and
    one without `on_begin` none."""
    url = make_url(pgbouncer.urls()["REPOM_PGBOUNCER_URL"]).set(drivername=f"postgresql+{driver}")
    kwargs = {"pool_size": AT_ONCE}
    database = Database(url, pgbouncer=True, engine_kwargs=kwargs, on_begin=choose_rows)
    setting = text("SELECT current_setting('app.tenant', true)")

    async def work(name: str) -> None:
        tenant.set(name)
        for _ in range(TRANSACTIONS // AT_ONCE):
            async with session_scope(database) as session:
                assert await session.scalar(setting) == name
            async with session_scope(database, read_only=True) as session:
                for _ in range(2):
                    assert await session.scalar(setting) == name
            async with database.async_engine.connect() as connection:
                assert await connection.scalar(setting) in (None, "")

    await asyncio.gather(*(work(f"tenant {number}") for number in range(AT_ONCE)))
    await database.dispose()
