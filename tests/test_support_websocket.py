"""The WebSocket client: it talks to an application, and holds it to the protocol."""

import pytest

from tests.support import server
from tests.support.asgi import (
    ASGIApp,
    Message,
    ProtocolViolation,
    Receive,
    Scope,
    Send,
    websocket,
)

ACCEPT: Message = {"type": "websocket.accept"}
CLOSE: Message = {"type": "websocket.close", "code": 4000}
TEXT: Message = {"type": "websocket.send", "text": "x"}


def sending(*messages: Message) -> ASGIApp:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        for message in messages:
            await send(message)

    return app


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    assert await receive() == {"type": "websocket.connect"}
    await send({"type": "websocket.accept", "subprotocol": "chat"})
    while (message := await receive())["type"] == "websocket.receive":
        await send({**message, "type": "websocket.send"})
    assert message == {"type": "websocket.disconnect", "code": 1001}
    with pytest.raises(OSError, match="the client is gone"):
        await send(TEXT)


async def test_conversation() -> None:
    """Text and bytes go both ways, and the application learns that the client has left."""
    async with websocket(echo, "/chat?room=1", subprotocols=["chat"]) as client:
        assert client.accepted
        await client.send("a")
        assert (await client.receive())["text"] == "a"
        await client.send(b"b")
        assert (await client.receive())["bytes"] == b"b"
        await client.disconnect(1001)
    assert client.exception is None
    assert len(client.messages) == 3


async def test_closed_by_the_application() -> None:
    """A refusal, a close and an exception are results that a test looks at."""
    async with websocket(sending(CLOSE)) as client:
        assert (client.accepted, client.closed) == (False, True)
    async with websocket(sending(ACCEPT, CLOSE)) as client:
        assert await client.receive() == CLOSE

    async def broken(scope: Scope, receive: Receive, send: Send) -> None:
        raise ZeroDivisionError

    async with websocket(broken) as client:
        assert (client.accepted, client.closed) == (False, True)
        with pytest.raises(ConnectionError, match="the application has ended"):
            await client.receive()
    assert isinstance(client.exception, ZeroDivisionError)


async def test_denial() -> None:
    """An HTTP response instead of an answer is allowed where the server offers it."""
    denial = sending(
        {"type": "websocket.http.response.start", "status": 401},
        {"type": "websocket.http.response.body"},
    )
    async with websocket(denial, extensions=["websocket.http.response"]) as client:
        assert (client.accepted, client.closed) == (False, True)
        assert client.messages[0]["status"] == 401
    with pytest.raises(ProtocolViolation, match="while the WebSocket was connecting"):
        async with websocket(denial):
            pass


@pytest.mark.parametrize(
    "messages",
    [
        [TEXT],
        [ACCEPT, ACCEPT],
        [ACCEPT, CLOSE, TEXT],
        [{**ACCEPT, "subprotocol": "not-offered"}],
        [{**ACCEPT, "headers": [(b"sec-websocket-protocol", b"a")]}],
        [ACCEPT, {"type": "websocket.send"}],
        [ACCEPT, {"type": "websocket.send", "text": "x", "bytes": b"x"}],
        [ACCEPT, {"type": "websocket.send", "text": b"x"}],
        [{"type": "websocket.close", "code": "1000"}],
        [{"type": "http.response.start", "status": 200}],
    ],
)
async def test_violation(messages: list[Message]) -> None:
    """Each broken rule fails the test."""
    with pytest.raises(ProtocolViolation):
        async with websocket(sending(*messages)):
            pass


async def test_an_application_that_does_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """An application that ignores the disconnect is cancelled and reported."""
    monkeypatch.setattr(server, "PATIENCE", 0.05)

    async def deaf(scope: Scope, receive: Receive, send: Send) -> None:
        await send(ACCEPT)
        while True:
            await receive()

    with pytest.raises(TimeoutError, match="did not end"):
        async with websocket(deaf):
            pass
