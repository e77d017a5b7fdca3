"""An ASGI server in the test's own process, which records what reaches the wire.

`request()`, `lifespan()` and `websocket()` call an application as a server does: in a task of
its own, with a complete scope, and strictly by the specification. A rule that the application
breaks raises `ProtocolViolation` at the place where it was broken, and once more out of these
functions, so the test fails although the application may have swallowed the first.
"""

import asyncio
import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from tests.support.lifespan import Lifespan, LifespanFailed, lifespan
from tests.support.protocol import (
    ASGIApp,
    Message,
    Phase,
    ProtocolViolation,
    RawHeaders,
    Receive,
    ResponseRules,
    Scope,
    Send,
)
from tests.support.server import (
    ClientDisconnected,
    Headers,
    OnMessage,
    call_hook,
    connection_scope,
    raise_errors,
    run_app,
)
from tests.support.websocket import WebSocket, websocket

__all__ = [
    "ASGIApp",
    "ClientDisconnected",
    "Lifespan",
    "LifespanFailed",
    "Message",
    "ProtocolViolation",
    "Receive",
    "Response",
    "Scope",
    "Send",
    "Sent",
    "WebSocket",
    "lifespan",
    "request",
    "websocket",
]


@dataclass(frozen=True)
class Sent:
    """A message that reached the wire: its number in the response and `time.perf_counter()`."""

    number: int
    at: float
    message: Message


@dataclass
class Response:
    """What the client got, and what left the application.

    Attributes:
        status: None if the response never started.
        body: the bytes that reached the client.
        complete: whether the message that completes the response has arrived.
        exception: what left the application, if anything. `request()` raises it only if it is an
            `AssertionError`: that one is the test's own.
        sent: the messages, each with its number and its time.
    """

    status: int | None = None
    headers: RawHeaders = field(default_factory=list)
    body: bytes = b""
    complete: bool = False
    exception: BaseException | None = None
    sent: list[Sent] = field(default_factory=list)

    @property
    def messages(self) -> list[Message]:
        """The messages that reached the wire, in order."""
        return [sent.message for sent in self.sent]

    def header(self, name: str) -> str | None:
        """Return the first header of this name."""
        wanted = name.lower().encode("latin-1")
        return next((value.decode("latin-1") for key, value in self.headers if key == wanted), None)

    def json(self) -> Any:
        """Return the body, decoded."""
        return json.loads(self.body)


async def request(
    app: ASGIApp,
    method: str = "GET",
    path: str = "/",
    *,
    headers: Headers = (),
    body: bytes | Iterable[bytes] = b"",
    extensions: Iterable[str] = (),
    state: Mapping[str, Any] | None = None,
    scope: Mapping[str, Any] | None = None,
    on_message: OnMessage | None = None,
    disconnect_after: int | None = None,
    after_disconnect: Literal["raise", "ignore"] = "raise",
    drop_head_body: bool = False,
) -> Response:
    """Send one request to `app`, wait until it has ended, and return what the client got.

    Args:
        path: percent-encoded, with the query string if there is one.
        body: an iterable gives one `http.request` message per chunk.
        extensions: names that the scope offers, such as `"http.response.trailers"`.
        state: what the lifespan left; the request gets a shallow copy.
        scope: keys that replace those of the scope built here.
        on_message: called, and awaited, at the moment a message reaches the wire, before
            `send()` returns. An error in it fails the test and is not shown to the application.
        disconnect_after: the client is gone once so many messages have been sent; 0 means
            before the first.
        after_disconnect: what `send()` then does: raise an `OSError`, or nothing, as servers did
            before version 2.4 of the specification.
        drop_head_body: accept and discard the body of a response to HEAD (Starlette sends one).

    Raises:
        ProtocolViolation: the application broke the protocol, whatever it made of the error.

    Example:
        >>> async def app(scope, receive, send):
        ...     await send({"type": "http.response.start", "status": 204})
        ...     await send({"type": "http.response.body"})
        >>> response = asyncio.run(request(app, "DELETE", "/items/1"))
        >>> response.status, response.complete
        (204, True)
    """
    chunks = [body] if isinstance(body, bytes) else list(body)
    built = connection_scope("http", path, headers, extensions, state)
    names = {name for name, _ in built["headers"]}
    if any(chunks) and not names & {b"content-length", b"transfer-encoding"}:
        built["headers"].append((b"content-length", b"%d" % sum(map(len, chunks))))
    built |= {"method": method, **(scope or {})}
    exchange = _Exchange(
        chunks,
        ResponseRules(method, extensions, drop_head_body=drop_head_body),
        on_message,
        disconnect_after,
        after_disconnect,
    )
    response = exchange.response
    try:
        response.exception = await run_app(app, built, exchange.receive, exchange.send)
    finally:
        # Also when the request is cancelled: a violation is news, a cancellation was asked for.
        raise_errors(exchange.errors, response.exception)
    return response


class _Exchange:
    """The server's side of one request."""

    def __init__(
        self,
        chunks: list[bytes],
        rules: ResponseRules,
        on_message: OnMessage | None,
        disconnect_after: int | None,
        after_disconnect: str,
    ) -> None:
        self.response = Response()
        self.errors: list[BaseException] = []
        self._chunks = chunks or [b""]
        self._rules = rules
        self._on_message = on_message
        self._disconnect_after = disconnect_after
        self._raises = after_disconnect == "raise"
        self._over = asyncio.Event()  # the response is complete, or the client is gone
        self._gone = False
        self._disconnect_if_due()

    def _disconnect_if_due(self) -> None:
        if len(self.response.sent) == self._disconnect_after:
            self._gone = True
            self._over.set()

    async def receive(self) -> Message:
        if self._chunks:
            chunk = self._chunks.pop(0)
            return {"type": "http.request", "body": chunk, "more_body": bool(self._chunks)}
        await self._over.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        if self._gone:
            if self._raises:
                raise ClientDisconnected("the client is gone")
            return
        response = self.response
        try:
            response.body += self._rules.check(message)
        except ProtocolViolation as violation:
            self.errors.append(violation)
            raise
        response.status, response.headers = self._rules.status, self._rules.headers
        response.complete = self._rules.phase is Phase.DONE
        response.sent.append(Sent(len(response.sent), time.perf_counter(), {**message}))
        await call_hook(self._on_message, message, self.errors)
        self._disconnect_if_due()
        if response.complete:
            self._over.set()
