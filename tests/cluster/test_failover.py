"""The server that takes writes is lost under load, or is made a replica: no response lies about
it, and the next one that takes writes is found without a restart.
"""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from sqlalchemy import text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError
from starlette.requests import Request
from starlette.responses import Response

from repom import current_session, current_sync_session, session_scope
from repom.database import Database
from repom.dialects.mysql import errno
from repom.errors import CommitOutcomeUnknown, RepomError
from tests.cluster.conftest import Cluster
from tests.promise.entries import prepare, serve, written
from tests.support.asgi import ASGIApp, request
from tests.support.polling import until
from tests.support.reader import connections, execute, rows

CLIENTS = 8

INSERT = text("INSERT INTO entry VALUES (:id, 0)")


def database_of(cluster: Cluster, driver: str) -> Database:
    url = make_url(cluster.urls()["REPOM_PG_MULTI_URL"]).set(drivername=f"postgresql+{driver}")
    return Database(url, engine_kwargs={"pool_size": CLIENTS, "max_overflow": 0})


def application(database: Database, *, in_threads: bool = False) -> ASGIApp:
    async def endpoint(request: Request) -> Response:
        await current_session().execute(INSERT, {"id": int(request.query_params["id"])})
        return Response(status_code=201)

    def endpoint_in_thread(request: Request) -> Response:
        current_sync_session().execute(INSERT, {"id": int(request.query_params["id"])})
        return Response(status_code=201)

    return serve(database, endpoint_in_thread if in_threads else endpoint)


