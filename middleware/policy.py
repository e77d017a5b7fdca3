"""Which response commits, and what completes it: pure functions, no IO."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from typing import Any
from urllib.parse import quote

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]
#: As frameworks see it: each has types of its own for the three, and none takes another's.
AnyASGIApp = Callable[[Any, Any, Any], Awaitable[Any]]
Headers = Collection[tuple[bytes, bytes]]

CommitOn = Callable[[int, Scope], bool]

#: Methods that promise not to change anything (RFC 9110, section 9.2.1).
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS", "TRACE"})

#: Messages that may come before a response and tell nothing of it (ASGI extensions).
BEFORE_RESPONSE = frozenset({"http.response.debug", "http.response.early_hint"})

#: What a path may hold as it is (RFC 3986, section 3.3).
_PATH_CHARACTERS = "/:@!$&'()*+,;="

_CHUNKS = frozenset({"http.response.body", "http.response.zerocopysend"})


def commits_on_success(status: int, asgi_scope: Scope) -> bool:
    """The default rule: 2xx and 3xx commit, everything else rolls back."""
    return 200 <= status < 400


def commits_on_2xx(status: int, asgi_scope: Scope) -> bool:
    """For those who want redirects rolled back, too."""
    return 200 <= status < 300


def content_length(headers: Headers) -> int | None:
    """The Content-Length that a response announces, in bytes, if it does."""
    for name, value in headers:
        if name.lower() == b"content-length":
            return int(value) if value.isdigit() else None
    return None


def has_no_body(status: int, headers: Headers) -> bool:
    """Whether the client has the complete response with its start (RFC 9112, section 6.3)."""
    return status in (204, 304) or content_length(headers) == 0


def body_bytes(message: Message) -> float:
    """How many bytes of the body a message sends, or infinity if it does not say."""
    if message["type"] == "http.response.zerocopysend":
        count: int | None = message.get("count")
        return math.inf if count is None else count  # to the end of the file
    return len(message.get("body", b""))


def completes_body(message: Message, sent: float, announced: int | None) -> bool:
    """Whether the client has the complete body, or the trailers, once it has this message.

    Args:
        message: any message after `http.response.start`.
        sent: bytes of the body up to and including this message.
        announced: the Content-Length, if there is one.
    """
    kind = message["type"]
    if kind in _CHUNKS:
        return not message.get("more_body", False) or (announced is not None and sent >= announced)
    if kind == "http.response.trailers":
        return not message.get("more_trailers", False)
    return bool(kind == "http.response.pathsend")


class Label:
    """The request, for logs: "POST /articles". Made only if a log or an error asks for it.

    Without the query, which may hold secrets.
    """

    # Not the ASGI scope: what holds a label must not keep the whole request alive.
    __slots__ = ("_method", "_path")

    def __init__(self, asgi_scope: Scope) -> None:
        self._method: str = asgi_scope["method"]
        self._path: str = asgi_scope["path"]

    def __str__(self) -> str:
        # The server has decoded the path, in which a client can so have put a line break.
        return f"{self._method} {quote(self._path, safe=_PATH_CHARACTERS)}"
