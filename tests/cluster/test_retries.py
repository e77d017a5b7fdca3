"""A thousand increments of one counter, from many clients: none is lost, and none counts twice.

On two Galera nodes, each of which takes writes and finds out at COMMIT that the other was faster;
and on PostgreSQL under SERIALIZABLE. Without retries most of the requests fail, and the counter
says how many have not.
"""

import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest

from repom.database import Database
from tests.cluster.conftest import Cluster
from tests.support.asgi import ASGIApp
from tests.support.contention import Outcome, count, counting_app, create_counter, increments
from tests.support.polling import until
from tests.support.reader import execute

TIMES, CLIENTS = 1000, 20

#: More than any of the requests needs: nearly all of them have less than ten attempts.
ENOUGH = 100


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    """Each conflict is logged, and those at the end with a traceback."""
    caplog.set_level(logging.CRITICAL, "repom")


@asynccontextmanager
async def two_nodes(galera: Cluster) -> AsyncIterator[tuple[list[Database], list[str]]]:
    """The counter on a cluster, and a database for each of two nodes."""
    urls = galera.urls()["REPOM_GALERA_URLS"].split()
    create_counter(urls[0])
    databases = [Database(url) for url in urls[:2]]
    try:
        yield databases, urls
    finally:
        for database in databases:
            await database.dispose()
        execute(urls[0], "DROP TABLE counter")


async def test_galera(galera: Cluster) -> None:
    """With retries every request is a 2xx, and all nodes agree on their number."""
    async with two_nodes(galera) as (databases, urls):
        apps = [counting_app(database, locks=True, retries=ENOUGH) for database in databases]
        outcome = await increments(apps, times=TIMES, clients=CLIENTS)
        assert outcome.statuses == {201: TIMES}
        assert max(outcome.attempts) > 1  # there were conflicts
        await until(lambda: [count(url) for url in urls] == [TIMES] * 3)


async def test_galera_without_retries(galera: Cluster) -> None:
    """What the clients have heard of as an error has not happened."""
    async with two_nodes(galera) as (databases, urls):
        apps = [counting_app(database, locks=True) for database in databases]
        outcome = await increments(apps, times=TIMES, clients=CLIENTS)
        assert 0 < outcome.successes < TIMES
        await until(lambda: [count(url) for url in urls] == [outcome.successes] * 3)


async def test_postgres(postgres_url: str) -> None:
    """The same under SERIALIZABLE."""
    outcome = await _on_postgres(postgres_url, retries=ENOUGH)
    assert outcome.statuses == {201: TIMES}
    assert max(outcome.attempts) > 1
    assert count(postgres_url) == TIMES


async def test_postgres_without_retries(postgres_url: str) -> None:
    outcome = await _on_postgres(postgres_url, retries=0)
    assert 0 < outcome.successes < TIMES
    assert count(postgres_url) == outcome.successes


async def _on_postgres(url: str, *, retries: int) -> Outcome:
    create_counter(url)
    # Two instances, as two processes are.
    databases = [Database(url, engine_kwargs={"isolation_level": "SERIALIZABLE"}) for _ in range(2)]
    apps: Sequence[ASGIApp] = [counting_app(each, retries=retries) for each in databases]
    try:
        return await increments(apps, times=TIMES, clients=CLIENTS)
    finally:
        for database in databases:
            await database.dispose()
