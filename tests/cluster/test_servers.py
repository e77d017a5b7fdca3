"""The clusters themselves: what the other tests take for granted of them."""

import psycopg

from tests.cluster.conftest import Cluster
from tests.support.reader import execute, rows


def test_galera(galera: Cluster) -> None:
    """What one node has committed, another one reads."""
    one, two, three = galera.urls()["REPOM_GALERA_URLS"].split()
    execute(one, "CREATE TABLE IF NOT EXISTS probe (id INTEGER PRIMARY KEY)")
    execute(two, "INSERT INTO probe VALUES (1)")
    assert rows(three, "SELECT id FROM probe") == [(1,)]
    execute(one, "DROP TABLE probe")


def test_postgres_with_a_replica(pg_pair: Cluster) -> None:
    urls = pg_pair.urls()
    execute(urls["REPOM_PG_URL"], "CREATE TABLE probe (id INTEGER PRIMARY KEY)")
    execute(urls["REPOM_PG_URL"], "INSERT INTO probe VALUES (1)")
    assert rows(urls["REPOM_PG_REPLICA_URL"], "SELECT id FROM probe") == [(1,)]


def test_pgbouncer(pgbouncer: Cluster) -> None:
    with psycopg.connect(pgbouncer.urls()["REPOM_PGBOUNCER_URL"]) as connection:
        assert connection.execute("SELECT 1").fetchone() == (1,)


def test_promoted_replica_takes_writes(pg_pair: Cluster) -> None:
    pg_pair.do("kill", "1")
    pg_pair.do("promote")
    url = pg_pair.urls()["REPOM_PG_REPLICA_URL"]
    execute(url, "CREATE TABLE probe (id INTEGER PRIMARY KEY)")
