"""A PostgreSQL server of one test's own, to be stopped, crashed and started again."""

import functools
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.databases import in_ci
from tests.support.reader import execute, rows

_OPTIONS = (
    "-c listen_addresses=127.0.0.1 -c fsync=off -c shared_buffers=8MB -c max_connections=20"
    " -c unix_socket_directories='' -c max_prepared_transactions=10"
)


@functools.cache
def _binaries() -> Path | None:
    """Where `initdb` and `pg_ctl` are: named by REPOM_TEST_PG_BIN, in the PATH, or Debian's."""
    found = [
        os.environ.get("REPOM_TEST_PG_BIN"),
        os.path.dirname(shutil.which("initdb") or ""),
        *sorted(map(str, Path("/usr/lib/postgresql").glob("*/bin")), reverse=True),
    ]
    return next((Path(folder) for folder in found if folder and _has_initdb(folder)), None)


def _has_initdb(folder: str) -> bool:
    return os.access(os.path.join(folder, "initdb"), os.X_OK)


class PrivatePostgres:
    """A server below `folder`.

    Attributes:
        url: of its database, the same after every start.
    """

    def __init__(self, binaries: Path, folder: Path) -> None:
        self._binaries = binaries
        self._folder = folder
        self._data = folder / "data"
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            self._port = taken.getsockname()[1]
        self.url = f"postgresql://postgres@127.0.0.1:{self._port}/postgres"

    def create(self) -> None:
        """Make its files."""
        self._run("initdb", "-D", self._data, "-U", "postgres", "-A", "trust", "--no-sync")

    def start(self) -> None:
        """Start it, and wait until it accepts connections."""
        log = self._folder / "server.log"
        options = f"-p {self._port} {_OPTIONS}"
        self._run("pg_ctl", "-D", self._data, "-w", "-s", "-l", log, "-o", options, "start")
        execute(self.url, "select 1")

    def crash(self) -> None:
        """Stop it at once, as a power cut does, if it runs."""
        self._run("pg_ctl", "-D", self._data, "-m", "immediate", "-s", "stop", check=False)

    def stop(self) -> None:
        """Shut it down in order: it tells its clients."""
        self._run("pg_ctl", "-D", self._data, "-m", "fast", "-s", "stop")

    def _run(self, program: str, *args: object, check: bool = True) -> None:
        user: str | None = None
        if os.geteuid() == 0:  # which PostgreSQL does not run as
            user = "postgres"
        done = subprocess.run(
            [self._binaries / program, *map(str, args)],
            user=user,
            group=user,
            extra_groups=[] if user else None,
            cwd=self._folder,
            stdout=subprocess.DEVNULL,  # no pipe, which the server would inherit and keep open
            stderr=subprocess.DEVNULL,
            timeout=60,
            check=False,
        )
        assert not check or done.returncode == 0, f"{program} failed: {self._log()}"

    def _log(self) -> str:
        log = self._folder / "server.log"
        return log.read_text()[-500:] if log.exists() else "no log"


@contextmanager
def _running() -> Iterator[PrivatePostgres]:
    binaries = _binaries()
    if binaries is None:
        reason = (
            "no PostgreSQL binaries for a private server:"
            " install its server package, or set REPOM_TEST_PG_BIN to their folder"
        )
        if in_ci():
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason)
    with tempfile.TemporaryDirectory(prefix="repom-pg-") as folder:
        if os.geteuid() == 0:
            shutil.chown(folder, "postgres", "postgres")
        server = PrivatePostgres(binaries, Path(folder))
        server.create()
        try:
            server.start()
            yield server
        finally:
            server.crash()


@pytest.fixture
def private_postgres() -> Iterator[PrivatePostgres]:
    """A server that runs, for this test alone; skipped without the binaries, which CI has."""
    with _running() as server:
        yield server


@pytest.fixture(scope="module")
def preparing_server() -> Iterator[PrivatePostgres]:
    """A server that prepares transactions, as others by default do not; one for each module."""
    with _running() as server:
        yield server


@pytest.fixture
def preparing_url(preparing_server: PrivatePostgres) -> Iterator[str]:
    """The URL of its database, empty; what a test has left prepared fails the test."""
    execute(preparing_server.url, "DROP SCHEMA public CASCADE")
    execute(preparing_server.url, "CREATE SCHEMA public")
    yield preparing_server.url
    left = rows(preparing_server.url, "SELECT gid FROM pg_prepared_xacts")
    for (gid,) in left:
        execute(preparing_server.url, f"ROLLBACK PREPARED '{gid}'")
    assert left == []
