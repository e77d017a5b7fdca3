"""One request and its response, held against one unit of work.

The rule for every message: what ends the transaction happens before the message leaves.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any, NoReturn

from repom import finish
from repom.errors import CommitOutcomeUnknown, CommitPendingError
from repom.middleware import failed_commit
from repom.middleware.policy import (
    BEFORE_RESPONSE,
    ASGIApp,
    CommitOn,
    Message,
    Receive,
    Scope,
    Send,
)
from repom.middleware.response import BEFORE, COMPLETES, CONTINUES, STARTS, Step
from repom.middleware.so_far import COMPLETE, NOTHING, OVER, STARTED, ResponseSoFar
from repom.scope import SessionScope
from repom.shield import run_to_end
from repom.turn import Turn

logger = logging.getLogger("repom.middleware")

#: Where the outermost middleware of a connection says to those inside it that it is there.
SCOPE_KEY = "repom.scope"


class Exchange(ResponseSoFar):
    """Runs the app for one request.

    Args:
        unit: the request's unit of work, not yet entered.
        commit_on: the policy.
        asgi_scope: the request.
        send: sends to the client.

    Attributes:
        error: what has left the app, until the unit of work has ended.
    """

    __slots__ = (
        "_committed",
        "_failure",
        "_held",
        "_last_sent",
        "_send",
        "_turn",
        "_untold",
        "error",
    )

    def __init__(
        self, unit: SessionScope, commit_on: CommitOn, asgi_scope: Scope, send: Send
    ) -> None:
        super().__init__(unit, commit_on, asgi_scope)
        self._send = send
        self.error: BaseException | None = None
        #: Made with the first message that may have to wait for something.
        self._turn: Turn | None = None
        #: What the client is not to have before the app has read its cursor.
        self._held: Message | None = None
        #: The start of the response that is to leave with its COMMIT, and has not yet.
        self._untold: Message | None = None
        #: The error of the COMMIT that failed, until an error response has started.
        self._failure: Exception | None = None
        #: Whether there was a COMMIT, and the type of what has left last, if anything since.
        self._committed = False
        self._last_sent = ""

    async def run(self, app: ASGIApp, receive: Receive) -> None:
        """Run `app` in the unit of work, and end that in every case.

        Raises:
            BaseException: what has left the app, or why the unit of work could not end.
        """
        # The middleware does the same by itself, where one coroutine less matters.
        self.begin()
        try:
            await app(self._asgi_scope, receive, self.send)
        except BaseException as error:
            self.error = error
        if not self.end_if_settled():
            await self.end(app, receive)

    def begin(self) -> None:
        """Enter the unit of work."""
        self._unit.enter()

    def end_if_settled(self) -> bool:
        """End it after the app has ended, if nothing has to be awaited or raised for that.

        Returns:
            Whether it has ended. If not, it is to be ended by `end`.
        """
        turn, progress = self._turn, self._progress
        if (
            self.error is not None
            or self._failure is not None
            or (turn is not None and turn.is_taken)
            or (self._committed and self._last_sent == "http.response.start")
        ):
            return False
        self._progress = OVER
        try:
            is_closed = finish.close_if_settled(self._unit)
        except BaseException:
            self._unit.leave()
            raise
        if not is_closed:
            self._progress = progress
            return False
        self._unit.leave()
        return True

    async def end(self, app: ASGIApp, receive: Receive) -> None:
        """End it after the app has ended.

        Args:
            app: what was run, and answers for a COMMIT that has failed.
            receive: of the request.

        Raises:
            BaseException: what has left the app, or why the unit of work could not end.
        """
        unit, turn = self._unit, self._turn
        try:
            try:
                try:
                    if self.error is not None:
                        raise self.error
                finally:
                    if turn is not None and turn.is_taken:
                        # A task is about to answer, though the app that started it has ended.
                        # What it answers is being committed, and whoever is outside answers
                        # otherwise.
                        await run_to_end(_wait_for(turn), limit=unit.options.end_timeout)
            except Exception as left:
                if self._failure is None:
                    raise
                # What leaves the app is often about what COMMIT's failure did to it
                # ("response already started"). The failure itself counts.
                logger.debug("%s left the app after its COMMIT had failed", type(left).__name__)
            if self._failure is not None:
                await self._answer_failure(app, receive)
        except BaseException:
            self._progress = OVER
            await finish.finish(unit, commit=False)
            raise
        else:
            # What was begun after the body: background tasks. An app that returns in
            # mid-response has told the client nothing.
            complete = self._progress is COMPLETE
            self._progress = OVER
            if not finish.close_if_settled(unit):
                await self._finish(complete=complete)
        finally:
            unit.leave()
            # Their tracebacks lead back here. Without this the request would wait, with all that
            # its frames hold, for the garbage collector.
            self.error = self._failure = None
            self._held = self._untold = None
            if self._committed and self._last_sent == "http.response.start":
                await self._begin_body()

    async def send(self, message: Message) -> None:
        """The `send` of the app."""
        unit = self._unit
        is_used = unit.is_used
        ends = is_used and unit.has_work
        # Nothing to end, now or before: the usual end of a body, and requests without a session.
        if not ends and (not is_used or self._is_settled()):
            if is_used or not self._note_only(message):
                step = self._take(message, False)
                if step is not BEFORE:
                    self._progress = COMPLETE if step is COMPLETES else STARTED
            if is_used and self._committed:
                await self._send_next(message)
            else:
                await self._send(message)
            return
        turn = self._turn
        if turn is None:
            turn = self._turn = Turn()
        # Tasks of one request may send at the same time, and COMMIT takes a while: the messages
        # leave in the order in which they came.
        if not turn.take_if_free():
            await turn.take()
            ends = unit.has_work
        try:
            if self._failure is not None and not self._may_follow_failure(message):
                raise self._failure
            step = self._take(message, ends)
            if step is BEFORE or step is CONTINUES:
                # What comes while something is held is for a client that has nothing more to get.
                is_due = self._held is None
            elif not self._is_read():
                is_due = await self._end_before(message, step)
            elif self._is_all_there_is(step):
                self._held = self._held or message
                is_due = False
            else:
                self._goes(step)
                is_due = True
        finally:
            turn.leave()
        if not is_due:
            return
        if self._committed and (self._held or message)["type"] == "http.response.start":
            # It tells of a COMMIT. Cancelled while the connection is congested, it would be lost,
            # and the server would answer with an error.
            await run_to_end(self._send_due(message), limit=unit.options.end_timeout)
        else:
            await self._send_due(message)

    def _is_settled(self) -> bool:
        """Whether nothing that was ended, or is being ended, concerns the next message."""
        turn = self._turn
        return turn is None or (not turn.is_taken and self._held is None and self._failure is None)

    # --- ending

    def _goes(self, step: Step) -> None:
        if step is STARTS:
            self._failure = None  # if there was one, this is the answer to it
        self._progress = COMPLETE if step is COMPLETES else STARTED

    async def _end_before(self, message: Message, step: Step) -> bool:
        """End the open transaction as the response decides; a failed COMMIT is remembered.

        Returns:
            Whether `message` is to leave now. The start of a response tells of a COMMIT. Cancelled
            while the connection is congested, it would be lost, and the server would answer with
            an error. So it leaves in the same ending as the COMMIT, and has left by now.
        """
        commit = self._commits()
        tells = commit and step is STARTS
        self._untold = message if tells else None
        try:
            await finish.end(self._unit, commit=commit, then=self._tell if tells else None)
        except Exception as error:
            if not self._has_left(tells):
                self._untold = None
                self._fail(error)
            raise
        except asyncio.CancelledError as cancelled:
            if self._has_left(tells):
                raise
            self._untold = None
            # COMMIT runs to its end all the same, and may have failed. An app that swallows
            # the cancellation must not send its 2xx after that.
            if isinstance(cancelled.__cause__, Exception):
                self._fail(cancelled.__cause__)
            else:
                # It has ended as this message says. An answer that somebody else gives for the
                # cancelled request, such as a 504, would be a lie from now on.
                self._committed = commit
                self._progress = COMPLETE if step is COMPLETES else STARTED
                await self._send_to_end(message)
            raise
        self._committed = commit
        if self._has_left(tells):
            return False
        self._untold = None
        self._goes(step)
        return True

    def _has_left(self, tells: bool) -> bool:
        return tells and self._untold is None

    async def _tell(self) -> None:
        """Send the start of the response, right after its COMMIT."""
        message, self._untold = self._untold, None
        assert message is not None
        self._committed = True
        self._goes(STARTS)
        await self._send_due(message)

    def _send_due(self, message: Message) -> Coroutine[Any, Any, None]:
        """Send what was held, and then `message`."""
        return self._send_next(message) if self._held is None else self._send_both(message)

    async def _send_both(self, message: Message) -> None:
        held, self._held = self._held, None
        assert held is not None
        await self._send_next(held)
        await self._send_next(message)

    async def _send_next(self, message: Message) -> None:
        before, self._last_sent = self._last_sent, message["type"]
        try:
            await self._send(message)
        except Exception:  # the server has refused it; if we are cancelled it may have it
            self._last_sent = before
            raise

    def _commits(self) -> bool:
        """Whether what is open is to be committed."""
        unit = self._unit
        if not self._is_success():
            return False
        if unit.is_rollback_only and unit.in_transaction:
            logger.info("%s was rolled back: rollback_only() was called", unit.label)
        return not unit.is_rollback_only

    async def _finish(self, *, complete: bool) -> None:
        unit = self._unit
        try:
            # New work is refused by now, so that nothing can follow this look.
            self._look_back()
            commit = complete and self._commits()
            is_error = complete and not self._is_success()
        except BaseException:
            await finish.finish(unit, commit=False)
            raise
        if is_error and unit.in_transaction:
            # It may be an endpoint whose time-out has been answered already.
            logger.warning(
                "%s was answered by an error; what it has written after that was rolled back. "
                "Work that must outlive an error needs a transaction of its own: "
                "`async with session_scope()`.",
                unit.label,
            )
        try:
            await finish.finish(unit, commit=commit)
        except Exception as error:
            self._log_failure(error)
            raise

    def _fail(self, error: Exception) -> None:
        self._failure = error
        self._held = None
        if self._progress is NOTHING:
            self._response = None  # the next one may be an error
        self._log_failure(error)

    def _log_failure(self, error: Exception) -> None:
        outcome = "failed"
        if isinstance(error, CommitOutcomeUnknown):
            outcome = "is unknown"
        elif isinstance(error, CommitPendingError):
            outcome = "is not confirmed by all databases"
        logger.error("COMMIT of %s %s", self._unit.label, outcome, exc_info=error)

    async def _begin_body(self) -> None:
        """Let the server send the start, after an app that has ended before its body began.

        Until then it may keep it (https://asgi.readthedocs.io/en/latest/specs/www.html), and
        answer for the app with an error of its own, though the work is committed.
        """
        await self._send_to_end({"type": "http.response.body", "body": b"", "more_body": True})

    async def _send_to_end(self, message: Message) -> None:
        """Send what tells of a COMMIT, although the request was cancelled, or has failed."""
        try:
            await run_to_end(self._send_due(message), limit=self._unit.options.end_timeout)
        except Exception:
            # The client is gone, or does not listen. What has ended the request counts.
            logger.debug("the response of %s was not sent", self._unit.label, exc_info=True)

    # --- after a COMMIT that failed

    def _may_follow_failure(self, message: Message) -> bool:
        """Whether an inner layer is answering with an error; nothing else is let through."""
        if self._progress is not NOTHING:
            return False
        if message["type"] == "http.response.start":
            return bool(message["status"] >= 400)
        return message["type"] in BEFORE_RESPONSE

    async def _answer_failure(self, app: ASGIApp, receive: Receive) -> None:
        """Let the app's own error handling answer for the failure, or raise it."""
        if self._progress is NOTHING:
            # `send` still refuses everything but an error status.
            await failed_commit.answer(
                self._raise_failure, app, self._asgi_scope, receive, self.send
            )
        if self._failure is not None:
            raise self._failure

    def _raise_failure(self) -> NoReturn:
        assert self._failure is not None
        raise self._failure


async def _wait_for(turn: Turn) -> None:
    await turn.take()
    turn.leave()
