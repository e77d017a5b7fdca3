"""What the client has sent, given to one attempt after the other.

Requests that are really served again are in tests/middleware/test_replay.py.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from repom.middleware.repeatable import Reading, RepeatableRequest
from tests.support.asgi import ClientDisconnected, Message, Scope

DISCONNECT: Message = {"type": "http.disconnect"}


def part(body: bytes, *, more: bool = False) -> Message:
    return {"type": "http.request", "body": body, "more_body": more}


class Server:
    """The other end of a request.

    Attributes:
        arriving: what `receive` has to give.
        sent: what it was given to send.
    """

    def __init__(self, *messages: Message) -> None:
        self.arriving: asyncio.Queue[Message] = asyncio.Queue()
        self.sent: list[Message] = []
        for message in messages:
            self.arriving.put_nowait(message)

    async def send(self, message: Message) -> None:
        self.sent.append(message)

    def request(self, scope: Scope | None = None, *, body_limit: int = 100) -> RepeatableRequest:
        scope = {} if scope is None else scope
        return RepeatableRequest(scope, self.arriving.get, self.send, body_limit=body_limit)


# --- the body


async def test_each_attempt_reads_from_the_beginning() -> None:
    """What one has read, and then what none has."""
    request = Server(part(b"a", more=True), part(b"b")).request()
    first, second = Reading(request), Reading(request)
    assert await first() == part(b"a", more=True)
    assert [await second() for _ in range(2)] == [part(b"a", more=True), part(b"b")]
    assert request.obstacle is None


async def test_messages_are_the_attempts_own() -> None:
    """What it does to them, the next one does not see."""
    request = Server(part(b"a")).request()
    (await Reading(request)()).clear()
    assert await Reading(request)() == part(b"a")


async def test_long_body_is_given_once() -> None:
    """All of it, and nothing is kept from the moment on at which it was found to be long."""
    messages = [part(b"ab", more=True), part(b"cd", more=True), part(b"ef", more=True), part(b"")]
    request = Server(*messages).request(body_limit=3)
    reading = Reading(request)
    assert [await reading() for _ in messages] == messages
    assert request.obstacle == "its body has more than 3 bytes"
    assert [each is None for each in request._kept] == [False, True, True, True]


@pytest.mark.parametrize("message", [{"type": "http.request"}, part(b"abc")])
async def test_body_up_to_the_limit(message: Message) -> None:
    """A message may leave out what is empty (ASGI)."""
    request = Server(message).request(body_limit=3)
    await Reading(request)()
    assert request.obstacle is None


async def test_concurrent_readers_of_one_attempt() -> None:
    """Each message goes to one of them."""
    server = Server()
    reading = Reading(server.request())
    both = asyncio.gather(reading(), reading())
    for message in (part(b"a", more=True), part(b"b")):
        await asyncio.sleep(0)
        server.arriving.put_nowait(message)
    assert [message["body"] for message in await both] == [b"a", b"b"]


async def test_reader_of_an_attempt_that_is_over() -> None:
    """For it the client is gone. What arrives it leaves to the next one, if it has been waiting
    for it or not."""
    server = Server()
    request = server.request()
    first, second = Reading(request), Reading(request)
    left_over = asyncio.ensure_future(first())
    await asyncio.sleep(0)
    first.is_over = True
    waiting = asyncio.ensure_future(second())
    server.arriving.put_nowait(part(b"a"))
    assert await left_over == DISCONNECT
    assert await waiting == part(b"a")
    assert await first() == DISCONNECT


async def test_cancelled_reader() -> None:
    """As a framework's that listens for the end of the client beside the endpoint."""
    server = Server()
    request = server.request()
    listening = asyncio.ensure_future(Reading(request)())
    await asyncio.sleep(0)
    listening.cancel()
    await asyncio.wait([listening])
    server.arriving.put_nowait(part(b"a"))
    assert await Reading(request)() == part(b"a")


# --- what speaks against another attempt


async def test_client_that_is_gone() -> None:
    """Is gone for every attempt, which all may read before that what it has sent."""
    request = Server(part(b"a"), DISCONNECT).request()
    for _ in range(2):
        reading = Reading(request)
        assert [await reading() for _ in range(3)] == [part(b"a"), DISCONNECT, DISCONNECT]
    assert (request.is_gone, request.obstacle) == (True, "the client is gone")


async def test_message_to_the_client() -> None:
    """Also one that the server refuses: it may have sent it."""

    async def refuse(message: Message) -> None:
        raise ClientDisconnected

    server = Server()
    request = RepeatableRequest({}, server.arriving.get, refuse, body_limit=1)
    with pytest.raises(ClientDisconnected):
        await request.send({"type": "http.response.early_hint"})
    assert request.obstacle == "a part of its response has been sent"


async def test_first_obstacle_counts() -> None:
    request = Server().request()
    request.block("a")
    request.block("b")
    assert request.obstacle == "a"


# --- the pause


@asynccontextmanager
async def taking(at_least: float, at_most: float) -> AsyncIterator[None]:
    """The block takes so many seconds."""
    begun = time.perf_counter()
    yield
    assert at_least <= time.perf_counter() - begun < at_most


@pytest.mark.parametrize("messages", [[], [part(b"a")], [part(b"a"), part(b"b")]])
@pytest.mark.parametrize("reads", [True, False])
async def test_pause(messages: list[Message], reads: bool) -> None:
    """Lasts as long as it is told to, whether the body was read or not; also with a server that
    sends on after the end of it."""
    server = Server(*messages)
    request = server.request()
    if messages and reads:
        await Reading(request)()
    async with taking(0.02, 10):
        await request.pause(0.02)
    assert request.obstacle is None
    if messages and not reads:
        assert server.arriving.qsize() == len(messages)


async def test_pause_ends_when_the_client_leaves() -> None:
    server = Server(part(b"a"))
    request = server.request()
    await Reading(request)()
    asyncio.get_running_loop().call_later(0.01, server.arriving.put_nowait, DISCONNECT)
    async with taking(0, 10):
        await request.pause(30)
    assert request.is_gone


async def test_receive_that_fails_in_the_pause() -> None:
    """Its error goes on, and be it one for a time limit of its own."""
    messages = [part(b"a")]

    async def receive() -> Message:
        if not messages:
            raise TimeoutError
        return messages.pop()

    request = RepeatableRequest({}, receive, Server().send, body_limit=1)
    await Reading(request)()
    with pytest.raises(TimeoutError):
        await request.pause(30)


# --- the ASGI scope


async def test_scope_is_put_back() -> None:
    """Each time to what it was, though it stays the same object, and so does its state, which the
    layers outside may hold. What they find in both is what the last attempt has left."""
    pool = object()
    scope: dict[str, Any] = {"path": "/a", "headers": [(b"a", b"1")], "state": {"pool": pool}}
    scope["repom.scope"] = "a unit of work, which is not kept"
    state = scope["state"]
    request = Server().request(scope)
    for _ in range(2):
        scope["path"] = "/b"
        scope["route"] = "of a framework"
        scope["headers"].append((b"b", b"2"))
        scope["state"]["user"] = 1
        del state["pool"]
        request.restore()
        assert scope == {"path": "/a", "headers": [(b"a", b"1")], "state": {"pool": pool}}
        assert scope["state"] is state


async def test_state_that_an_attempt_has_added_is_removed() -> None:
    scope: dict[str, Any] = {"path": "/a"}
    request = Server().request(scope)
    scope["state"] = {}
    request.restore()
    assert scope == {"path": "/a"}
