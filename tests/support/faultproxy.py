"""A TCP proxy before a database server that cuts the connection where a test wants it."""

import asyncio
import contextlib
import socket
import struct
from types import TracebackType
from typing import Literal, Self

from sqlalchemy.engine import make_url

CHUNK = 65536


class FaultProxy:
    """Stands between the client and the server of a database URL.

    The connections must not be encrypted: for PostgreSQL give a URL with `?sslmode=disable`.

    Attributes:
        url: the URL by which the server is reached through the proxy.

    Example:
        async with FaultProxy(postgres_url) as proxy:
            proxy.cut(b"COMMIT", "before")
    """

    def __init__(self, url: str) -> None:
        self._target = make_url(url)
        self._needle: bytes | None = None
        self._server_sees_it = False
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        host, port = self._server.sockets[0].getsockname()
        url = self._target.set(host=host, port=port)
        self.url = url.render_as_string(hide_password=False)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def cut(self, needle: bytes, when: Literal["before", "after"]) -> None:
        """Cut the next connection on which the client sends `needle`.

        Args:
            when: before the server sees it; or after, when it has answered and the client has
                not heard that.
        """
        self._needle = needle
        self._server_sees_it = when == "after"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        server_reader, server_writer = await asyncio.open_connection(
            self._target.host, self._target.port
        )
        try:
            # The first to end, for whatever reason, ends the other.
            async with asyncio.TaskGroup() as pumps:
                cut = asyncio.Event()
                pumps.create_task(self._to_server(reader, server_writer, cut))
                pumps.create_task(self._to_client(server_reader, writer, cut))
        except* (_EndedError, OSError):
            pass
        finally:
            _reset(writer)
            _reset(server_writer)

    async def _to_server(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, cut: asyncio.Event
    ) -> None:
        while data := await reader.read(CHUNK):
            if self._needle is not None and self._needle in data:
                self._needle = None
                if not self._server_sees_it:
                    raise _EndedError
                cut.set()
            writer.write(data)
            await writer.drain()
        raise _EndedError

    async def _to_client(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, cut: asyncio.Event
    ) -> None:
        while data := await reader.read(CHUNK):
            if cut.is_set():
                break
            writer.write(data)
            await writer.drain()
        raise _EndedError


class _EndedError(Exception):
    """This side has nothing more to send."""


def _reset(writer: asyncio.StreamWriter) -> None:
    # SO_LINGER with zero seconds: the peer gets an RST, as when a machine dies, and no FIN.
    sock = writer.get_extra_info("socket")
    with contextlib.suppress(OSError):  # closed already
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
