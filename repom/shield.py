"""Run the end of a unit of work to its end, whatever happens to the task that waits for it.

A COMMIT that is cancelled half-way has an outcome nobody knows, and a ROLLBACK that is
cancelled leaves a connection out of its pool. So the ending is a task of its own, which nobody
but its time limit can cancel. Its steps are taken by the task that waits for it, since that has
nothing else to do: an `asyncio.Task` for each ending would take three more turns of the event
loop, as many as COMMIT itself.
"""

from __future__ import annotations

import asyncio
import contextlib
from asyncio import AbstractEventLoop, CancelledError, Future, _enter_task, _leave_task
from collections.abc import Callable, Coroutine, Generator
from contextvars import Context
from typing import Any, TypeVar

import anyio

from repom.errors import TransactionError
from repom.limit import Limit

T = TypeVar("T")


class Ending:
    """An ending under way: what `asyncio.current_task()` is for the code that runs in it.

    So the time-outs of pools and drivers, which cancel the task they find themselves in, end
    what they are meant to end. In all but its cancellation it is the task that takes its steps.

    Attributes:
        caller: that task.
        limit: of its time, once it has to wait for something.
    """

    __slots__ = (
        "__dict__",  # as a task has one, for whoever notes something there
        "__weakref__",
        "_cancels",
        "_coro",
        "_fut_waiter",
        "_loop",
        "_must_cancel",
        "caller",
        "limit",
    )

    def __init__(self, coro: Coroutine[Any, Any, Any], caller: asyncio.Task[Any]) -> None:
        self.caller = caller
        self.limit: Limit | None = None
        # These names anyio looks for.
        self._must_cancel = False
        self._fut_waiter: Future[Any] | None = None
        self._coro = coro
        self._loop = caller.get_loop()
        self._cancels = 0

    def step(self) -> Future[Any] | None:
        """Go on to the next thing to wait for; to none, if it only lets others go first.

        Raises:
            StopIteration: it has ended, and what it returns is the value.
        """
        loop, caller = self._loop, self.caller
        self._fut_waiter = None
        _leave_task(loop, caller)
        _enter_task(loop, self)  # type: ignore[arg-type]
        try:
            if self._must_cancel:
                self._must_cancel = False
                future = self._coro.throw(CancelledError())
            else:
                future = self._coro.send(None)
        finally:
            _leave_task(loop, self)  # type: ignore[arg-type]
            _enter_task(loop, caller)
        if future is not None:
            self._fut_waiter = future
            future._asyncio_future_blocking = False
            if self._must_cancel:
                self._must_cancel = not future.cancel()
        return future  # type: ignore[no-any-return]

    def over(self) -> None:
        """It has ended. What it raised has its frames, and they must not lead to its caller."""
        if self.limit is not None:
            self.limit.lift()
        del self.caller

    @property
    def is_late(self) -> bool:
        """Whether its time limit is over."""
        return self.limit is not None and self.limit.is_over

    # --- what code asks of the task it runs in

    def cancel(self, msg: Any = None) -> bool:
        self._cancels += 1
        if self._fut_waiter is None or not self._fut_waiter.cancel(msg=msg):
            self._must_cancel = True
        return True

    def cancelling(self) -> int:
        return self._cancels

    def uncancel(self) -> int:
        self._cancels = max(0, self._cancels - 1)
        return self._cancels

    def get_coro(self) -> Coroutine[Any, Any, Any]:
        return self._coro

    def __getattr__(self, name: str) -> Any:
        try:
            caller = object.__getattribute__(self, "caller")
        except AttributeError:
            raise AttributeError(f"{name}: this task has ended") from None
        return getattr(caller, name)


