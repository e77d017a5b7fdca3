"""Calls an application as a server does, without HTTP and without sockets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import asynccontextmanager
from typing import Any

from benchmarks.hosts import METHODS, ASGIApp, Message
from benchmarks.models import ROWS

_HEADERS = [(b"host", b"127.0.0.1"), (b"accept", b"*/*"), (b"user-agent", b"benchmarks")]


def path(endpoint: str, number: int) -> str:
    """The path of a case's request; the key is one that exists."""
    # Not the last ten: `mixed` also reads what follows.
    return f"/{endpoint}/{number % (ROWS - 10) + 1}"


class Request:
    """One request: the server's side of it."""

    __slots__ = ("_body_is_read", "_is_complete", "_waiting", "scope", "status")

    def __init__(self, endpoint: str, number: int, state: dict[str, Any]) -> None:
        target = path(endpoint, number)
        self.scope: MutableMapping[str, Any] = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": "1.1",
            "method": METHODS.get(endpoint, "GET"),
            "scheme": "http",
            "path": target,
            "raw_path": target.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": _HEADERS,
            "client": ("127.0.0.1", 50000),
            "server": ("127.0.0.1", 80),
            "state": state.copy(),
        }
        self.status = 0
        self._body_is_read = False
        self._is_complete = False
        self._waiting: asyncio.Event | None = None

    async def receive(self) -> Message:
        if not self._body_is_read:
            self._body_is_read = True
            return {"type": "http.request", "body": b"", "more_body": False}
        if not self._is_complete:
            self._waiting = self._waiting or asyncio.Event()
            await self._waiting.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        elif not message.get("more_body"):
            self._is_complete = True
            if self._waiting is not None:
                self._waiting.set()

    async def run(self, app: ASGIApp) -> None:
        """Run the application; whatever is not a 200 ends the benchmark."""
        await app(self.scope, self.receive, self.send)
        if self.status != 200:
            raise RuntimeError(f"{self.scope['path']} was answered with {self.status}")


class Recorded(Request):
    """A request whose answer is kept.

    Args:
        on_start: awaited when the answer starts.
    """

    __slots__ = ("_on_start", "body")

    def __init__(
        self, endpoint: str, state: dict[str, Any], on_start: Callable[[], Awaitable[None]]
    ) -> None:
        super().__init__(endpoint, 0, state)
        self._on_start = on_start
        self.body = b""

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            await self._on_start()
        await super().send(message)
        self.body += message.get("body", b"")


async def run_requests(
    app: ASGIApp, endpoint: str, count: int, concurrency: int, state: dict[str, Any]
) -> None:
    """Run `count` requests, always `concurrency` of them at a time."""
    if concurrency == 1:
        for number in range(count):
            await Request(endpoint, number, state).run(app)
        return
    numbers = iter(range(count))

    async def client() -> None:
        for number in numbers:
            # In a task of its own, as servers do it.
            await asyncio.create_task(Request(endpoint, number, state).run(app))

    async with asyncio.TaskGroup() as clients:
        for _ in range(concurrency):
            clients.create_task(client())


@asynccontextmanager
async def started(app: ASGIApp) -> AsyncIterator[dict[str, Any]]:
    """Start the application, and stop it in the end; gives the state for its requests."""
    received: asyncio.Queue[Message] = asyncio.Queue()
    sent: asyncio.Queue[Message] = asyncio.Queue()
    state: dict[str, Any] = {}
    scope = {"type": "lifespan", "asgi": {"version": "3.0", "spec_version": "2.0"}, "state": state}

    async def live() -> None:
        await app(scope, received.get, sent.put)
        await sent.put({"type": "the end"})

    async def ask(step: str) -> None:
        await received.put({"type": f"lifespan.{step}"})
        answer = asyncio.create_task(sent.get())
        done, _ = await asyncio.wait({living, answer}, return_when=asyncio.FIRST_COMPLETED)
        if answer not in done:
            answer.cancel()
            await living  # raises
        elif answer.result()["type"] != f"lifespan.{step}.complete":
            raise RuntimeError(f"the application did not complete its {step}: {answer.result()}")

    living = asyncio.create_task(live())
    await ask("startup")
    try:
        yield state
    finally:
        await ask("shutdown")
        await living
