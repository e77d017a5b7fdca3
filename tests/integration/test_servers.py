"""The servers that people use: each starts, serves and stops as if repom were not there."""

import asyncio
import http.client
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from websockets.sync.client import connect as connect_websocket

from tests.integration.test_sockets import client_of, post
from tests.middleware.notes import create_notes, notes
from tests.support.polling import block_until
from tests.support.reader import connections, execute
from tests.support.sockets import Process, free_port, serve_process

APP = "tests.integration.served:app"

SERVERS: dict[str, Callable[[str, int], list[str]]] = {
    "uvicorn-h11-asyncio": lambda app, port: [
        *("uvicorn", app, "--port", str(port)),
        *("--http", "h11", "--loop", "asyncio"),
    ],
    "uvicorn-httptools-uvloop": lambda app, port: [
        *("uvicorn", app, "--port", str(port)),
        *("--http", "httptools", "--loop", "uvloop"),
    ],
    "hypercorn-asyncio": lambda app, port: ["hypercorn", app, "--bind", f"127.0.0.1:{port}"],
    "hypercorn-uvloop": lambda app, port: [
        *("hypercorn", app, "--bind", f"127.0.0.1:{port}", "--worker-class", "uvloop"),
    ],
    "granian": lambda app, port: [
        *("granian", app, "--interface", "asgi", "--host", "127.0.0.1", "--port", str(port)),
    ],
    "daphne": lambda app, port: [
        *("daphne", "--port", str(port), "--application-close-timeout", "1", app),
    ],
}

#: It has no lifespan, so that nobody tells the app to stop.
WITHOUT_LIFESPAN = {"daphne"}

#: What Python or asyncio say of something that was not closed or not awaited.
# advanced-alchemy, which Litestar loads, has not yet got rid of what SQLAlchemy 2.1 deprecates.
COMPLAINTS = re.compile(
    r"\b(?!SADeprecation)\w*Warning\b|was never|unclosed|was destroyed|were terminated"
)


@contextmanager
def serving(name: str, database_url: str, app: str = APP) -> Iterator[tuple[str, Process]]:
    """The app at `database_url`, served; its base URL and its process."""
    create_notes(database_url)
    port = free_port()
    base_url = f"http://127.0.0.1:{port}"
    env = {
        "REPOM_DATABASE_URL": database_url,
        "PYTHONDEVMODE": "1",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    args = ["-m", *SERVERS[name](app, port)]
    with serve_process(args, env, ready_url=f"{base_url}/x") as process:
        yield base_url, process


@pytest.mark.parametrize("name", SERVERS)
def test_server(name: str, postgres_url: str) -> None:
    """A 201 is committed, a failed COMMIT is the handler's answer, a request that has lost a
    conflict is repeated with its body, a broken body is seen to be broken (one that breaks at
    once, too: the start before it tells what is committed), a client that leaves has written
    nothing, a WebSocket message is a transaction; and when the server stops, the connections are
    closed and nobody complains."""
    with serving(name, postgres_url) as (base_url, process):
        with client_of(base_url) as client:
            assert post(client, "/notes/a") == 201
            assert notes(postgres_url) == ["a"]
            assert post(client, "/refused") == 409
            client.request("POST", "/repeated", body=b"x" * 300_000)
            answer = client.getresponse()
            assert (answer.status, answer.read()) == (201, b"null")
            assert notes(postgres_url) == ["a", "300000 bytes"]
            execute(postgres_url, "DELETE FROM note WHERE text <> 'a'")
            client.sock.settimeout(1)  # Daphne leaves the connection open
            client.request("POST", "/broken")
            with pytest.raises((http.client.IncompleteRead, TimeoutError)):
                client.getresponse().read()
        with client_of(base_url) as client:
            client.connect()
            sock = client.sock
            client.request("POST", "/broken_at_once")
            answer = client.getresponse()
            assert (answer.status, notes(postgres_url)) == (200, ["a", "before"])
            sock.settimeout(1)
            with pytest.raises((http.client.IncompleteRead, TimeoutError)):
                answer.read()
        with client_of(base_url) as client:
            client.request("POST", "/endless")
            assert client.getresponse().read(1) == b"x"
        with client_of(base_url) as client:
            assert post(client, "/notes/b") == 201
        with connect_websocket(base_url.replace("http:", "ws:")) as connection:
            connection.send("c")
            assert connection.recv(10) == "c"
            assert notes(postgres_url) == ["a", "before", "b", "c"]
    block_until(lambda: not connections(postgres_url))
    assert notes(postgres_url) == ["a", "before", "b", "c"]
    output = process.output()
    if name not in WITHOUT_LIFESPAN:
        assert "connections left: 0" in output
    assert not COMPLAINTS.search(output), output


@pytest.mark.parametrize(
    ("framework", "name"),
    [
        ("litestar", "uvicorn-h11-asyncio"),
        ("litestar", "granian"),
        ("django", "uvicorn-httptools-uvloop"),
        ("django", "hypercorn-asyncio"),
    ],
)
def test_application_that_is_not_told_of_the_end(
    framework: str, name: str, postgres_url: str
) -> None:
    """Where the middleware gets no lifespan, the end of the event loop closes the connections,
    and nobody complains."""
    app = f"tests.integration.served_unaware:{framework}"
    with serving(name, postgres_url, app) as (base_url, process):
        with client_of(base_url) as client:
            assert post(client, "/raised") == 403
            assert post(client, "/created") == 201
        assert notes(postgres_url) == ["a"]
    block_until(lambda: not connections(postgres_url))
    assert not COMPLAINTS.search(process.output()), process.output()


def test_http2(postgres_url: str) -> None:
    """The streams of one HTTP/2 connection are requests of their own."""

    async def use(base_url: str) -> None:
        async with httpx.AsyncClient(http1=False, http2=True, base_url=base_url) as client:
            paths = [*(f"/notes/{number}" for number in range(20)), *["/refused"] * 5]
            answers = await asyncio.gather(*(client.post(path) for path in paths))
            assert [answer.status_code for answer in answers] == [201] * 20 + [409] * 5
            assert {answer.http_version for answer in answers} == {"HTTP/2"}
            with pytest.raises((httpx.RemoteProtocolError, httpx.ReadTimeout)):
                await client.post("/broken", timeout=1)  # Hypercorn leaves the stream open
            assert len((await client.get("/notes")).text) == sum(len(str(n)) for n in range(20))

    with serving("hypercorn-asyncio", postgres_url) as (base_url, _):
        asyncio.run(use(base_url))
    assert sorted(notes(postgres_url), key=int) == [str(number) for number in range(20)]
