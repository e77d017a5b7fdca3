"""Which response commits: pure functions, no IO."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, MutableMapping
from typing import Any

from repom.dialects import Begin

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]

CommitOn = Callable[[int, Scope], bool]

#: Methods that promise not to change anything (RFC 9110, section 9.2.1).
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS", "TRACE"})

#: Messages that end the body by themselves, of the ASGI extensions.
_WHOLE_BODY = frozenset({"http.response.pathsend", "http.response.zerocopysend"})


def commits_on_success(status: int, asgi_scope: Scope) -> bool:
    """The default rule: 2xx and 3xx commit, everything else rolls back."""
    return 200 <= status < 400


def commits_on_2xx(status: int, asgi_scope: Scope) -> bool:
    """For those who want redirects rolled back, too."""
    return 200 <= status < 300


def sqlite_begin(method: str) -> Begin:
    """How the transaction of a request begins on SQLite: a writer takes its lock at once."""
    return "DEFERRED" if method in SAFE_METHODS else "IMMEDIATE"


def content_length(headers: Collection[tuple[bytes, bytes]]) -> int | None:
    """The Content-Length that a response announces, in bytes, if it does."""
    for name, value in headers:
        if name.lower() == b"content-length":
            return int(value) if value.isdigit() else None
    return None


def completes_body(message: Message, sent: int, announced: int | None) -> bool:
    """Whether the client has the complete response once it has this message.

    Args:
        message: any message after `http.response.start`.
        sent: bytes of the body up to and including this message.
        announced: the Content-Length, if there is one.
    """
    kind = message["type"]
    if kind == "http.response.body":
        return not message.get("more_body", False) or (announced is not None and sent >= announced)
    if kind == "http.response.trailers":
        return not message.get("more_trailers", False)
    return kind in _WHOLE_BODY


def route(asgi_scope: Scope) -> str:
    """The request, for logs: "POST /articles". Without its query, which may hold secrets."""
    return f"{asgi_scope.get('method', '')} {asgi_scope.get('path', '')}".strip()


class Label:
    """`route(asgi_scope)`, made only if a log or an error asks for it."""

    __slots__ = ("_asgi_scope",)

    def __init__(self, asgi_scope: Mapping[str, Any]) -> None:
        self._asgi_scope = asgi_scope

    def __str__(self) -> str:
        return route(dict(self._asgi_scope))
