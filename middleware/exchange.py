"""One request and its response, held against one unit of work.

The rule for every message: what ends the transaction happens before the message leaves.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from enum import Enum
from typing import NoReturn

from repom import finish
from repom.errors import CommitOutcomeUnknown, ScopeClosedError, ScopeError, TransactionError
from repom.middleware.policy import (
    BEFORE_RESPONSE,
    CommitOn,
    Headers,
    Message,
    Scope,
    body_bytes,
    completes_body,
    content_length,
    has_no_body,
)
from repom.scope import SessionScope
from repom.shield import run_to_end

Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]

logger = logging.getLogger("repom.middleware")

_EMPTY_CHUNK = {"type": "http.response.body", "body": b"", "more_body": True}


class Progress(Enum):
    """How far the response has got, on the wire."""

    NOTHING = 0
    STARTED = 1
    COMPLETE = 2
    OVER = 3  # the app has ended; what a task of it still sends is not sent


class Exchange:
    """Runs the app for one request.

    Args:
        unit: the request's unit of work, not yet entered.
        commit_on: the policy.
        asgi_scope: the request.
        send: sends to the client.
    """

    __slots__ = (
        "_asgi_scope",
        "_body_bytes",
        "_commit",
        "_commit_on",
        "_failure",
        "_headers",
        "_progress",
        "_send",
        "_start_may_wait",
        "_turn",
        "_unit",
    )

    def __init__(
        self, unit: SessionScope, commit_on: CommitOn, asgi_scope: Scope, send: Send
    ) -> None:
        self._unit = unit
        self._commit_on = commit_on
        self._asgi_scope = asgi_scope
        self._send = send
        self._progress = Progress.NOTHING
        # Made with the first message that has to wait for something.
        self._turn: asyncio.Lock | None = None
        # What the response said when it started.
        self._commit = False
        self._headers: Headers = ()
        self._body_bytes: float = 0
        # Whether it tells of a COMMIT, and nothing of its body has been sent yet.
        self._start_may_wait = False
        # The error of the COMMIT that failed, until an error response has started.
        self._failure: Exception | None = None

    async def run(self, app: ASGIApp, receive: Receive) -> None:
        """Run `app` in the unit of work, and end that in every case."""
        unit = self._unit
        unit.enter()
        try:
            try:
                await app(self._asgi_scope, receive, self.send)
            except Exception as error:
                if self._failure is None:
                    raise
                # What leaves the app is often about what COMMIT's failure did to it
                # ("response already started"). The failure itself counts.
                logger.debug("%s left the app after its COMMIT had failed", type(error).__name__)
            if self._failure is not None:
                await self._render_failure(receive)
        except BaseException:
            self._progress = Progress.OVER
            await finish.finish(unit, commit=False)
            raise
        else:
            # What was begun after the body: background tasks. An app that returns in
            # mid-response has told the client nothing.
            complete = self._progress is Progress.COMPLETE
            self._progress = Progress.OVER
            if complete and not self._commit and unit.in_transaction:
                # It may be an endpoint whose time-out has been answered already.
                logger.warning(
                    "%s was answered by an error; what it has written after that was rolled back. "
                    "Work that must outlive an error needs a transaction of its own: "
                    "`async with session_scope()`.",
                    unit.label,
                )
            await self._finish(commit=complete and self._commits)
        finally:
            unit.leave()
            # Its traceback leads back here. Without this the request would wait, with all that
            # its frames hold, for the garbage collector.
            self._failure = None
            if self._start_may_wait:
                # A server waits with the start for the first chunk (ASGI specification, "Response
                # Start"), and answers by an error of its own if there is none.
                await self._send_to_end(_EMPTY_CHUNK)

    async def send(self, message: Message) -> None:
        """The `send` of the app."""
        if self._turn is not None or self._unit.has_work:
            # Tasks of one request may send at the same time, and COMMIT takes a while: the
            # messages leave in the order in which they came.
            if self._turn is None:
                self._turn = asyncio.Lock()
            async with self._turn:
                await self._end_before(message)
        else:
            self._progress = self._reached_by(message)
        if self._start_may_wait and message["type"] != "http.response.start":
            self._start_may_wait = False
        await self._send(message)

    async def _send_to_end(self, message: Message) -> None:
        """Send what tells of a COMMIT, although the request is cancelled or has failed."""

        async def send() -> None:
            await self._send(message)

        try:
            await run_to_end(send(), limit=self._unit.end_timeout)
        except (OSError, TransactionError):
            # The client is gone, or does not listen. What has failed before counts.
            logger.debug("the response of %s was not sent", self._unit.label, exc_info=True)

    def _reached_by(self, message: Message) -> Progress:
        """How far the response will have got; raise if the client must not have `message`."""
        kind = message["type"]
        if self._progress is Progress.OVER:
            raise ScopeClosedError(
                f"a task of {self._unit.label} sent {kind} after the application had returned.\n"
                "What was not committed then has been rolled back. Await the tasks that respond."
            )
        if self._failure is not None and not self._may_follow_failure(message):
            raise self._failure
        if kind == "http.response.start":
            if self._progress is not Progress.NOTHING:
                raise ScopeError(
                    f"{self._unit.label} started a second response. The transaction has ended as "
                    "the first one said, which the second could not change.\n"
                    "Send one http.response.start for each request."
                )
            self._commit = self._commit_on(message["status"], self._asgi_scope)
            self._headers = message.get("headers", ())
            if not isinstance(self._headers, (list, tuple)):  # an iterator is read only once
                self._headers = message["headers"] = list(self._headers)
            return Progress.STARTED
        if self._progress is Progress.NOTHING:
            return Progress.NOTHING
        self._body_bytes += body_bytes(message)
        # Nearly always it is the last chunk, and the headers need not be read.
        announced = content_length(self._headers) if message.get("more_body") else None
        completes = completes_body(message, self._body_bytes, announced)
        return Progress.COMPLETE if completes else self._progress

    # --- ending

    async def _end_before(self, message: Message) -> None:
        """End the open transaction if `message` may leave only after that."""
        reached = self._reached_by(message)
        starts = self._progress is Progress.NOTHING and reached is Progress.STARTED
        if reached is Progress.COMPLETE or (starts and not self._streams(message)):
            tells_of_commit = starts and self._commits and self._unit.in_transaction
            try:
                await self._end()
            except asyncio.CancelledError:
                if self._failure is None:
                    # It has ended as this message says. An answer that somebody else gives for
                    # the cancelled request, such as a 504, would be a lie from now on.
                    self._progress = reached
                    self._start_may_wait |= tells_of_commit
                    await self._send_to_end(message)
                raise
            self._start_may_wait |= tells_of_commit
        if starts:
            self._failure = None  # if there was one, this is the answer to it
        self._progress = reached

    def _streams(self, start: Message) -> bool:
        """Whether the body is going to be read from an open cursor."""
        # A response to HEAD has no body either, but apps produce the one they do not send, and
        # HEAD promises to change nothing.
        return self._unit.has_open_cursor and not has_no_body(start["status"], self._headers)

    async def _end(self) -> None:
        """End the open transaction as the response decides; a failed COMMIT is remembered."""
        unit = self._unit
        if self._commit and not self._commits and unit.in_transaction:
            logger.info("%s was rolled back: rollback_only() was called", unit.label)
        try:
            await finish.end(unit, commit=self._commits)
        except Exception as error:
            self._fail(error)
            raise
        except asyncio.CancelledError as cancelled:
            # COMMIT runs to its end all the same, and may have failed. An app that swallows
            # the cancellation must not send its 2xx after that.
            if isinstance(cancelled.__cause__, Exception):
                self._fail(cancelled.__cause__)
            raise

    @property
    def _commits(self) -> bool:
        """Whether what is open is to be committed."""
        return self._commit and not self._unit.is_rollback_only

    async def _finish(self, *, commit: bool) -> None:
        try:
            await finish.finish(self._unit, commit=commit)
        except Exception as error:
            self._log_failure(error)
            raise

    def _fail(self, error: Exception) -> None:
        self._failure = error
        self._log_failure(error)

    def _log_failure(self, error: Exception) -> None:
        outcome = "is unknown" if isinstance(error, CommitOutcomeUnknown) else "failed"
        logger.error("COMMIT of %s %s", self._unit.label, outcome, exc_info=error)

    # --- after a COMMIT that failed

    def _may_follow_failure(self, message: Message) -> bool:
        """Whether an inner layer is answering with an error; nothing else is let through."""
        if self._progress is not Progress.NOTHING:
            return False
        if message["type"] == "http.response.start":
            return bool(message["status"] >= 400)
        return message["type"] in BEFORE_RESPONSE

    async def _render_failure(self, receive: Receive) -> None:
        """Give the failure to the app's own exception handler, or raise it."""
        if (
            self._progress is Progress.NOTHING
            and "starlette.exception_handlers" in self._asgi_scope
        ):
            from repom.middleware.starlette import handle

            # Not yet answered: `send` still refuses everything but an error status.
            await handle(self._raise_failure, self._asgi_scope, receive, self.send)
        if self._failure is not None:
            raise self._failure

    async def _raise_failure(self, asgi_scope: Scope, receive: Receive, send: Send) -> NoReturn:
        """As an ASGI app: raise what COMMIT raised."""
        assert self._failure is not None
        raise self._failure
