"""Read replicas: a client reads its own writes, and a replica that is not fit is left out.

The replica is late on purpose. A client that did not tell what it has written would not find it,
which these tests make sure of, too.
"""

import asyncio
import time
from typing import Any

import httpx
import pytest
from sqlalchemy import text
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from repom import Database, current_session, current_sync_session, session_scope
from repom.middleware import DatabaseSessionMiddleware, safe_methods
from tests.cluster.conftest import Cluster, delay_replica
from tests.support.polling import DEADLINE
from tests.support.reader import execute

CLIENTS = 8
ROUNDS = 25


async def add(request: Request) -> Response:
    await current_session().execute(text("INSERT INTO item VALUES (:id)"), request.path_params)
    return Response(status_code=201)


async def look(request: Request) -> Response:
    return JSONResponse(await current_session().run_sync(seen, request.path_params))


def look_sync(request: Request) -> Response:
    return JSONResponse(seen(current_sync_session(), request.path_params))


def seen(session: Any, params: dict[str, Any]) -> dict[str, bool]:
    query = "SELECT EXISTS (SELECT FROM item WHERE id = :id), pg_is_in_recovery()"
    found, on_replica = session.execute(text(query), params).one()
    return {"found": found, "on_replica": on_replica}


def application(database: Database, **options: Any) -> Starlette:
    options = {"database": database, "read_only": safe_methods, **options}
    routes = [
        Route("/{id:int}", add, methods=["POST"]),
        Route("/{id:int}", look),
        Route("/sync/{id:int}", look_sync),
    ]
    return Starlette(routes=routes, middleware=[Middleware(DatabaseSessionMiddleware, **options)])


def prepared(cluster: Cluster, **options: Any) -> Database:
    """A database with its reader, which has the table."""
    urls = cluster.urls()
    execute(urls["REPOM_PG_URL"], "CREATE TABLE item (id INTEGER PRIMARY KEY)")
    return Database(urls["REPOM_PG_URL"], readers=[urls["REPOM_PG_REPLICA_URL"]], **options)


def client_of(app: Starlette) -> httpx.AsyncClient:
    return httpx.AsyncClient(
        transport=httpx.ASGITransport(app, raise_app_exceptions=False), base_url="http://test"
    )


async def reads(client: httpx.AsyncClient, id_: int = 0) -> dict[str, bool]:
    answer = await client.get(f"/{id_}")
    assert answer.status_code == 200
    found: dict[str, bool] = answer.json()
    return found


async def until_read_from(client: httpx.AsyncClient, *, replica: bool) -> None:
    """Wait until reads go to the replica, or until they do not."""
    end = time.monotonic() + DEADLINE
    while (await reads(client))["on_replica"] is not replica:
        assert time.monotonic() < end
        await asyncio.sleep(0.05)


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
@pytest.mark.parametrize("by", ["cookie", "header"])
async def test_a_client_reads_its_own_writes(late_pair: Cluster, by: Any, driver: str) -> None:
    """Each time at once; who does not bring the token along reads what the replica has. Later
    the replica is read from with the token, too."""
    database = prepared(late_pair)
    app = application(database, own_writes=by)
    found: list[dict[str, bool]] = []
    late: list[dict[str, bool]] = []

    async def work(number: int) -> None:
        async with client_of(app) as client, client_of(app) as other:
            for round_ in range(ROUNDS):
                id_ = number * ROUNDS + round_
                written = await client.post(f"/{id_}")
                assert written.status_code == 201
                headers = {"repom-written": written.headers.get("repom-written", "")}
                answer = await client.get(f"/{id_}", headers=headers if by == "header" else {})
                found.append(answer.json())
                late.append(await reads(other, id_))

    async with client_of(app) as client:
        await until_read_from(client, replica=True)
        await asyncio.gather(*(work(number) for number in range(1, CLIENTS + 1)))
        assert [each for each in found if not each["found"]] == []
        assert len(found) == CLIENTS * ROUNDS
        assert any(not each["found"] for each in late), "the replica was not late"
        if by == "cookie":
            await client.post("/0")
            await until_read_from(client, replica=True)
            assert (await reads(client))["found"]
    await database.dispose()


async def test_a_job_reads_its_own_writes(late_pair: Cluster) -> None:
    """What one task has committed, it finds in the units of work that follow, inside of others
    too."""
    database = prepared(late_pair)
    async with client_of(application(database)) as client:
        await until_read_from(client, replica=True)

    async def job(id_: int) -> bool:
        async with session_scope(database) as session:
            await session.execute(text("INSERT INTO item VALUES (:id)"), {"id": id_})
        async with session_scope(database, read_only=True) as session:
            found: bool = (await session.run_sync(seen, {"id": id_}))["found"]
        return found

    assert (
        await asyncio.gather(*(asyncio.create_task(job(id_)) for id_ in range(20))) == [True] * 20
    )
    await database.dispose()


async def test_a_replica_that_is_down(late_pair: Cluster) -> None:
    """It is left out without an error of any request, and taken back when it is there again."""
    database = prepared(late_pair)
    async with client_of(application(database)) as client:
        await until_read_from(client, replica=True)
        await late_pair.do_meanwhile("kill", "2")
        # What was in its pool is found out once, by an error like that of any lost connection.
        for _ in range(database.engine_kwargs["pool_size"] + 1):
            answer = await client.get("/0")
            if answer.status_code == 200:
                assert answer.json()["on_replica"] is False
        for _ in range(20):
            assert (await reads(client))["on_replica"] is False
        await late_pair.do_meanwhile("start")
        await until_read_from(client, replica=True)
    await database.dispose()


async def test_a_replica_that_is_too_far_behind(late_pair: Cluster) -> None:
    """It is left out, and taken back when it has caught up."""
    database = prepared(late_pair, max_lag=1.0)
    async with (
        client_of(application(database)) as client,
        client_of(application(database)) as other,
    ):
        await until_read_from(client, replica=True)
        delay_replica(late_pair, "1h")
        await other.post("/1")
        await until_read_from(client, replica=False)
        assert (await reads(client, 1))["found"]
        delay_replica(late_pair, "0")
        await until_read_from(client, replica=True)
        assert (await reads(client, 1))["found"]
    await database.dispose()


async def test_endpoints_without_async(late_pair: Cluster) -> None:
    """Sync sessions are routed in the same way, by their own driver."""
    database = prepared(late_pair)
    async with client_of(application(database)) as client:
        await until_read_from(client, replica=True)
        assert (await client.get("/sync/0")).json() == {"found": False, "on_replica": True}
        await client.post("/0")
        assert (await client.get("/sync/0")).json()["found"]
    await database.dispose()


async def test_galera(galera: Cluster) -> None:
    """Its nodes wait by themselves for what was committed elsewhere, so nobody needs a token."""
    one, two, three = (f"{url}" for url in galera.urls()["REPOM_GALERA_URLS"].split())
    execute(one, "CREATE TABLE IF NOT EXISTS seen (id INTEGER PRIMARY KEY)")
    database = Database(one, readers=[two, three])

    async def look(id_: int) -> bool:
        async with session_scope(database, read_only=True) as session:
            query = text("SELECT count(*) FROM seen WHERE id = :id")
            return bool(await session.scalar(query, {"id": id_}))

    stale = 0
    for id_ in range(200):
        async with session_scope(database) as session:
            await session.execute(text("INSERT INTO seen VALUES (:id)"), {"id": id_})

        stale += not await asyncio.create_task(look(id_))
    assert stale == 0
    assert database.readers is not None
    assert all(reader.turn for reader in database.readers.all)
    await database.dispose()
    execute(one, "DROP TABLE seen")
