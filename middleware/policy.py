"""Which response commits, what completes it, what cannot be sent: pure functions, no IO."""

from __future__ import annotations

import math
import re
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from typing import Any
from urllib.parse import quote

from repom.begin import ReadOnly
from repom.errors import InvalidResponseError

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]
#: As frameworks see it: each has types of its own for the three, and none takes another's.
AnyASGIApp = Callable[[Any, Any, Any], Awaitable[Any]]
Headers = Collection[tuple[bytes, bytes]]

CommitOn = Callable[[int, Scope], bool]
ReadOnlyFor = Callable[[Scope], ReadOnly]

#: Methods that promise not to change anything (RFC 9110, section 9.2.1).
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS", "TRACE"})

#: Messages that may come before a response and tell nothing of it (ASGI extensions).
BEFORE_RESPONSE = frozenset({"http.response.debug", "http.response.early_hint"})

#: What a path may hold as it is (RFC 3986, section 3.3).
_PATH_CHARACTERS = "/:@!$&'()*+,;="

# What a header has not in it (RFC 9110, sections 5.6.2 and 5.5).
_NOT_IN_NAME = re.compile(rb"[^!#$%&'*+.^_`|~0-9A-Za-z-]")
_NOT_IN_VALUE = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")

_CHUNKS = frozenset({"http.response.body", "http.response.zerocopysend"})


def commits_on_success(status: int, asgi_scope: Scope) -> bool:
    """The default rule: 2xx and 3xx commit, everything else rolls back."""
    return 200 <= status < 400


def commits_on_2xx(status: int, asgi_scope: Scope) -> bool:
    """For those who want redirects rolled back, too."""
    return 200 <= status < 300


def safe_methods(asgi_scope: Scope) -> bool:
    """The usual rule for `read_only`: the methods that promise not to change anything only read."""
    return asgi_scope["method"] in SAFE_METHODS


def content_length(headers: Headers) -> int | None:
    """The Content-Length that a response announces, in bytes, if it does.

    With several, which no server should send, the one that a client has read first.
    """
    lengths = []
    for name, value in headers:
        lowered = name.lower()
        if lowered == b"content-length" and value.strip().isdigit():
            lengths.append(int(value))
        elif lowered == b"transfer-encoding":  # by which clients go then (RFC 9112, section 6.3)
            return None
    return min(lengths, default=None)


def has_no_body(status: int, headers: Headers) -> bool:
    """Whether the client has the complete response with its start (RFC 9112, section 6.3)."""
    return status in (204, 304) or content_length(headers) == 0


def body_bytes(message: Message) -> float:
    """How many bytes of the body a message sends, or infinity if it does not say.

    Raises:
        TypeError: the body is no bytes.
    """
    body = message.get("body")
    if type(body) is bytes:
        return len(body)
    if message["type"] == "http.response.zerocopysend":
        count: int | None = message.get("count")
        return math.inf if count is None else count  # to the end of the file
    return memoryview(body or b"").nbytes


def completes_body(message: Message, sent: float, announced: int | None) -> bool:
    """Whether the client has the complete body, or the trailers, once it has this message.

    Args:
        message: any message after `http.response.start`.
        sent: bytes of the body up to and including this message.
        announced: the Content-Length, if there is one.
    """
    kind = message["type"]
    if kind == "http.response.trailers":
        return not message.get("more_trailers", False)
    return ends_body(message) or (kind in _CHUNKS and announced is not None and sent >= announced)


def ends_body(message: Message) -> bool:
    """Whether the app says that this is the last of the body."""
    kind = message["type"]
    if kind in _CHUNKS:
        return not message.get("more_body", False)
    return bool(kind == "http.response.pathsend")


# --- what servers refuse to send


def check_start(status: int, headers: Headers) -> None:
    """Check the start of a response.

    Raises:
        InvalidResponseError: ASGI or HTTP does not allow it.
    """
    if not isinstance(status, int):
        raise _invalid(f"its status is {status!r}, and no number")
    if not _are_headers(headers):
        wrong = next(header for header in headers if not _are_headers([header]))
        name = wrong[0] if isinstance(wrong, (tuple, list)) else wrong  # the value may be secret
        raise _invalid(f"its header {name!r} is no pair of bytes, or has a line break in it")
    lengths = {
        value.strip()
        for name, value in headers
        if len(name) == len(b"content-length") and name.lower() == b"content-length"
    }
    if lengths and (len(lengths) > 1 or not min(lengths).isdigit()):
        raise _invalid(f"its Content-Length is {sorted(lengths)!r}, and not one number")


def check_length(message: Message, sent: float, announced: int | None) -> None:
    """Check what `message` makes of the body; for the arguments see `completes_body`.

    Raises:
        InvalidResponseError: the body is longer than announced, or complete and shorter.
    """
    if announced is None or math.isinf(sent) or message["type"] not in _CHUNKS:
        return
    if sent > announced or (sent < announced and ends_body(message)):
        raise _invalid(f"its body has {sent} bytes, and its Content-Length is {announced}")


def _are_headers(headers: Collection[Any]) -> bool:
    if not headers:
        return True
    try:
        # All at once, which costs the least.
        names, values = zip(*headers, strict=True)
        if _NOT_IN_NAME.search(b"".join(names)) or _NOT_IN_VALUE.search(b"".join(values)):
            return False
        return all(names)
    except (TypeError, ValueError):
        return False


def _invalid(why: str) -> InvalidResponseError:
    return InvalidResponseError(
        f"the response of the application cannot be sent: {why}.\n"
        "A server would have found out after COMMIT, and answered with an error. What was open "
        "is rolled back; correct the response."
    )


class Label:
    """The request, for logs: "POST /articles". Made only if a log or an error asks for it.

    Without the query, which may hold secrets.
    """

    # Not the ASGI scope: what holds a label must not keep the whole request alive.
    __slots__ = ("_method", "_path")

    def __init__(self, method: str, path: str) -> None:
        self._method = method
        self._path = path

    def __str__(self) -> str:
        # The server has decoded the path, in which a client can so have put a line break.
        return f"{self._method} {quote(self._path, safe=_PATH_CHARACTERS)}"
