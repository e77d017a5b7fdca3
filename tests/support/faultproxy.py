"""A TCP proxy before a database server, which fails where a test wants it to."""

import asyncio
from types import TracebackType
from typing import Literal, NamedTuple, Self

from sqlalchemy.engine import make_url

from tests.support.sockets import reset

CHUNK = 65536

When = Literal["before", "after"]


class _Fault(NamedTuple):
    """What happens to the connection on which the client sends `needle`."""

    needle: bytes
    when: When
    stalls: bool
    let_through: int  # bytes of the answer


class FaultProxy:
    """Stands between the client and the server of a database URL.

    The connections must not be encrypted: for PostgreSQL give a URL with `?sslmode=disable`.

    Attributes:
        url: the URL by which the server is reached through the proxy.
        refuses: whether new connections are reset at once.
        round_trips: how often a client has asked something and waited for the answer.
        struck: set when a `cut` or a `stall` has happened.

    Example:
        async with FaultProxy(postgres_url) as proxy:
            proxy.cut(b"COMMIT", "before")
    """

    def __init__(self, url: str) -> None:
        self._target = make_url(url)
        self._fault: _Fault | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._sent = bytearray()
        self.refuses = False
        self.round_trips = 0
        self.struck = asyncio.Event()

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
        await self.cut_all()

    def cut(self, needle: bytes, when: When, *, let_through: int = 0) -> None:
        """Cut the next connection on which the client sends `needle`.

        Args:
            when: before the server sees it; or after, when it has answered and the client has
                not heard that.
            let_through: so many bytes of that answer the client still hears.
        """
        self._set(_Fault(needle, when, False, let_through))

    def stall(self, needle: bytes, when: When) -> None:
        """Let nothing pass any more on the next connection on which the client sends `needle`.

        It stays open, as if a cable was pulled: the client waits, and so does the server.
        """
        self._set(_Fault(needle, when, True, 0))

    async def cut_all(self) -> None:
        """Cut every open connection now."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def sent(self, needle: bytes) -> int:
        """How often clients have sent `needle`, whether it has reached the server or not."""
        return self._sent.count(needle)

    def _set(self, fault: _Fault) -> None:
        self._fault = fault
        self.struck.clear()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        if self.refuses:
            reset(writer.transport)
            return
        try:
            server_reader, server_writer = await asyncio.open_connection(
                self._target.host, self._target.port
            )
        except OSError:  # it is down
            reset(writer.transport)
            return
        link = _Link(self)
        try:
            # The first to end, for whatever reason, ends the other.
            async with asyncio.TaskGroup() as pumps:
                pumps.create_task(link.to_server(reader, server_writer))
                pumps.create_task(link.to_client(server_reader, writer))
        except* (_EndedError, OSError):
            pass
        finally:
            reset(writer.transport)
            reset(server_writer.transport)


class _Link:
    """One connection through the proxy."""

    def __init__(self, proxy: FaultProxy) -> None:
        self._proxy = proxy
        self._fault: _Fault | None = None  # which the answer is to meet
        self._server_spoke_last = True

    async def to_server(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        proxy = self._proxy
        while data := await reader.read(CHUNK):
            proxy._sent += data
            fault = proxy._fault
            if fault is not None and fault.needle in data:
                proxy._fault = None
                if fault.when == "before":
                    await self._strike(fault)
                self._fault = fault
            self._server_spoke_last = False
            writer.write(data)
            await writer.drain()
        raise _EndedError

    async def to_client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(CHUNK):
            if not self._server_spoke_last:
                self._server_spoke_last = True
                self._proxy.round_trips += 1
            fault = self._fault
            if fault is not None and len(data) > fault.let_through:
                writer.write(data[: fault.let_through])
                await writer.drain()
                await self._strike(fault)
            if fault is not None:
                self._fault = fault._replace(let_through=fault.let_through - len(data))
            writer.write(data)
            await writer.drain()
        raise _EndedError

    async def _strike(self, fault: _Fault) -> None:
        self._proxy.struck.set()
        if fault.stalls:
            await asyncio.get_running_loop().create_future()
        raise _EndedError


class _EndedError(Exception):
    """This side has nothing more to send, or not any more."""
