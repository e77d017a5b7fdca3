"""One WebSocket to an application, the test being its client."""

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from typing import Any

from tests.support.protocol import (
    ASGIApp,
    Message,
    Phase,
    ProtocolViolation,
    ResponseRules,
    checked_headers,
    field,
)
from tests.support.server import (
    PATIENCE,
    ClientDisconnected,
    Headers,
    OnMessage,
    call_hook,
    connection_scope,
    end_app,
    raise_errors,
    run_app,
)


class WebSocketRules:
    """One WebSocket: answered once, silent after its end."""

    def __init__(self, subprotocols: Iterable[str] = (), offered: Iterable[str] = ()) -> None:
        self.state = "connecting"  # then "open", "denying" or "closed"
        self.denial = ResponseRules("GET")
        self._subprotocols = {None, *subprotocols}
        self._can_deny = "websocket.http.response" in offered

    def check(self, message: Message) -> None:
        """Take the application's next message."""
        kind = message.get("type")
        match kind, self.state:
            case "websocket.accept", "connecting":
                if message.get("subprotocol") not in self._subprotocols:
                    raise ProtocolViolation("the client did not offer that subprotocol")
                if any(name == b"sec-websocket-protocol" for name, _ in checked_headers(message)):
                    raise ProtocolViolation("use 'subprotocol', not a header of that name")
                self.state = "open"
            case "websocket.send", "open":
                data, text = message.get("bytes"), message.get("text")
                if not (isinstance(data, bytes) and text is None) and not (
                    data is None and isinstance(text, str)
                ):
                    raise ProtocolViolation("websocket.send takes one of 'bytes' and 'text'")
            case "websocket.close", ("connecting" | "open"):
                field(message, "code", int, 1000)
                self.state = "closed"
            case (
                "websocket.http.response.start" | "websocket.http.response.body",
                ("connecting" | "denying"),
            ) if self._can_deny:
                self.denial.check({**message, "type": str(kind).removeprefix("websocket.")})
                self.state = "closed" if self.denial.phase is Phase.DONE else "denying"
            case _:
                raise ProtocolViolation(f"{kind!r} sent while the WebSocket was {self.state}")


class WebSocket:
    """The client's side.

    Attributes:
        messages: everything the application has sent.
        exception: what left the application, if anything; known once it has ended.
    """

    def __init__(
        self, app: ASGIApp, scope: Mapping[str, Any], on_message: OnMessage | None
    ) -> None:
        self.messages: list[Message] = []
        self.exception: BaseException | None = None
        self.errors: list[BaseException] = []
        self._rules = WebSocketRules(scope["subprotocols"], scope["extensions"])
        self._on_message = on_message
        self._gone = False
        self._answered = asyncio.Event()
        self._to_app: asyncio.Queue[Message] = asyncio.Queue()
        self._to_client: asyncio.Queue[Message] = asyncio.Queue()
        self._to_app.put_nowait({"type": "websocket.connect"})
        self._task = asyncio.create_task(run_app(app, {**scope}, self._to_app.get, self._send))

    @property
    def accepted(self) -> bool:
        """Whether the application accepted the connection."""
        return any(message["type"] == "websocket.accept" for message in self.messages)

    @property
    def closed(self) -> bool:
        """Whether the application has closed, denied or left the connection, or the client has."""
        return self._gone or self._rules.state == "closed" or self._task.done()

    async def _send(self, message: Message) -> None:
        if self._gone:
            raise ClientDisconnected("the client is gone")
        try:
            self._rules.check(message)
        except ProtocolViolation as violation:
            self.errors.append(violation)
            self._answered.set()  # do not wait for more from an application that is wrong
            raise
        self.messages.append({**message})
        await call_hook(self._on_message, message, self.errors)
        if self._answered.is_set():
            self._to_client.put_nowait(message)
        self._answered.set()
        if self._rules.state == "closed":
            self._to_app.put_nowait(
                {"type": "websocket.disconnect", "code": message.get("code", 1000)}
            )

    async def handshake(self) -> None:
        """Wait until the application has accepted, closed, or ended."""
        answer = asyncio.create_task(self._answered.wait())
        await asyncio.wait({answer, self._task}, return_when=asyncio.FIRST_COMPLETED)
        answer.cancel()

    async def receive(self) -> Message:
        """Return the application's next message after its answer to the handshake.

        Raises:
            ConnectionError: the application has ended, or sends nothing for some seconds.
        """
        next_message = asyncio.create_task(self._to_client.get())
        await asyncio.wait(
            {next_message, self._task}, timeout=PATIENCE, return_when=asyncio.FIRST_COMPLETED
        )
        # What was sent just before the application ended is still delivered.
        if next_message.done():
            return next_message.result()
        next_message.cancel()
        why = "the application has ended" if self._task.done() else f"nothing came in {PATIENCE} s"
        raise ConnectionError(f"no message to receive: {why}")

    async def send(self, data: str | bytes) -> None:
        """Send a message to the application."""
        key = "text" if isinstance(data, str) else "bytes"
        self._to_app.put_nowait({"type": "websocket.receive", key: data})

    async def disconnect(self, code: int = 1005) -> None:
        """Go away, and wait until the application has ended."""
        if not self.closed:
            self._to_app.put_nowait({"type": "websocket.disconnect", "code": code})
        self._gone = True
        self.exception = await end_app(self._task)


@asynccontextmanager
async def websocket(
    app: ASGIApp,
    path: str = "/",
    *,
    headers: Headers = (),
    subprotocols: Iterable[str] = (),
    extensions: Iterable[str] = (),
    state: Mapping[str, Any] | None = None,
    on_message: OnMessage | None = None,
) -> AsyncIterator[WebSocket]:
    """Connect to `app`; the block begins when it has answered, and ends with a disconnect.

    Raises:
        ProtocolViolation: the application broke the protocol, whatever it made of the error.
    """
    scope = connection_scope("websocket", path, headers, extensions, state)
    client = WebSocket(app, scope | {"subprotocols": list(subprotocols)}, on_message)
    try:
        try:
            await client.handshake()
            yield client
        finally:
            await client.disconnect()
    finally:
        raise_errors(client.errors, client.exception)
