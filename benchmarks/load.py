"""A load over real sockets: keep-alive connections, each with one request at a time.

Sends to 127.0.0.1 and to nothing else, a number of requests that is given, and then stops.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from statistics import quantiles

from benchmarks.client import path
from benchmarks.hosts import METHODS

_PATIENCE = 120.0  # seconds


class Connection(asyncio.Protocol):
    """Sends the next request as soon as the answer to its last one is complete."""

    def __init__(self, endpoint: str, numbers: Iterator[int], took: list[float]) -> None:
        self._endpoint = endpoint
        self._numbers = numbers
        self._took = took
        self._transport: asyncio.Transport | None = None
        self._answer = b""
        self._sent_at = 0.0
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._send_next()

    def data_received(self, data: bytes) -> None:
        self._answer += data
        head, end, body = self._answer.partition(b"\r\n\r\n")
        if not end:
            return
        status, *headers = head.lower().split(b"\r\n")
        length = next(h for h in headers if h.startswith(b"content-length:"))
        if len(body) < int(length.partition(b":")[2]):
            return
        self._took.append(time.perf_counter() - self._sent_at)
        if status != b"http/1.1 200 ok":
            self._end(RuntimeError(f"{self._endpoint} was answered by {status.decode()}"))
            return
        self._answer = b""
        self._send_next()

    def connection_lost(self, error: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(error or ConnectionError("the server closed the connection"))

    def _send_next(self) -> None:
        assert self._transport is not None
        number = next(self._numbers, None)
        if number is None:
            self._end(None)
            return
        method = METHODS.get(self._endpoint, "GET")
        length = "content-length: 0\r\n" if method == "POST" else ""
        request = (
            f"{method} {path(self._endpoint, number)} HTTP/1.1\r\nhost: 127.0.0.1\r\n{length}\r\n"
        )
        self._sent_at = time.perf_counter()
        self._transport.write(request.encode())

    def _end(self, error: Exception | None) -> None:
        assert self._transport is not None
        if error is None:
            self.done.set_result(None)
        else:
            self.done.set_exception(error)
        self._transport.close()


async def fire(port: int, endpoint: str, count: int, connections: int) -> dict[str, float]:
    """Send `count` requests to 127.0.0.1; how many a second, and how long they took.

    Returns:
        `wall`, the seconds of the clock for each; `p50` and `p99`, the seconds until its answer
        was complete.
    """
    loop = asyncio.get_running_loop()
    numbers = iter(range(count))
    took: list[float] = []
    start = time.perf_counter()
    opened = await asyncio.gather(
        *(
            loop.create_connection(lambda: Connection(endpoint, numbers, took), "127.0.0.1", port)
            for _ in range(connections)
        )
    )
    async with asyncio.timeout(_PATIENCE):
        await asyncio.gather(*(connection.done for _, connection in opened))
    wall = time.perf_counter() - start
    percentiles = quantiles(took, n=100)
    return {"wall": wall / count, "p50": percentiles[49], "p99": percentiles[98]}
