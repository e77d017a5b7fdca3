"""What the application says of its response, message by message."""

from __future__ import annotations

from enum import Enum

from repom.errors import InvalidResponseError, ScopeError
from repom.middleware.policy import (
    Headers,
    Message,
    body_bytes,
    check_length,
    check_start,
    completes_body,
    content_length,
    ends_body,
    has_no_body,
)


class Step(Enum):
    """What a message does to the response."""

    BEFORE = "tells nothing of it"
    STARTS = "says its status and headers"
    CONTINUES = "is not the last of it"
    COMPLETES = "is all that the client waits for"


# On Python 3.11 it costs as much as a call to look up a member of an enumeration.
BEFORE, STARTS, CONTINUES, COMPLETES = Step


class Response:
    """One response, as the application sends it after its start.

    Args:
        status: what the start says, like the headers.
        headers: no iterator, since they are read more than once.
        label: the request, for errors.
        method: of the request; no body is sent for HEAD.

    Attributes:
        has_ended: whether the app has sent the last of the body. The client may have had all
            that was announced before.
    """

    __slots__ = ("_body_bytes", "_label", "_method", "has_ended", "headers", "status")

    def __init__(self, status: int, headers: Headers, label: object, method: str) -> None:
        self.status = status
        self.headers = headers
        self._label = label
        self._method = method
        self.has_ended = False
        self._body_bytes: float = 0

    def take(self, message: Message) -> Step:
        """Take the next message after the start, and say whether it completes the response.

        Raises:
            ScopeError: it starts a second response.
            InvalidResponseError: no server takes it there.
        """
        kind = message["type"]
        if kind == "http.response.start":
            raise self._second()
        if self.has_ended is not (kind == "http.response.trailers"):
            raise InvalidResponseError(
                f"{self._label} sent {kind} {'after' if self.has_ended else 'before'} the end of "
                "its body, where no server accepts it.\n"
                "Send one last http.response.body, and after it nothing but announced trailers."
            )
        body = message.get("body")
        self._body_bytes += len(body) if type(body) is bytes else body_bytes(message)
        # Nearly always the first of the two, and the headers need not be read.
        if (kind == "http.response.body" and not message.get("more_body")) or ends_body(message):
            self.has_ended = True
            return COMPLETES
        announced = content_length(self.headers) if message.get("more_body") else None
        completes = completes_body(message, self._body_bytes, announced)
        return COMPLETES if completes else CONTINUES

    def _second(self) -> ScopeError:
        return ScopeError(
            f"{self._label} started a second response. The transaction has ended as the first "
            "one said, which the second could not change.\n"
            "Send one http.response.start for each request."
        )

    @property
    def has_no_body(self) -> bool:
        """Whether the client has the complete response with its start."""
        return self._method == "HEAD" or has_no_body(self.status, self.headers)

    def check(self, message: Message, step: Step) -> None:
        """Check what a server would refuse, while it is not too late to roll back.

        Raises:
            InvalidResponseError: it would.
        """
        if step is STARTS:
            check_start(self.status, self.headers)
        elif step is COMPLETES and not self.has_no_body:
            check_length(message, self._body_bytes, content_length(self.headers))
