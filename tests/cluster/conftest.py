"""Real clusters on loopback, started for the run and removed after it.

`servers/*.sh` start them; each says in its first lines what it needs. Where that is not installed
the tests are skipped with one line that says so, and in CI they fail.
"""

import asyncio
import os
import random
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from sqlalchemy.engine import make_url

from tests.support.databases import in_ci
from tests.support.polling import block_until
from tests.support.reader import execute, rows

SERVERS = Path(__file__).parent / "servers"

START_TIMEOUT = 180.0  # seconds; Galera takes about 15

# Said when the replica streams: before that, nobody would acknowledge a commit.
SYNCHRONOUS = """
ALTER SYSTEM SET synchronous_standby_names = '*';
ALTER SYSTEM SET synchronous_commit = remote_apply;
SELECT pg_reload_conf()
"""


class Cluster:
    """The servers of one script.

    Args:
        script: its name without the ending.
        environ: its settings.
    """

    def __init__(self, script: str, environ: dict[str, str]) -> None:
        self._script = SERVERS / f"{script}.sh"
        self._environ = {**os.environ, **environ}

    def do(self, *args: str) -> str:
        """Run a command of the script, and return what it prints.

        Raises:
            ClusterError: it failed; what it said is the message.
        """
        # Into a file: the servers inherit it, and a pipe would not end before they do.
        with tempfile.TemporaryFile() as out:
            code = subprocess.run(
                [self._script, *args],
                env=self._environ,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                timeout=START_TIMEOUT,
                check=False,
            ).returncode
            out.seek(0)
            said = out.read().decode()
        if code:
            raise ClusterError(said.strip() or f"{self._script.name} {args} failed")
        return said

    async def do_meanwhile(self, *args: str) -> str:
        """The same, while the event loop goes on."""
        return await asyncio.to_thread(self.do, *args)

    def urls(self) -> dict[str, str]:
        """The URLs by their names in the script, without a driver."""
        found = dict(line.split("=", 1) for line in self.do("env").splitlines())
        return {
            name: value.strip("'").replace("+asyncpg", "").replace("+aiomysql", "")
            for name, value in found.items()
        }


class ClusterError(Exception):
    """The servers do not do what they were told to."""


@contextmanager
def started(script: str, environ: dict[str, str]) -> Iterator[Cluster]:
    """The servers of `script`, running; destroyed in the end."""
    with tempfile.TemporaryDirectory(prefix="repom-") as folder:
        os.chmod(folder, 0o755)  # the servers run as another user than root
        cluster = Cluster(script, {"REPOM_SERVERS_DIR": folder, **environ})
        try:
            cluster.do("start")
        except ClusterError as error:
            cluster.do("destroy") if "missing" not in str(error) else None
            reason = f"{script}.sh: {str(error).splitlines()[-1]}"
            if in_ci():
                pytest.fail(reason, pytrace=False)
            pytest.skip(reason)
        yield cluster
        cluster.do("destroy")


def free_ports(count: int) -> int:
    """The first of so many neighbouring ports that are free now.

    Below those that systems give to connections (from 32768 on), which come and go.
    """
    while True:
        first = random.randrange(20000, 32000)
        if all(is_free(port) for port in range(first, first + count)):
            return first


def is_free(port: int) -> bool:
    with socket.socket() as listener:
        try:
            listener.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


@pytest.fixture(scope="session")
def galera() -> Iterator[Cluster]:
    """Three MariaDB nodes, each of which takes writes."""
    with started("galera3", {"GALERA_PORT": str(free_ports(40))}) as cluster:
        yield cluster


@pytest.fixture
def pg_pair() -> Iterator[Cluster]:
    """A PostgreSQL primary and a replica, which has every commit before its client knows of it."""
    with started("pg_pair", {"PG_PORT": str(free_ports(2))}) as cluster:
        primary = cluster.urls()["REPOM_PG_URL"]
        for statement in SYNCHRONOUS.split(";"):
            execute(primary, statement)
        block_until(lambda: rows(primary, "SHOW synchronous_standby_names") == [("*",)])
        yield cluster


@pytest.fixture
def late_pair() -> Iterator[Cluster]:
    """A PostgreSQL primary and a replica that has what was committed a third of a second later."""
    with started("pg_pair", {"PG_PORT": str(free_ports(2))}) as cluster:
        delay_replica(cluster, "300ms")
        yield cluster


def delay_replica(cluster: Cluster, delay: str) -> None:
    """Let the replica of a pair replay each commit so much later."""
    replica = cluster.urls()["REPOM_PG_REPLICA_URL"]
    execute(replica, f"ALTER SYSTEM SET recovery_min_apply_delay = '{delay}'")
    execute(replica, "SELECT pg_reload_conf()")
    block_until(lambda: rows(replica, "SHOW recovery_min_apply_delay") == [(delay,)])


@pytest.fixture
def pgbouncer(postgres_url: str) -> Iterator[Cluster]:
    """A PgBouncer in transaction mode before the PostgreSQL of the other tests."""
    behind = make_url(postgres_url)
    settings = {
        "PGBOUNCER_PORT": str(free_ports(1)),
        "PGBOUNCER_POOL": "3",
        "PG_HOST": behind.host or "127.0.0.1",
        "PG_PORT": str(behind.port or 5432),
        "PG_USER": behind.username or "",
        "PG_DB": behind.database or "",
    }
    with started("pgbouncer", settings) as cluster:
        yield cluster
