"""One request and its response, held against one unit of work.

The rule for every message: what ends the transaction happens before the message leaves.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from enum import Enum
from typing import Any

from repom import finish
from repom.errors import CommitOutcomeUnknown
from repom.middleware.policy import CommitOn, Message, Scope, completes_body, content_length
from repom.scope import SessionScope

Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]

logger = logging.getLogger("repom.middleware")


class Progress(Enum):
    """How far the response has got, on the wire."""

    NOTHING = 0
    STARTED = 1
    COMPLETE = 2


class Exchange:
    """Runs the app for one request.

    Args:
        unit: the request's unit of work, not yet entered.
        commit_on: the policy.
        asgi_scope: the request.
        send: sends to the client.
    """

    __slots__ = (
        "_answered",
        "_asgi_scope",
        "_body_bytes",
        "_commit",
        "_commit_on",
        "_failure",
        "_headers",
        "_progress",
        "_send",
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
        self._commit = False
        self._headers: Any = ()
        self._body_bytes = 0
        # The error of the COMMIT that failed, and whether an inner layer has answered for it.
        self._failure: Exception | None = None
        self._answered = False

    async def run(self, app: ASGIApp, receive: Receive) -> None:
        """Run `app` in the unit of work, and end that in every case."""
        unit = self._unit
        unit.enter()
        try:
            try:
                await app(self._asgi_scope, receive, self.send)
            except Exception as error:
                if self._failure is None or self._answered:
                    raise
                # What leaves the app is often about what COMMIT's failure did to it
                # ("response already started"). The failure itself counts.
                logger.debug("%s left the app after its COMMIT had failed", type(error).__name__)
            if self._failure is not None and not self._answered:
                await self._render_failure(receive)
        except BaseException:
            await finish.finish(unit, commit=False)
            raise
        else:
            # What was begun after the body: background tasks. An app that returns in
            # mid-response has told the client nothing.
            await self._finish(commit=self._progress is Progress.COMPLETE)
        finally:
            unit.leave()

    async def send(self, message: Message) -> None:
        """The `send` of the app."""
        if self._failure is not None and not self._answered:
            self._answer_for_failure(message)
        unit = self._unit
        kind = message["type"]
        if kind == "http.response.start":
            self._begin_response(message)
            if unit.has_work and not unit.has_open_cursor:
                await self._end()
            self._progress = Progress.STARTED
        else:
            self._body_bytes += len(message.get("body", b""))
            if self._progress is Progress.STARTED and self._completes(message):
                if unit.has_work:
                    await self._end()
                self._progress = Progress.COMPLETE
        await self._send(message)

    def _begin_response(self, message: Message) -> None:
        status: int = message["status"]
        self._commit = self._commit_on(status, self._asgi_scope)
        self._headers = message.get("headers", ())

    def _completes(self, message: Message) -> bool:
        # Nearly always it is the last chunk, and the headers need not be read.
        announced = content_length(self._headers) if message.get("more_body") else None
        return completes_body(message, self._body_bytes, announced)

    # --- ending

    async def _end(self) -> None:
        """End the open transaction as the response decides; a failed COMMIT is remembered."""
        unit = self._unit
        if unit.is_rollback_only:
            if self._commit and unit.in_transaction:
                logger.info("%s was rolled back: rollback_only() was called", unit.label)
            await finish.end(unit, commit=False)
            return
        try:
            await finish.end(unit, commit=self._commit)
        except Exception as error:
            self._fail(error)
            raise
        except asyncio.CancelledError as cancelled:
            # COMMIT runs to its end all the same, and may have failed. An app that swallows
            # the cancellation must not send its 2xx after that.
            if isinstance(cancelled.__cause__, Exception):
                self._fail(cancelled.__cause__)
            raise

    async def _finish(self, *, commit: bool) -> None:
        unit = self._unit
        try:
            await finish.finish(unit, commit=commit and not unit.is_rollback_only)
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

    def _answer_for_failure(self, message: Message) -> None:
        """Let an inner layer answer with an error; raise the failure for all else."""
        assert self._failure is not None
        if (
            self._progress is Progress.NOTHING
            and message["type"] == "http.response.start"
            and message["status"] >= 400
        ):
            self._answered = True
            self._body_bytes = 0
        else:
            raise self._failure

    async def _render_failure(self, receive: Receive) -> None:
        """Give the failure to the app's own exception handler, or raise it."""
        failure = self._failure
        assert failure is not None
        if (
            self._progress is Progress.NOTHING
            and "starlette.exception_handlers" in self._asgi_scope
        ):
            from repom.middleware.starlette import handle

            # Not yet answered: `send` still refuses everything but an error status.
            try:
                await handle(failure, self._asgi_scope, receive, self.send)
            except Exception as error:
                if error is not failure and error.__context__ is None:
                    error.__context__ = failure
                raise
            if self._answered:
                return
        raise failure
