"""A server that takes no writes any more, and one that says that it goes: the connections to it
are replaced, all of them, after the first error.
"""

from typing import Any

import pytest
from sqlalchemy import event, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError

from repom.database import Database
from repom.dialects import support_for
from tests.dialects.drivers import KINDS

POSTGRESQL = "postgresql+psycopg"
MYSQL = "mysql+pymysql"


class OfPostgreSQL(Exception):  # noqa: N818
    def __init__(self, sqlstate: str | None) -> None:
        self.sqlstate = sqlstate


@pytest.mark.parametrize(
    ("drivername", "error", "demoted", "last_word"),
    [
        (POSTGRESQL, OfPostgreSQL("25006"), True, False),
        (POSTGRESQL, OfPostgreSQL("57P01"), False, True),
        (POSTGRESQL, OfPostgreSQL("57P02"), False, True),
        (POSTGRESQL, OfPostgreSQL("57P03"), False, True),
        (POSTGRESQL, OfPostgreSQL("57014"), False, False),  # query_canceled
        (POSTGRESQL, OfPostgreSQL("25P02"), False, False),
        (POSTGRESQL, OfPostgreSQL(None), False, False),
        (MYSQL, Exception(1290, "running with the --read-only option so"), True, False),
        (MYSQL, Exception(1290, "running with the --super-read-only option so"), True, False),
        (MYSQL, Exception(1290, "mit der Option --read_only und kann"), True, False),
        (MYSQL, Exception(1290, "running with the --secure-file-priv option so"), False, False),
        (MYSQL, Exception(1836, "Running in read-only mode"), True, False),
        (MYSQL, Exception(1047, "WSREP has not yet prepared node"), True, False),
        # START TRANSACTION READ ONLY, of the application itself
        (MYSQL, Exception(1792, "Cannot execute in a READ ONLY transaction"), False, False),
        (MYSQL, Exception(1053, "Server shutdown in progress"), False, True),
        ("sqlite+pysqlite", Exception("attempt to write a readonly database"), False, False),
    ],
)  # fmt: skip
def test_what_servers_say(
    drivername: str, error: Exception, demoted: bool, last_word: bool
) -> None:
    support = support_for(make_url(f"{drivername}://"), {}, is_async=False)
    assert (support.is_demoted(error), support.is_last_word(error)) == (demoted, last_word)


#: By the fixture of the server: statements after which it takes no writes from a connection, and
#: one that writes; a statement that makes the server say its last word.
SAYS = {
    "postgres_url": (
        "SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY",
        "CREATE TABLE t (id INTEGER)",
        "DO $$ BEGIN RAISE EXCEPTION 'x' USING ERRCODE = 'admin_shutdown'; END $$",
    ),
    "mysql_url": (
        "SELECT 1",  # the server's own settings are not this test's
        "SIGNAL SQLSTATE 'HY000' SET MYSQL_ERRNO = 1290,"
        " MESSAGE_TEXT = 'The MariaDB server is running with the --read-only option so it...'",
        "SIGNAL SQLSTATE '08S01' SET MYSQL_ERRNO = 1053, MESSAGE_TEXT = 'x'",
    ),
}
SERVERS = [name for name, kind in KINDS.items() if kind.fixture in SAYS]


class Pool:
    """Two pooled connections to a server.

    Attributes:
        opened: how many connections there have been.
    """

    def __init__(self, request: pytest.FixtureRequest, name: str) -> None:
        pytest.importorskip(KINDS[name].module)
        self._is_async = KINDS[name].is_async
        self.demote, self.write, self.shut_down = SAYS[KINDS[name].fixture]
        url = make_url(request.getfixturevalue(KINDS[name].fixture))
        self._database = Database(url.set(drivername=KINDS[name].drivername))
        self._engine: Any = (
            self._database.async_engine.sync_engine if self._is_async else self._database.engine
        )
        self.opened = 0
        event.listen(self._engine, "connect", self._count)

    def _count(self, *_: object) -> None:
        self.opened += 1

    async def each(self, sql: str) -> None:
        """Run and commit `sql` on both connections."""
        if self._is_async:
            engine = self._database.async_engine
            async with engine.connect() as first, engine.connect() as second:
                for awaited in (first, second):
                    await awaited.execute(text(sql))
                    await awaited.commit()
            return
        with self._engine.connect() as one, self._engine.connect() as other:
            for connection in (one, other):
                connection.execute(text(sql))
                connection.commit()

    async def one(self, sql: str, **options: Any) -> None:
        """Run and commit `sql` on one connection."""
        if self._is_async:
            async with self._database.async_engine.execution_options(**options).begin() as awaited:
                await awaited.execute(text(sql))
            return
        with self._engine.execution_options(**options).begin() as connection:
            connection.execute(text(sql))

    async def dispose(self) -> None:
        await self._database.dispose()


@pytest.mark.parametrize("name", SERVERS)
async def test_the_pool_is_renewed(request: pytest.FixtureRequest, name: str) -> None:
    """The connection on which a write was refused, and the one that was not in use."""
    pool = Pool(request, name)
    await pool.each(pool.demote)
    with pytest.raises(DBAPIError) as refused:
        await pool.one(pool.write)
    assert refused.value.connection_invalidated
    assert pool.opened == 2
    await pool.each("SELECT 1")
    assert pool.opened == 4
    await pool.dispose()


@pytest.mark.parametrize("name", SERVERS)
async def test_the_last_word_of_a_server(request: pytest.FixtureRequest, name: str) -> None:
    """It is believed, whether the driver has seen the end of the connection already or not."""
    pool = Pool(request, name)
    await pool.each("SELECT 1")
    with pytest.raises(DBAPIError) as ended:
        await pool.one(pool.shut_down)
    assert ended.value.connection_invalidated
    await pool.each("SELECT 1")
    assert pool.opened == 4
    await pool.dispose()


@pytest.mark.parametrize("name", [name for name in SERVERS if "post" in KINDS[name].fixture])
async def test_a_write_where_only_reads_were_promised(
    request: pytest.FixtureRequest, name: str
) -> None:
    """In a transaction that is read-only by its own will the server is as good as before."""
    pool = Pool(request, name)
    await pool.each("SELECT 1")
    with pytest.raises(DBAPIError) as refused:
        await pool.one("CREATE TABLE t (id INTEGER)", postgresql_readonly=True)
    assert not refused.value.connection_invalidated
    await pool.each("SELECT 1")
    assert pool.opened == 2
    await pool.dispose()
