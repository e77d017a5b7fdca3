"""What an ASGI application may send as an HTTP response, and when: rules without a server.

The rules are those of the ASGI specification (HTTP & WebSocket 2.5 and its extensions). Where
servers are lenient the rules are not, because a middleware that is wrong only on a strict
server is wrong.
"""

import enum
import io
import os
import re
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any, TypeVar

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]
RawHeaders = list[tuple[bytes, bytes]]

T = TypeVar("T")

_TOKEN = re.compile(rb"[!#$%&'*+.^_`|~0-9a-z-]+")
_REQUIRED: Any = object()


class ProtocolViolation(AssertionError):  # noqa: N818
    """The application broke a rule of the ASGI specification."""


def field(message: Message, key: str, kind: type[T], default: T = _REQUIRED) -> T:
    """Return `message[key]`, which must be a `kind`; without a default it must be there."""
    value = message.get(key, default)
    if value is _REQUIRED:
        raise ProtocolViolation(f"{message['type']} has no {key!r}")
    # A bool is an int to Python, but no status and no count.
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ProtocolViolation(
            f"{message['type']}: {key!r} must be {kind.__name__}, not {value!r}"
        )
    return value


def checked_headers(message: Message) -> RawHeaders:
    """Return the headers of a message: pairs of bytes, names in lower case."""
    headers: RawHeaders = []
    for pair in message.get("headers", ()):
        try:
            name, value = pair
        except (TypeError, ValueError):
            raise ProtocolViolation(f"header {pair!r} is no pair of name and value") from None
        if not isinstance(name, bytes) or not isinstance(value, bytes):
            raise ProtocolViolation(f"header {pair!r} must be a pair of bytes")
        if not _TOKEN.fullmatch(name):
            raise ProtocolViolation(f"header name {name!r} is no lower-case token")
        if re.search(rb"[\r\n\0]", value):
            raise ProtocolViolation(f"header {name!r} has a line break or NUL in its value")
        headers.append((name, value))
    return headers


class Phase(enum.Enum):
    """How far a response has come."""

    BEFORE = "before the response was started"
    BODY = "after the response was started"
    TRAILERS = "after the body was complete"
    DONE = "after the response was complete"


_ALLOWED_IN = {
    "http.response.debug": {Phase.BEFORE},
    "http.response.start": {Phase.BEFORE},
    # The specification says "after Response Start", which HTTP itself forbids for a 103;
    # servers take it in both places.
    "http.response.early_hint": {Phase.BEFORE, Phase.BODY},
    "http.response.push": {Phase.BODY},
    "http.response.body": {Phase.BODY},
    "http.response.zerocopysend": {Phase.BODY},
    "http.response.pathsend": {Phase.BODY},
    "http.response.trailers": {Phase.TRAILERS},
}
_CORE = {"http.response.start", "http.response.body"}


class ResponseRules:
    """One HTTP response: `check()` each message that the application sends.

    Args:
        method: of the request; the response to a HEAD has no body.
        offered: names of the extensions that the scope offers.
        drop_head_body: discard the body of a response to HEAD, as uvicorn and others do for
            applications that answer HEAD with what they answer to GET, instead of refusing it.
    """

    def __init__(
        self, method: str, offered: Iterable[str] = (), *, drop_head_body: bool = False
    ) -> None:
        self.phase = Phase.BEFORE
        self.status: int | None = None
        self.headers: RawHeaders = []
        self._head = method == "HEAD"
        self._drop_body = self._head and drop_head_body
        self._offered = frozenset(offered)
        self._announced_trailers = False
        self._promised: int | None = None  # what Content-Length says
        self._length = 0
        self._has_chunks = False
        self._has_debug = False

    def check(self, message: Message) -> bytes:
        """Take the application's next message; return the bytes of body that it sends."""
        kind = message.get("type")
        if not isinstance(kind, str) or kind not in _ALLOWED_IN:
            raise ProtocolViolation(f"{kind!r} is no message of an HTTP response")
        if kind not in _CORE and kind not in self._offered:
            raise ProtocolViolation(f"{kind} sent, but the scope does not offer that extension")
        if self.phase not in _ALLOWED_IN[kind]:
            raise ProtocolViolation(f"{kind} sent {self.phase.value}")
        match kind.removeprefix("http.response."):
            case "start":
                self._start(message)
            case "body":
                return self._chunk(field(message, "body", bytes, b""), message)
            case "zerocopysend":
                return self._chunk(_read_descriptor(message), message)
            case "pathsend":
                return self._file(message)
            case "trailers":
                checked_headers(message)
                if not field(message, "more_trailers", bool, False):
                    self.phase = Phase.DONE
            case "push":
                field(message, "path", str)
                checked_headers(message)
            case "early_hint":
                if not all(isinstance(link, bytes) for link in message.get("links", ())):
                    raise ProtocolViolation("http.response.early_hint: 'links' must be bytes")
            case "debug":
                field(message, "info", dict)
                if self._has_debug:
                    raise ProtocolViolation("http.response.debug sent twice")
                self._has_debug = True
        return b""

    def _start(self, message: Message) -> None:
        status = field(message, "status", int)
        if not 100 <= status <= 599:
            raise ProtocolViolation(f"http.response.start: status {status} is not in 100..599")
        trailers = field(message, "trailers", bool, False)
        if trailers and "http.response.trailers" not in self._offered:
            raise ProtocolViolation("trailers announced, but the scope does not offer them")
        headers = checked_headers(message)
        lengths = [value for name, value in headers if name == b"content-length"]
        if len(lengths) > 1 or not all(length.isdigit() for length in lengths):
            raise ProtocolViolation(f"Content-Length must be one number, not {lengths!r}")
        self.status, self.headers, self.phase = status, headers, Phase.BODY
        self._announced_trailers = trailers
        if lengths and not self._head and status != 304:
            self._promised = int(lengths[0])

    def _file(self, message: Message) -> bytes:
        path = field(message, "path", str)
        if self._has_chunks:
            raise ProtocolViolation(
                "http.response.pathsend cannot be mixed with http.response.body"
            )
        if not os.path.isabs(path):
            raise ProtocolViolation(f"http.response.pathsend: {path!r} is no absolute path")
        with open(path, "rb") as file:
            return self._chunk(file.read(), {"type": message["type"]})

    def _chunk(self, chunk: bytes, message: Message) -> bytes:
        more = field(message, "more_body", bool, False)
        self._has_chunks = True
        if self._drop_body:
            chunk = b""
        elif chunk and (self._head or self.status in (204, 304)):
            what = "HEAD" if self._head else self.status
            raise ProtocolViolation(f"a response to HEAD, a 204 and a 304 have no body: {what}")
        self._length += len(chunk)
        if self._promised is not None:
            short = not more and self._length < self._promised
            if short or self._length > self._promised:
                raise ProtocolViolation(
                    f"Content-Length is {self._promised}, but the body has {self._length} bytes"
                )
        if not more:
            self.phase = Phase.TRAILERS if self._announced_trailers else Phase.DONE
        return chunk


def _read_descriptor(message: Message) -> bytes:
    file = message.get("file")
    descriptor: int = file if isinstance(file, int) else field(message, "file", io.IOBase).fileno()
    count = field(message, "count", int, os.fstat(descriptor).st_size)
    if "offset" in message:
        return os.pread(descriptor, count, field(message, "offset", int))
    return os.read(descriptor, count)
