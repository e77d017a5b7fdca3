"""The response as far as the app has sent it, and what the policy makes of that."""

from __future__ import annotations

from enum import Enum

from repom.errors import ScopeClosedError
from repom.middleware.policy import CommitOn, Headers, Message, Scope
from repom.middleware.response import BEFORE, COMPLETES, STARTS, Response, Step
from repom.scope import SessionScope


class Progress(Enum):
    """How far the response has got, on the wire."""

    NOTHING = 0
    STARTED = 1
    COMPLETE = 2
    OVER = 3  # the app has ended; what a task of it still sends is not sent


# On Python 3.11 it costs as much as a call to look up a member of an enumeration.
NOTHING, STARTED, COMPLETE, OVER = Progress


class ResponseSoFar:
    """What an `Exchange` knows of the response.

    A base class of that, and no part of it: each request would make one object more.

    Args:
        unit: the request's unit of work.
        commit_on: the policy.
        asgi_scope: the request.
    """

    __slots__ = (
        "_asgi_scope",
        "_commit",
        "_commit_on",
        "_progress",
        "_response",
        "_start",
        "_unit",
    )

    def __init__(self, unit: SessionScope, commit_on: CommitOn, asgi_scope: Scope) -> None:
        self._unit = unit
        self._commit_on = commit_on
        self._asgi_scope = asgi_scope
        self._progress = NOTHING
        #: The status and headers that have left, of a request that had used no session by then.
        self._start: tuple[int, Headers] | None = None
        #: The response that the app sends, once it matters.
        self._response: Response | None = None
        #: Whether the response commits, once the policy was asked.
        self._commit: bool | None = None

    def _note_only(self, message: Message) -> bool:
        """Note one of the two usual messages of a request that has used no session.

        It costs hardly anything, and says all that `_look_back` needs to know later.

        Returns:
            False if it is another one, and nothing was noted.
        """
        kind, progress = message["type"], self._progress
        if progress is NOTHING and kind == "http.response.start":
            headers = message.get("headers")
            if type(headers) is list:  # and no iterator, which the server reads
                # Not the message, which layers outside of us may change.
                self._start, self._progress = (message["status"], headers), STARTED
        elif (
            progress is STARTED
            and self._response is None
            and kind == "http.response.body"
            and not message.get("more_body")
        ):
            self._progress = COMPLETE
        return self._progress is not progress

    def _look_back(self) -> Response | None:
        """The response so far, if it has started; also if that was only noted."""
        if self._response is None and self._start is not None:
            self._response = self._response_of(*self._start)
            self._response.has_ended = self._progress is COMPLETE
        return self._response

    def _response_of(self, status: int, headers: Headers) -> Response:
        return Response(status, headers, self._unit.label, self._asgi_scope["method"])

    def _is_success(self) -> bool:
        """Whether the response commits. The policy is asked once, and only if it matters."""
        if self._commit is None:
            response = self._response
            if response is None:
                return False
            self._commit = self._commit_on(response.status, self._asgi_scope)
        return self._commit

    def _take(self, message: Message, ends: bool) -> Step:
        """Take the next message; raise if the client must not have it.

        Args:
            ends: whether there is anything that it may end.
        """
        if self._progress is OVER:
            raise ScopeClosedError(
                f"a task of {self._unit.label} sent {message['type']} after the application had "
                "returned.\n"
                "What was not committed then has been rolled back. Await the tasks that respond."
            )
        response = self._response or self._look_back()
        if response is not None:
            step = response.take(message)
            if ends and self._is_success():
                response.check(message, step)
            return step
        if message["type"] != "http.response.start":
            return BEFORE
        headers = message.get("headers", ())
        if not isinstance(headers, (list, tuple)):  # an iterator is read only once
            headers = message["headers"] = list(headers)
        self._response, self._commit = self._response_of(message["status"], headers), None
        try:
            if ends and self._is_success():
                self._response.check(message, STARTS)
        except Exception:
            self._response = None  # it has not started, for anybody
            raise
        return STARTS

    def _is_read(self) -> bool:
        """Whether the app may still read from a cursor what it sends."""
        assert self._response is not None
        return not self._response.has_ended and self._unit.has_open_cursor

    def _is_all_there_is(self, step: Step) -> bool:
        """Whether the client has the complete response with it."""
        assert self._response is not None
        return step is COMPLETES or self._response.has_no_body
