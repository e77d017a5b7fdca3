"""Applications behind real sockets: a server in a thread, or in a process of its own."""

import asyncio
import http.client
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from typing import IO, Any
from urllib.parse import urlsplit

import uvicorn

from tests.support.protocol import ASGIApp

PATIENCE = 10.0  # seconds that a server has to start, and to stop


class _Server(uvicorn.Server):
    """uvicorn, telling when it has started, or that it never will."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.settled = threading.Event()
        self.error: BaseException | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.settled.set()

    def work(self, listener: socket.socket) -> None:
        try:
            self.run([listener])
        # BaseException: uvicorn reports a failed startup by SystemExit.
        except BaseException as error:
            self.error = error
        finally:
            self.settled.set()


@contextmanager
def serve(app: ASGIApp, **uvicorn_kwargs: Any) -> Iterator[str]:
    """Serve `app` with uvicorn, in a thread with its own event loop, and yield the base URL.

    Args:
        uvicorn_kwargs: for `uvicorn.Config`; by default the lifespan must succeed, logging is
            left alone, and stopping does not wait longer than `PATIENCE` for open connections.

    Raises:
        RuntimeError: the server did not start, did not stop, or ended on its own; what its
            thread raised is the cause.
    """
    options = {
        "lifespan": "on",
        "log_config": None,
        "access_log": False,
        "timeout_graceful_shutdown": int(PATIENCE / 2),
    }
    server = _Server(uvicorn.Config(app, **(options | uvicorn_kwargs)))
    # The port is taken here and never given back, so no other process can get it in between.
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread = threading.Thread(target=server.work, args=(listener,), name=f"uvicorn {url}")
        thread.start()
        try:
            if not server.settled.wait(PATIENCE) or not server.started:
                raise RuntimeError(
                    f"the server did not start within {PATIENCE} s: see its log"
                ) from server.error
            yield url
        finally:
            server.should_exit = True
            thread.join(PATIENCE)
            if thread.is_alive():
                server.force_exit = True
                thread.join(PATIENCE)
    if thread.is_alive():
        raise RuntimeError(f"the server did not stop within {2 * PATIENCE} s")
    if server.error is not None:
        raise RuntimeError("the server ended by an error") from server.error


class Process:
    """A server process, with all it has printed."""

    def __init__(self, args: Sequence[str], env: Mapping[str, str], log: IO[bytes]) -> None:
        self._log = log
        self._printed = ""
        self.popen = subprocess.Popen(
            [sys.executable, *args],
            env={**os.environ, **env},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that its workers can be killed with it
        )

    def output(self) -> str:
        """Return what the process has printed so far, or until its end."""
        if self._log.closed:
            return self._printed
        return os.pread(self._log.fileno(), 1_000_000, 0).decode(errors="replace")

    def wait_until_ready(self, url: str, deadline: float) -> None:
        """Wait until `url` answers, whatever its status.

        Raises:
            RuntimeError: the process has ended, or `deadline` seconds have passed.
        """
        end = time.monotonic() + deadline
        while not _answers(url):
            if self.popen.poll() is not None:
                raise RuntimeError(self._failure(f"ended with status {self.popen.returncode}"))
            if time.monotonic() > end:
                raise RuntimeError(self._failure(f"did not answer {url} within {deadline} s"))
            time.sleep(0.02)

    def stop(self) -> str:
        """Ask the process to end (SIGTERM); kill it with its workers if it does not.

        Returns:
            What was wrong about its end, or "". That the test had killed it is not wrong.
        """
        try:
            self.popen.terminate()
            self.popen.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            os.killpg(self.popen.pid, signal.SIGKILL)
            self.popen.wait()
            return self._failure(f"did not end within {PATIENCE} s")
        else:
            status = self.popen.returncode
            return self._failure(f"ended with status {status}") if status > 0 else ""

    def _failure(self, what: str) -> str:
        return f"the server process {what}. Its output:\n{self.output()}"


@contextmanager
def serve_process(
    args: Sequence[str],
    env: Mapping[str, str] | None = None,
    *,
    ready_url: str,
    deadline: float = PATIENCE,
) -> Iterator[Process]:
    """Run `python *args` and yield it once `ready_url` answers; stop it after the block.

    Args:
        args: such as `["-m", "uvicorn", "package.module:app", "--port", str(port)]`; take the
            port from `free_port()`.
        env: added to this process's environment.
        deadline: seconds until `ready_url` must have answered.

    Raises:
        RuntimeError: with the output: the process did not start, crashed, or had to be killed.
    """
    # A file and not a pipe: nobody empties a pipe while the test runs, and a full one stops the
    # process.
    with tempfile.TemporaryFile() as log:
        process = Process(args, env or {}, log)
        try:
            process.wait_until_ready(ready_url, deadline)
            yield process
        finally:
            failure = process.stop()
            process._printed = process.output()
    if failure:
        raise RuntimeError(failure)


def free_port() -> int:
    """Return a port that is free now, for a process that cannot be handed a socket."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def post(url: str) -> int:
    """POST to `url` on a connection of its own; the status, once the response is complete."""
    parts = urlsplit(url)
    client = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=2 * PATIENCE)
    with closing(client):
        client.request("POST", parts._replace(scheme="", netloc="").geturl() or "/")
        response = client.getresponse()
        response.read()
        return response.status


def reset(transport: asyncio.WriteTransport) -> None:
    """End a connection as when a machine dies: the peer gets an RST, and no FIN."""
    sock = transport.get_extra_info("socket")
    with suppress(OSError):  # closed already
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()


def _answers(url: str) -> bool:
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=1)
    try:
        connection.request("GET", parts.path or "/")
        connection.getresponse().read()
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
    return True