class _Waiting:
    """What the caller waits for: `future`, which is not cancelled with the caller.

    The methods are those that an `asyncio.Task` calls on what it waits for.
    """

    __slots__ = ("_asyncio_future_blocking", "_context", "_future", "_is_cancelled", "_wake")

    _wake: Callable[[Any], object]
    _context: Context | None

    def __init__(self, future: Future[Any]) -> None:
        self._future = future
        self._is_cancelled = False
        self._asyncio_future_blocking = True

    def __await__(self) -> Generator[Any, None, None]:
        # As `yield self` does, without a frame that is kept meanwhile.
        waited_for: Any = iter((self,))
        return waited_for  # type: ignore[no-any-return]

    def get_loop(self) -> AbstractEventLoop:
        return self._future.get_loop()

    def add_done_callback(
        self, wake: Callable[[Any], object], *, context: Context | None = None
    ) -> None:
        self._wake, self._context = wake, context
        self._future.add_done_callback(self._done, context=context)

    def _done(self, future: Future[Any]) -> None:
        self._wake(self)

    def result(self) -> None:
        """What `future` has raised it raises where it is awaited, and not in the caller."""

    def cancel(self, msg: Any = None) -> bool:
        if self._is_cancelled or self._future.done():
            return False  # it is being woken already
        self._is_cancelled = True
        self._future.remove_done_callback(self._done)
        loop = self._future.get_loop()
        cancelled = loop.create_future()
        cancelled.cancel(msg)
        loop.call_soon(self._wake, cancelled, context=self._context)
        return True


async def run_to_end(coro: Coroutine[Any, Any, T], *, limit: float) -> T:
    """Await `coro` to its end, and only then let a cancellation of the caller through.

    Args:
        coro: the end of a unit of work.
        limit: seconds after which it is cancelled. Cancelled inside a database call, SQLAlchemy
            invalidates the connection, which is what the limit is for.

    Returns:
        What `coro` returns.

    Raises:
        TransactionError: `coro` did not finish in time, and did not say so itself.
        asyncio.CancelledError: the caller was cancelled meanwhile; `coro` has ended all the
            same. What `coro` raised is then the `__cause__`.
    """
    caller = asyncio.current_task()
    assert caller is not None
    if isinstance(caller, Ending):
        return await coro  # inside another one, so nobody cancels it
    ending = Ending(coro, caller)
    cancelled: CancelledError | None = None
    result: Any = None
    try:
        try:
            while True:
                future = ending.step()
                if ending.limit is None:
                    ending.limit = Limit(limit, ending.cancel)
                if cancelled is None:
                    try:
                        await (asyncio.sleep(0) if future is None else _Waiting(future))
                    except CancelledError as error:
                        cancelled = error
                if cancelled is not None:
                    await _settled(future)
        except StopIteration as end:
            result = end.value
        except Exception as error:
            # The same exception object goes on: anyio recognises its own by the message.
            if cancelled is not None:
                raise cancelled from error
            raise
        except CancelledError as error:
            if cancelled is None and ending.is_late:
                raise _too_late(limit) from error
            if cancelled is None:
                raise
        if cancelled is not None:
            raise cancelled
        return result  # type: ignore[no-any-return]
    finally:
        ending.over()
        # Or what is raised would keep itself alive: its traceback has this frame.
        del caller, ending, cancelled


def _too_late(limit: float) -> TransactionError:
    return TransactionError(
        f"the end of a unit of work did not finish within its time limit of {limit:g} s."
    )


async def _settled(future: Future[Any] | None) -> None:
    """Wait until `future` is done, through any number of cancellations.

    The caller is about to raise the first CancelledError; another one says no more.
    """
    with anyio.CancelScope(shield=True):
        if future is None:
            with contextlib.suppress(CancelledError):
                await asyncio.sleep(0)
        while future is not None and not future.done():
            with contextlib.suppress(CancelledError):
                await asyncio.wait((future,))


def acting_task() -> asyncio.Task[Any] | None:
    """The running task, or the one that waits for it if this is the end of its work."""
    task = asyncio.current_task() if asyncio._get_running_loop() is not None else None
    return task.caller if isinstance(task, Ending) else task
