"""Servers for the tests: started when the block begins, gone when it ends, or the test fails."""

import http.client
import threading
from contextlib import closing
from urllib.parse import urlsplit

import pytest

from tests.support import sockets
from tests.support.asgi import Receive, Scope, Send
from tests.support.sockets import free_port, serve, serve_process


def fetch(url: str) -> tuple[int, bytes]:
    with closing(http.client.HTTPConnection(urlsplit(url).netloc, timeout=5)) as connection:
        connection.request("GET", "/")
        response = connection.getresponse()
        return response.status, response.read()


async def lifespan_app(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "lifespan":
        for what in ("startup", "shutdown"):
            assert (await receive())["type"] == f"lifespan.{what}"
            events.append(what)
            await send({"type": f"lifespan.{what}.complete"})
        return
    await send({"type": "http.response.start", "status": 200})
    await send({"type": "http.response.body", "body": threading.current_thread().name.encode()})


events: list[str] = []


def test_serve() -> None:
    """The application answers on a real socket, in another thread, and is shut down."""
    events.clear()
    with serve(lifespan_app) as url:
        assert fetch(url) == (200, f"uvicorn {url}".encode())
    assert events == ["startup", "shutdown"]
    with pytest.raises(ConnectionRefusedError):
        fetch(url)


def test_serve_reports_a_failed_start() -> None:
    """A server that cannot start says why, instead of leaving the test to time out."""

    async def broken(scope: Scope, receive: Receive, send: Send) -> None:
        raise ZeroDivisionError

    with pytest.raises(RuntimeError, match="did not start") as failed, serve(broken):
        pass
    assert isinstance(failed.value.__cause__, SystemExit)


def test_serve_process() -> None:
    """A server process runs during the block, and no longer."""
    port = free_port()
    url = f"http://127.0.0.1:{port}/"
    args = ["-m", "http.server", str(port), "--bind", "127.0.0.1"]
    with serve_process(args, {"PYTHONUNBUFFERED": "1"}, ready_url=url) as process:
        assert fetch(url)[0] == 200
        assert "GET / HTTP" in process.output()
    assert process.popen.returncode is not None


def test_serve_process_reports_a_failed_start() -> None:
    """What the process has printed is in the error."""
    with (
        pytest.raises(RuntimeError, match=r"ended with status 3.*\n.*no luck"),
        serve_process(["-c", "print('no luck'); exit(3)"], ready_url="http://127.0.0.1:1/"),
    ):
        pass


def test_serve_process_kills_what_does_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that ignores SIGTERM is killed, and the test fails."""
    monkeypatch.setattr(sockets, "PATIENCE", 0.2)
    port = free_port()
    source = (
        "import http.server as h, signal; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        f"h.HTTPServer(('127.0.0.1', {port}), h.SimpleHTTPRequestHandler).serve_forever()"
    )
    url = f"http://127.0.0.1:{port}/"
    with (
        pytest.raises(RuntimeError, match="did not end within"),
        serve_process(["-c", source], ready_url=url, deadline=10) as process,
    ):
        pass
    assert process.popen.returncode < 0