class Load:
    """Clients that write one row after the other, and remember what they were told.

    Attributes:
        acknowledged: the ids answered with 201, in that order, and when that was.
        unknown: those of which nobody can know.
        failed: those answered with an error.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._ids = itertools.count(2)
        self._stopped = False
        self.acknowledged: dict[int, float] = {}
        self.unknown: set[int] = set()
        self.failed: set[int] = set()

    async def __aenter__(self) -> "Load":
        self._clients = [asyncio.create_task(self._post()) for _ in range(CLIENTS)]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._stopped = True
        await asyncio.gather(*self._clients)

    async def _post(self) -> None:
        while not self._stopped:
            id_ = next(self._ids)
            answer = await request(self._app, "POST", f"/?id={id_}")
            if answer.status == 201:
                self.acknowledged[id_] = time.monotonic()
                continue
            assert answer.status == 500
            unknown = isinstance(answer.exception, CommitOutcomeUnknown)
            (self.unknown if unknown else self.failed).add(id_)
            await asyncio.sleep(0.005)  # as a client that tries again; while there is no writer


@pytest.mark.parametrize("end", ["kill", "crash"])
@pytest.mark.parametrize("driver", ["asyncpg", "psycopg", "psycopg-sync"])
async def test_the_primary_is_lost_under_load(pg_pair: Cluster, driver: str, end: str) -> None:
    """Stopped at once, or killed with all its processes: what was acknowledged is on the promoted
    server, what was refused is not, and writes succeed within a second of the promotion."""
    prepare(pg_pair.urls()["REPOM_PG_URL"])
    promoted_url = pg_pair.urls()["REPOM_PG_REPLICA_URL"]
    database = database_of(pg_pair, driver.removesuffix("-sync"))
    async with Load(application(database, in_threads="sync" in driver)) as load:
        await until(lambda: len(load.acknowledged) > 300)
        await pg_pair.do_meanwhile(end, "1")
        await until(lambda: len(load.failed) > 2 * CLIENTS)
        before = len(load.acknowledged)
        await pg_pair.do_meanwhile("promote")
        promoted = time.monotonic()
        await until(lambda: len(load.acknowledged) > before + 100)
    await database.dispose()
    database.dispose_sync()

    back = [*load.acknowledged.values()][before] - promoted
    on_server = written(promoted_url)
    print(
        f"\n{driver}, {end}: {len(load.acknowledged)} acknowledged, {len(load.failed)} failed,"
        f" {len(load.unknown)} unknown, back {back:+.3f} s after the promotion"
    )
    assert load.acknowledged.keys() - on_server == set()
    assert load.failed & on_server == set()
    assert back < 1


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg", "psycopg-sync"])
async def test_a_demoted_server_is_left_at_once(pg_pair: Cluster, driver: str) -> None:
    """It lives, and refuses writes: that costs the first request an error, and all pooled
    connections are replaced by ones to the server that takes writes."""
    urls = pg_pair.urls()
    prepare(urls["REPOM_PG_URL"])
    database = database_of(pg_pair, driver.removesuffix("-sync"))
    app = application(database, in_threads="sync" in driver)
    answers = await asyncio.gather(*(request(app, "POST", f"/?id={n}") for n in range(2, 8)))
    assert {answer.status for answer in answers} == {201}
    assert len(connections(urls["REPOM_PG_URL"])) > 1

    # As Patroni and others do it with a primary that they are about to replace.
    execute(urls["REPOM_PG_URL"], "ALTER SYSTEM SET default_transaction_read_only = on")
    execute(urls["REPOM_PG_URL"], "SELECT pg_reload_conf()")
    await until(lambda: rows(urls["REPOM_PG_URL"], "SHOW transaction_read_only") == [("on",)])
    await pg_pair.do_meanwhile("promote")

    refused = await request(app, "POST", "/?id=10")
    assert refused.status == 500
    assert isinstance(refused.exception, DBAPIError)
    for n in range(11, 16):
        assert (await request(app, "POST", f"/?id={n}")).status == 201
    assert written(urls["REPOM_PG_REPLICA_URL"]) == {*range(2, 8), *range(11, 16)}
    await database.dispose()


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg", "psycopg-sync"])
async def test_shut_down_while_a_commit_waits_for_the_replica(
    pg_pair: Cluster, driver: str
) -> None:
    """The server has committed, does not know whether the replica has, and says that it goes:
    that is no answer to COMMIT."""
    urls = pg_pair.urls()
    prepare(urls["REPOM_PG_URL"])
    database = database_of(pg_pair, driver.removesuffix("-sync"))
    app = application(database, in_threads="sync" in driver)
    await pg_pair.do_meanwhile("kill", "2")
    answering = asyncio.create_task(request(app, "POST", "/?id=2"))
    waiting = "SELECT pid FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
    await until(lambda: bool(rows(urls["REPOM_PG_URL"], waiting)))
    execute(urls["REPOM_PG_URL"], f"SELECT pg_terminate_backend(pid) FROM ({waiting}) AS it")
    answer = await answering
    assert answer.status == 500
    assert isinstance(answer.exception, CommitOutcomeUnknown)
    assert written(urls["REPOM_PG_URL"]) == {2}
    await database.dispose()


async def test_no_server_takes_writes(pg_pair: Cluster) -> None:
    """The error tells of each host, why it was not taken."""
    database = database_of(pg_pair, "asyncpg")
    await pg_pair.do_meanwhile("kill", "1")
    with pytest.raises(RepomError) as caught:
        async with session_scope(database) as session:
            await session.execute(text("SELECT 1"))
    assert "ConnectionRefusedError" in str(caught.value)
    assert "TargetServerAttributeNotMatched" in str(caught.value)
    await database.dispose()


@asynccontextmanager
async def node_with_setting(
    url: str, variable: str, value: str, normal: str
) -> AsyncIterator[Database]:
    """A Galera node as an application sees it, with a global variable set for the block."""
    admin = make_url(url)
    execute(url, "CREATE USER IF NOT EXISTS app@'127.0.0.1' IDENTIFIED BY 'app'")
    execute(url, "GRANT SELECT, INSERT ON *.* TO app@'127.0.0.1'")
    execute(url, "CREATE OR REPLACE TABLE entry (id INTEGER PRIMARY KEY, amount INTEGER)")
    database = Database(admin.set(username="app", password="app"))
    async with session_scope(database) as session:
        await session.execute(INSERT, {"id": 1})
    execute(url, f"SET GLOBAL {variable} = {value}")
    try:
        yield database
    finally:
        execute(url, f"SET GLOBAL {variable} = {normal}")
        await database.dispose()


async def insert_until(database: Database, number: int) -> DBAPIError:
    """Insert until the server refuses it with the error of that number."""
    for id_ in itertools.count(2):
        try:
            async with session_scope(database) as session:
                await session.execute(INSERT, {"id": id_})
        except (DBAPIError, CommitOutcomeUnknown) as error:
            if isinstance(error, DBAPIError) and error.orig and errno(error.orig) == number:
                return error
    raise AssertionError


async def test_a_read_only_node(galera: Cluster) -> None:
    """The real error of MariaDB's `read_only`: the connection is replaced."""
    url, *_ = galera.urls()["REPOM_GALERA_URLS"].split()
    async with node_with_setting(url, "read_only", "ON", "OFF") as database:
        refused = await insert_until(database, 1290)
    assert refused.connection_invalidated


async def test_a_node_without_quorum(galera: Cluster) -> None:
    """The real error of a node that has lost sight of the others: the connection is replaced."""
    _, _, url = galera.urls()["REPOM_GALERA_URLS"].split()
    isolated, normal = ("'gmcast.isolate=1'", "'gmcast.isolate=0'")
    async with node_with_setting(url, "wsrep_provider_options", isolated, normal) as database:
        refused = await insert_until(database, 1047)
    assert refused.connection_invalidated
