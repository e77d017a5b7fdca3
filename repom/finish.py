"""What the owner of a scope does: end its transactions, run what waits for that, close it."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import anyio.to_thread

from repom.callbacks import Callback, Callbacks
from repom.ending import Steps, close_steps, commit_steps, rollback_steps
from repom.errors import MAY_BE_COMMITTED, ScopeError
from repom.gate import scope_closed
from repom.participant import perform, perform_sync
from repom.shield import run_to_end
from repom.two_phase import two_phase_steps

if TYPE_CHECKING:
    from repom.scope import SessionScope

logger = logging.getLogger("repom")

Then = Callable[[], Awaitable[None]]


async def end(
    scope: SessionScope, *, commit: bool, then: Then | None = None, finishing: bool = False
) -> None:
    """End what is open, and then run the callbacks that are due. The scope goes on.

    Args:
        commit: False to roll back.
        then: awaited right after, where a cancellation of the caller does not reach it either,
            if something was open and no callback is due.
        finishing: whether new work is refused already.

    Raises:
        ScopeClosedError: the scope is being finished, by which it is decided how it ends.
        BaseException: what COMMIT raised; everything is rolled back then. Or what `then` raised.
    """
    if commit and not finishing and not scope.is_open:
        raise scope_closed()
    if not scope.is_used:
        return
    callbacks = scope.callbacks
    try:
        if scope.in_transaction:
            await run_to_end(_end(scope, commit, finishing, then), limit=scope.options.end_timeout)
        elif callbacks.is_empty:
            return
        else:
            _settle(callbacks, commit)
    except Exception:
        await _run_callbacks(scope)
        raise
    if callbacks.has_due:
        await _run_callbacks(scope)


async def finish(scope: SessionScope, *, commit: bool) -> None:
    """End what is open, run the callbacks that are due, and close the scope, come what may.

    Raises:
        BaseException: what COMMIT raised; everything is rolled back then.
    """
    if close_if_settled(scope):
        return
    try:
        await end(scope, commit=commit, finishing=True)
    finally:
        try:
            # A sibling that was let in before may have begun something since.
            if not scope.is_quiet:
                await run_to_end(_close(scope), limit=scope.options.end_timeout)
        finally:
            _closed(scope)


def close_if_settled(scope: SessionScope) -> bool:
    """Refuse new work, and close the scope if nothing is open and nobody waits for its end.

    Returns:
        Whether it is closed. If not, it is to be finished.
    """
    if not scope.refuse_work():
        return True
    if not scope.callbacks.is_empty or not scope.is_quiet:
        return False
    try:
        for participant in scope.participants:
            participant.let_go()
    finally:
        scope.closed()
    return True


def end_sync(scope: SessionScope, *, commit: bool) -> None:
    """The sync twin of `end`, for scopes that hold sync sessions only."""
    try:
        _end_transactions_sync(scope, commit)
    except Exception:
        _run_callbacks_sync(scope)
        raise
    _run_callbacks_sync(scope)


def finish_sync(scope: SessionScope, *, commit: bool) -> None:
    """The sync twin of `finish`."""
    scope.refuse_work()
    try:
        end_sync(scope, commit=commit)
    finally:
        try:
            perform_sync(_closing_steps(scope))
        finally:
            _closed(scope)


# --- transactions


async def _end(scope: SessionScope, commit: bool, finishing: bool, then: Then | None) -> None:
    # Runs to its end in any case, so that the callbacks always learn what has happened.
    # One end at a time: what one task is about to commit, another must not roll back.
    turn, callbacks = scope.turn, scope.callbacks
    has_waited = not turn.take_if_free()
    if has_waited:
        await turn.take()
    try:
        if has_waited and commit and not finishing and not scope.is_open:
            raise scope_closed()
        try:
            await perform(_ending_steps(scope, commit))
        except BaseException as error:
            _settle_failed(scope, error)
            raise
        _settle(callbacks, commit)
    finally:
        turn.leave()
    if then is not None and not callbacks.has_due:
        await then()


def _end_transactions_sync(scope: SessionScope, commit: bool) -> None:
    try:
        perform_sync(_ending_steps(scope, commit))
    except BaseException as error:
        _settle_failed(scope, error)
        raise
    _settle(scope.callbacks, commit)


def _ending_steps(scope: SessionScope, commit: bool) -> Steps:
    parties = [participant for participant in scope.participants if participant.in_transaction]
    if not commit:
        return rollback_steps(parties)
    if scope.branches is not None:
        return two_phase_steps(parties, scope.branches)
    return commit_steps(parties)


def _settle(callbacks: Callbacks, commit: bool) -> None:
    if commit:
        callbacks.committed()
    else:
        callbacks.rolled_back()


def _settle_failed(scope: SessionScope, error: BaseException) -> None:
    if isinstance(error, MAY_BE_COMMITTED):
        not_run = scope.callbacks.forget()
        if not_run:
            logger.warning(
                "%d callback(s) of %s were not run: it is not known to be committed everywhere",
                not_run,
                scope.label,
            )
    else:
        scope.callbacks.rolled_back()


async def _close(scope: SessionScope) -> None:
    await scope.turn.take()
    try:
        await perform(_closing_steps(scope))
    finally:
        scope.turn.leave()


def _closing_steps(scope: SessionScope) -> Steps:
    busy = [participant for participant in scope.participants if not participant.is_quiet]
    yield from rollback_steps([participant for participant in busy if participant.in_transaction])
    yield from close_steps(busy)


def _closed(scope: SessionScope) -> None:
    try:
        for participant in scope.participants:
            if participant.is_quiet:
                participant.let_go()
    finally:
        scope.closed()
        if not_run := scope.callbacks.drop():
            logger.warning(
                "%d callback(s) of %s were not run: it was cancelled after its transaction had "
                "ended",
                not_run,
                scope.label,
            )


# --- callbacks


async def _run_callbacks(scope: SessionScope) -> None:
    """Run what is due, each in a unit of work of its own.

    A callback that fails is logged: what it was waiting for has happened all the same.
    """
    while due := scope.callbacks.next_due():
        try:
            await _call(scope.for_callback(), *due)
        except Exception:
            _log_failed(scope, due.callback)


async def _call(unit: SessionScope, callback: Callback, in_thread: bool = False) -> None:
    unit.enter()
    try:
        try:
            # On the event loop it would keep from going on those whom it waits for. With no
            # connection in hand it can wait for a thread like an endpoint.
            result = await anyio.to_thread.run_sync(callback) if in_thread else callback()
            if inspect.isawaitable(result):
                await result
        except BaseException:
            await finish(unit, commit=False)
            raise
        await finish(unit, commit=not unit.is_rollback_only)
    finally:
        unit.leave()


def _run_callbacks_sync(scope: SessionScope) -> None:
    while due := scope.callbacks.next_due():
        try:
            result = _call_sync(scope.for_callback(is_sync=True), due.callback)
            if inspect.isawaitable(result):
                _refuse_in_event_loop(result)
                # With a factory it leaves alone what this thread has for an event loop.
                with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:
                    runner.run(_await(scope.for_callback(), result))
        except Exception:
            _log_failed(scope, due.callback)


async def _await(unit: SessionScope, result: Awaitable[Any]) -> None:
    await _call(unit, lambda: result)


def _call_sync(unit: SessionScope, callback: Callback) -> Any:
    unit.enter()
    try:
        try:
            result = callback()
        except BaseException:
            finish_sync(unit, commit=False)
            raise
        finish_sync(unit, commit=not unit.is_rollback_only)
        return result
    finally:
        unit.leave()


def _refuse_in_event_loop(result: Awaitable[Any]) -> None:
    if asyncio._get_running_loop() is not None:
        if inspect.iscoroutine(result):
            result.close()
        raise ScopeError(
            "an async callback cannot be awaited here: the unit of work was ended by sync code "
            "in the thread of an event loop.\n"
            "Use `async with session_scope()` in async code, or register a sync callback."
        )


def _log_failed(scope: SessionScope, callback: Callback) -> None:
    logger.error(
        "callback %s of %s failed. The transaction it waited for has ended all the same.",
        getattr(callback, "__qualname__", repr(callback)),
        scope.label,
        exc_info=True,
    )
