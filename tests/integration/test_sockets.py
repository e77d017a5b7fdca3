"""The promises over real sockets: uvicorn, and clients that know nothing of the server."""

import http.client
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from fastapi import FastAPI
from websockets.sync.client import connect as connect_websocket

from tests.integration import served
from tests.middleware.notes import create_notes, notes
from tests.support.databases import CLOSE_TIMEOUT
from tests.support.reader import ask, connect, connections
from tests.support.sockets import serve

POSTS = 200


def app_for(url: str) -> FastAPI:
    create_notes(url)
    return served.app_for(url)


@contextmanager
def client_of(base_url: str) -> Iterator[http.client.HTTPConnection]:
    """One connection, kept alive."""
    parts = urlsplit(base_url)
    with closing(
        http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=10)
    ) as client:
        yield client


def post(client: http.client.HTTPConnection, path: str) -> int:
    client.request("POST", path)
    response = client.getresponse()
    response.read()
    return response.status


def eventually(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_read_your_writes(database_url: str) -> None:
    """200 times in a row: what a 201 tells of is seen by a read on another connection at once."""
    missing: list[str] = []
    with (
        serve(app_for(database_url)) as base_url,
        client_of(base_url) as client,
        closing(connect(database_url)) as reader,
    ):
        for number in range(POSTS):
            assert post(client, f"/notes/{number}") == 201
            if not ask(reader, "SELECT 1 FROM note WHERE text = %s", str(number)):
                missing.append(str(number))
    assert missing == []


def test_clients_at_the_same_time(database_url: str) -> None:
    """Each of many clients reads its own writes, too."""

    def work(base_url: str, client_number: int) -> list[str]:
        missing = []
        with client_of(base_url) as client, closing(connect(database_url)) as reader:
            for number in range(10):
                text = f"{client_number}-{number}"
                assert post(client, f"/notes/{text}") == 201
                if not ask(reader, "SELECT 1 FROM note WHERE text = %s", text):
                    missing.append(text)
        return missing

    with serve(app_for(database_url)) as base_url, ThreadPoolExecutor(10) as pool:
        found = list(pool.map(lambda number: work(base_url, number), range(10)))
    assert found == [[]] * 10
    assert len(notes(database_url)) == 100


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_failed_commit(kind: str, request: pytest.FixtureRequest) -> None:
    """The client gets the handler's 409, and the connection serves the next request."""
    url = request.getfixturevalue("sqlite_url" if kind == "sqlite" else "postgres_url")
    with serve(app_for(url)) as base_url, client_of(base_url) as client:
        for number in range(3):
            assert post(client, "/refused") == 409
            assert post(client, f"/notes/{number}") == 201
    assert notes(url) == ["0", "1", "2"]


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_failed_commit_of_a_body(kind: str, request: pytest.FixtureRequest) -> None:
    """The client sees that the body is not complete."""
    url = request.getfixturevalue("sqlite_url" if kind == "sqlite" else "postgres_url")
    with serve(app_for(url)) as base_url, client_of(base_url) as client:
        client.request("POST", "/broken")
        response = client.getresponse()
        assert response.status == 200
        with pytest.raises(http.client.IncompleteRead):
            response.read()
    assert notes(url) == []


def test_client_that_goes_away(database_url: str) -> None:
    """What the body has written is undone, and no transaction stays open."""
    with serve(app_for(database_url)) as base_url:
        with client_of(base_url) as client:
            client.request("POST", "/endless")
            assert client.getresponse().read(1) == b"x"
        with client_of(base_url) as client:
            # On SQLite this has to wait for the write lock that the other one holds.
            assert post(client, "/notes/next") == 201
        eventually(lambda: notes(database_url) == ["next"])


def test_stream_read_from_a_cursor(database_url: str) -> None:
    """A response of thousands of rows arrives whole."""
    app = app_for(database_url)
    with closing(connect(database_url)) as connection:
        rows = ", ".join(f"('{number:05}')" for number in range(3000))
        ask(connection, f"INSERT INTO note (text) VALUES {rows}")
    with serve(app) as base_url, client_of(base_url) as client:
        client.request("GET", "/notes")
        assert client.getresponse().read().decode() == "".join(f"{n:05}" for n in range(3000))


def test_websocket(database_url: str) -> None:
    """What a message tells of is committed when it is answered."""
    with serve(app_for(database_url)) as base_url:
        uri = base_url.replace("http:", "ws:")
        with connect_websocket(uri) as connection, closing(connect(database_url)) as reader:
            for number in range(50):
                connection.send(str(number))
                assert connection.recv(10) == str(number)
                assert ask(reader, "SELECT 1 FROM note WHERE text = %s", str(number))


@pytest.mark.parametrize("server", ["postgres_url", "mysql_url"])
def test_server_that_stops(server: str, request: pytest.FixtureRequest) -> None:
    """No connection to the database is left when the server has stopped."""
    url = request.getfixturevalue(server)
    with serve(app_for(url)) as base_url, client_of(base_url) as client:
        assert post(client, "/notes/a") == 201
        assert len(connections(url)) == 1
    end = time.monotonic() + CLOSE_TIMEOUT
    while connections(url):
        assert time.monotonic() < end


WRONG: dict[str, tuple[str, str]] = {
    "missing driver": (
        "sys.modules.update(asyncpg=None, psycopg=None, psycopg2=None)\n"
        "os.environ['REPOM_DATABASE_URL'] = 'postgresql://nowhere/test'",
        "ERROR:    MissingDriverError: The database",
    ),
    "bad hook": (
        "os.environ['CONFIG_HOOK'] = 'no_such_module:function'",
        "ERROR:    ConfigHookError: CONFIG_HOOK=no_such_module:function",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_server_that_cannot_start(tmp_path: Path, wrong: str) -> None:
    """With a wrong configuration the server process ends, not with success, and its last words
    say what is wrong; its own default would let an exception pass for an app without lifespan."""
    line, message = WRONG[wrong]
    (tmp_path / "app.py").write_text(
        "import os, sys\n"
        "from fastapi import FastAPI\n"
        "from repom.middleware import DatabaseSessionMiddleware\n"
        f"{line}\n"
        "app = FastAPI()\n"
        "app.add_middleware(DatabaseSessionMiddleware)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-m", "uvicorn", "app:app", "--port", "0"],
        cwd=tmp_path,
        env={**os.environ, "REPOM_DATABASE_URL": "sqlite:///a.sqlite3"},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert ended.returncode == 3, ended.stderr  # uvicorn's own, for a startup that failed
    assert message in ended.stderr
    assert "Application startup failed. Exiting." in ended.stderr
    assert "Traceback" not in ended.stderr
