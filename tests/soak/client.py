"""Clients with all kinds of manners, which know exactly what they have received."""

import asyncio
import contextlib
import math
import socket
import struct
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import h11

from tests.soak.kinds import NO_ANSWER, Kind, Seen

#: Seconds after which a response that does not come is a bug of the server.
PATIENCE = 60.0

_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close at once, and forget what was not sent


@dataclass(frozen=True)
class Manners:
    """How a client behaves.

    Attributes:
        sends: how much of its request it sends before it goes, 1 being all.
        waits: seconds for which it waits for the complete response before it goes.
        reads: bytes of the body after which it goes.
        slowly: whether it sends and reads bit by bit.
        rudely: whether it goes by a reset of the connection.
    """

    sends: float = 1
    waits: float = math.inf
    reads: float = math.inf
    slowly: bool = False
    rudely: bool = False

    @property
    def leaves(self) -> bool:
        """Whether it goes before it has the complete response."""
        return self.sends < 1 or min(self.waits, self.reads) < math.inf


@dataclass(frozen=True)
class Request:
    """One request of a soak; `number` is its identity."""

    number: int
    kind: Kind
    query: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    manners: Manners = Manners()

    def __str__(self) -> str:
        return f"request {self.number}, {self.kind.method} /{self.kind.name} {self.query}"


class Client:
    """Sends requests one after the other, on one connection as long as that is possible."""

    def __init__(self, base_url: str) -> None:
        parts = urlsplit(base_url)
        self._host, self._port = parts.hostname or "", parts.port or 80
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._http = h11.Connection(h11.CLIENT)

    async def ask(self, request: Request) -> Seen:
        """Send a request; return what has been seen of the response."""
        manners = request.manners
        progress = _Progress(reused=self._writer is not None)
        try:
            async with asyncio.timeout(min(manners.waits, PATIENCE)):
                await self._connect(slowly=manners.slowly)
                await self._send(request, progress)
                if progress.sent:
                    await self._receive(manners, progress)
                else:
                    await asyncio.sleep(min(manners.waits, 0.01))  # and then it goes
        except TimeoutError:
            progress.error = NO_ANSWER if manners.waits == math.inf else "it went"
        except (OSError, h11.RemoteProtocolError) as error:
            progress.error = repr(error)  # what has been seen by then is what there is
        if progress.complete and not manners.rudely and self._http.our_state is h11.DONE:
            self._http.start_next_cycle()
        else:
            await self.close(rudely=manners.rudely)
        return progress.seen()

    async def close(self, *, rudely: bool = False) -> None:
        writer, self._writer = self._writer, None
        if writer is None:
            return
        with contextlib.suppress(OSError):  # the server may have been faster
            if rudely:
                connection: socket.socket = writer.get_extra_info("socket")
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                writer.transport.abort()
            writer.close()
            await writer.wait_closed()

    async def _connect(self, *, slowly: bool) -> None:
        if self._writer is not None:
            return
        connection = socket.socket()
        connection.setblocking(False)
        try:
            if slowly:  # so that the server notices how little is read
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            await asyncio.get_running_loop().sock_connect(connection, (self._host, self._port))
        except BaseException:
            connection.close()
            raise
        self._http = h11.Connection(h11.CLIENT)
        limit = 1024 if slowly else 65536
        self._reader, self._writer = await asyncio.open_connection(sock=connection, limit=limit)

    async def _send(self, request: Request, progress: "_Progress") -> None:
        assert self._writer is not None
        headers = {
            "host": self._host,
            "content-length": str(len(request.body)),
            "content-type": "text/plain",
            **request.headers,
        }
        target = f"/{request.kind.name}/{request.number}?{request.query}"
        head = h11.Request(method=request.kind.method, target=target, headers=[*headers.items()])
        data = b"".join(
            self._http.send(event) or b""
            for event in (head, h11.Data(data=request.body), h11.EndOfMessage())
        )
        data = data[: math.ceil(len(data) * request.manners.sends)]
        for piece in _pieces(data, 4 if request.manners.slowly else 1):
            self._writer.write(piece)
            await self._writer.drain()
            if request.manners.slowly:
                await asyncio.sleep(0.005)
        progress.sent = request.manners.sends == 1

    async def _receive(self, manners: Manners, progress: "_Progress") -> None:
        assert self._reader is not None
        while not progress.complete:
            event = self._http.next_event()
            if event is h11.NEED_DATA:
                if manners.slowly:
                    await asyncio.sleep(0.002)
                self._http.receive_data(await self._reader.read(2048 if manners.slowly else 65536))
            elif isinstance(event, h11.Response):
                progress.status = event.status_code
            elif isinstance(event, h11.Data):
                progress.body += event.data
            else:
                progress.complete = isinstance(event, h11.EndOfMessage)
                if not progress.complete:
                    return  # closed
            if progress.status is not None and len(progress.body) >= manners.reads:
                return


class _Progress:
    """What has been seen so far."""

    def __init__(self, *, reused: bool) -> None:
        self.reused = reused
        self.status: int | None = None
        self.complete = False
        self.body = bytearray()
        self.sent = False
        self.error = ""

    def seen(self) -> Seen:
        return Seen(
            self.status, self.complete, bytes(self.body), self.sent, self.reused, self.error
        )


def _pieces(data: bytes, count: int) -> list[bytes]:
    length = max(1, math.ceil(len(data) / count))
    return [data[start : start + length] for start in range(0, len(data), length)]
