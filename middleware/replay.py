"""A request that has lost a conflict is served once more, before the client has heard of it.

A unit of work has lost if it was not committed, and a database has said "conflict" to it on the
way. What the application makes of that error does not count, as long as it is no success: an
answer that tells of an error tells of that one, and is worth no more than the next attempt.
"""

from __future__ import annotations

import logging

from repom.errors import MAY_BE_COMMITTED
from repom.middleware.exchange import SCOPE_KEY, Exchange
from repom.middleware.policy import ASGIApp, CommitOn, Message, Receive, Scope, Send
from repom.middleware.repeatable import Reading, RepeatableRequest
from repom.middleware.response import STARTS, Step
from repom.observer import Observer
from repom.retry import Attempts, RetryOn
from repom.scope import SessionScope

logger = logging.getLogger("repom.middleware")


class Replay:
    """Runs the app for one request as `Exchange` does, and again while it loses conflicts.

    The last attempt is an `Exchange` and nothing else, so its answer is what it always was.

    Args:
        unit: the unit of work of the first attempt.
        commit_on: the policy.
        asgi_scope: the request.
        send: sends to the client.
        retries: how often at most.
        retry_on: whether an error is worth it.
        body_limit: bytes of a body that is given again.
    """

    def __init__(
        self,
        unit: SessionScope,
        commit_on: CommitOn,
        asgi_scope: Scope,
        send: Send,
        *,
        retries: int,
        retry_on: RetryOn,
        body_limit: int,
    ) -> None:
        self._unit = unit
        self._commit_on = commit_on
        self._asgi_scope = asgi_scope
        self._send = send
        self._attempts = Attempts(retries, retry_on, label=unit.label)
        self._body_limit = body_limit

    async def run(self, app: ASGIApp, receive: Receive) -> None:
        """Run `app` in a unit of work for each attempt, and end that in every case."""
        asgi_scope, attempts, commit_on = self._asgi_scope, self._attempts, self._commit_on
        request = RepeatableRequest(asgi_scope, receive, self._send, body_limit=self._body_limit)
        unit = self._unit
        while not attempts.is_last:
            attempt = _Attempt(unit, commit_on, asgi_scope, request, attempts)
            lost = await attempt.run_once(app)
            if lost is None:
                return
            try:
                pause = attempts.pause_after(lost)
                if pause is None:  # `retry_on` has changed its mind
                    raise lost
                await request.pause(pause)
                if request.is_gone:
                    raise lost
            finally:
                del lost  # whose traceback may lead to this frame
            request.restore()
            unit = asgi_scope[SCOPE_KEY] = unit.again()
        try:
            await Exchange(unit, commit_on, asgi_scope, self._send).run(app, Reading(request))
        except Exception as error:
            attempts.pause_after(error)  # says in it that it was the last one
            raise


class _Watch(Observer):
    """What happens in one attempt that its repetition depends on."""

    def __init__(self, request: RepeatableRequest, attempts: Attempts) -> None:
        self.conflict: Exception | None = None
        self._request = request
        self._attempts = attempts

    def committed(self) -> None:
        self._request.block("something was committed apart from its transaction")

    def failed(self, error: Exception) -> None:
        if self.conflict is None and self._attempts.is_worth_it(error):
            self.conflict = error


class _Attempt(Exchange):
    """An attempt that is not the last one.

    From the moment it has lost, nothing of it reaches the client: whatever the app sends raises
    the conflict, as it does when COMMIT has failed.
    """

    #: The conflict it has lost, if it is to be repeated for that.
    _lost: Exception | None = None

    def __init__(
        self,
        unit: SessionScope,
        commit_on: CommitOn,
        asgi_scope: Scope,
        request: RepeatableRequest,
        attempts: Attempts,
    ) -> None:
        super().__init__(unit, commit_on, asgi_scope, request.send)
        self._request = request
        self._attempts = attempts
        self._watch = unit.observer = _Watch(request, attempts)
        # So that every message is looked at: a unit of work inside this one can lose a conflict
        # though this one was asked for nothing.
        unit.use()

    async def run_once(self, app: ASGIApp) -> Exception | None:
        """Run `app`.

        Returns:
            The conflict for which the request is to be served again; None if it was answered.

        Raises:
            BaseException: what has left the app, if the request is not to be served again.
        """
        reading = Reading(self._request)
        left: Exception | None = None
        lost: Exception | None = None
        try:
            try:
                await self.run(app, reading)
            except Exception as error:
                left = error
            lost = self._lost or self._conflict_behind(left)
            if lost is not None and self._is_repeatable:
                return lost
            # Who swallows that his answer was refused has not answered.
            left = left or self._lost
            if left is not None:
                if lost is not None:
                    logger.info(
                        "%s has lost a conflict, and is not repeated: %s",
                        self._unit.label,
                        self._request.obstacle,
                    )
                raise left
            return None
        finally:
            reading.is_over = True
            # Left-over tasks keep their context, as pooled connections do, and with that the unit
            # of work. But not the request with its body, nor what a traceback leads to.
            self._unit.observer = None
            self._lost = self._watch.conflict = None
            del left, lost

    @property
    def _is_repeatable(self) -> bool:
        return self._request.obstacle is None

    def _conflict_behind(self, error: Exception | None) -> Exception | None:
        """For what an attempt is to be repeated that ends in `error`, or in an error answer."""
        if error is not None and self._attempts.is_worth_it(error):
            return error
        return None if isinstance(error, MAY_BE_COMMITTED) else self._watch.conflict

    # --- an attempt has lost

    def _take(self, message: Message, ends: bool) -> Step:
        if self._lost is not None:
            raise self._lost
        step = super()._take(message, ends)
        if step is STARTS and not self._is_success() and self._is_repeatable:
            self._lost = self._conflict_behind(None)
            if self._lost is not None:
                raise self._lost
        return step

    def _fail(self, error: Exception) -> None:
        if self._is_repeatable:
            self._lost = self._conflict_behind(error)
        super()._fail(error)

    def _log_failure(self, error: Exception) -> None:
        if self._lost is None:  # else the next attempt may succeed, and `Attempts` tells of it
            super()._log_failure(error)

    async def _answer_failure(self, app: ASGIApp, receive: Receive) -> None:
        if self._lost is not None:
            if self._is_repeatable:
                raise self._lost
            # Meanwhile the client has left, or the app has committed a note of the failure.
            self._lost = None
            assert self._failure is not None
            self._log_failure(self._failure)
        await super()._answer_failure(app, receive)
