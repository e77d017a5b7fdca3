"""The databases of a run: made, filled, and removed again.

All contenders share one database of a kind, so that nobody has the smaller table. The servers
are those of the tests: `REPOM_TEST_POSTGRES_URL`, `REPOM_TEST_MYSQL_URL`, else where they
usually are on this machine.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from sqlalchemy import func, insert, make_url, select, text
from sqlalchemy.ext.asyncio import create_async_engine

from benchmarks.models import ROWS, Base, Item

KINDS = ("sqlite", "postgresql", "mariadb")

_SERVERS = {
    "postgresql": (
        "postgresql+asyncpg",
        "REPOM_TEST_POSTGRES_URL",
        "postgresql://postgres@127.0.0.1:5432/test",
    ),
    "mariadb": ("mysql+aiomysql", "REPOM_TEST_MYSQL_URL", "mysql://root@127.0.0.1:3306/test"),
}


@asynccontextmanager
async def filled(kind: str) -> AsyncIterator[str]:
    """The URL, with its async driver, of a new database with the rows of `models`."""
    if kind == "sqlite":
        with TemporaryDirectory(prefix="repom-bench-") as folder:
            url = f"sqlite+aiosqlite:///{Path(folder) / 'bench.sqlite3'}"
            await fill(url)
            yield url
        return
    driver, variable, usual = _SERVERS[kind]
    server = make_url(os.environ.get(variable) or usual).set(drivername=driver)
    name = f"repom_bench_{os.getpid()}_{secrets.token_hex(4)}"
    admin = create_async_engine(server, isolation_level="AUTOCOMMIT")
    async with admin.connect() as connection:
        await connection.execute(text(f"create database {name}"))
    url = server.set(database=name).render_as_string(hide_password=False)
    try:
        await fill(url)
        yield url
    finally:
        async with admin.connect() as connection:
            # Not every contender closes its connections, and not before its process has ended.
            force = " with (force)" if kind == "postgresql" else ""
            await connection.execute(text(f"drop database {name}{force}"))
        await admin.dispose()


async def version(url: str) -> str:
    """What the server says of itself, in a few words."""
    engine = create_async_engine(url)
    async with engine.connect() as connection:
        dialect = connection.dialect
        if dialect.name == "sqlite":
            found = await connection.scalar(text("select sqlite_version()"))
        else:
            found = await connection.scalar(text("select version()"))
    await engine.dispose()
    words = str(found).split()
    return words[1] if dialect.name == "postgresql" else words[0]


async def count_items(url: str) -> int:
    """How many rows a new connection sees."""
    engine = create_async_engine(url)
    async with engine.connect() as connection:
        count = await connection.scalar(select(func.count(Item.id)))
    await engine.dispose()
    return count or 0


async def fill(url: str) -> None:
    """Make the table in an empty database, and its rows."""
    engine = create_async_engine(url)
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
        await connection.execute(insert(Item), [{"name": f"item {n}"} for n in range(1, ROWS + 1)])
    if engine.dialect.name == "sqlite":
        # repom would switch the file to WAL, and the others would profit. So it is for all.
        async with engine.connect() as connection:
            await connection.exec_driver_sql("pragma journal_mode = wal")
    await engine.dispose()
