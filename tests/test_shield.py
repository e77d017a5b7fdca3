"""`run_to_end`: nothing stops the end of a unit of work but its time limit."""

import asyncio
import contextlib
import gc
import weakref
from collections.abc import Coroutine
from typing import Any

import anyio
import pytest

from repom import limit
from repom.errors import TransactionError
from repom.shield import Ending, acting_task, run_to_end
from tests.support.cancelling import CANCELLING, Cancelling, cancelled_at, counted_turns

LIMIT = 5.0


class RefusedError(Exception):
    pass


async def steps(log: list[int], count: int = 3) -> str:
    for number in range(count):
        await asyncio.sleep(0)
        log.append(number)
    return "done"


async def test_returns_what_the_ending_returns() -> None:
    assert await run_to_end(steps([]), limit=LIMIT) == "done"


async def test_raises_what_the_ending_raises() -> None:
    async def fail() -> None:
        raise RefusedError

    with pytest.raises(RefusedError):
        await run_to_end(fail(), limit=LIMIT)


@pytest.mark.parametrize("how", CANCELLING)
async def test_ending_is_done_before_the_cancellation_comes_out(how: Cancelling) -> None:
    """However the caller is cancelled, it hears of it when all steps are done."""
    log: list[int] = []
    seen: list[int] = []

    async def caller() -> None:
        try:
            await run_to_end(steps(log), limit=LIMIT)
        finally:
            seen.extend(log)

    assert await cancelled_at(1, how, caller())
    assert seen == [0, 1, 2]


async def test_two_cancellations_in_one_moment_are_one() -> None:
    """The task is not woken twice, the second time when it is done."""
    loop = asyncio.get_running_loop()
    complaints: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _, context: complaints.append(context))
    answer: asyncio.Future[None] = loop.create_future()

    async def end() -> None:
        await answer

    task = asyncio.create_task(awaiting(end()))
    await asyncio.sleep(0)
    task.cancel()
    task.cancel()
    answer.set_result(None)
    await asyncio.wait((task,))
    await asyncio.sleep(0)
    assert (task.cancelled(), complaints) == (True, [])


async def awaiting(ending: Coroutine[Any, Any, None]) -> None:
    with contextlib.suppress(RefusedError):
        await run_to_end(ending, limit=LIMIT)


async def test_pending_cancellation_does_not_keep_the_ending_from_starting() -> None:
    """A task that is cancelled before it reaches the ending runs it all the same."""
    log: list[int] = []

    async def caller() -> None:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        await run_to_end(steps(log), limit=LIMIT)

    with pytest.raises(asyncio.CancelledError):
        await asyncio.create_task(caller())
    assert log == [0, 1, 2]


async def test_error_of_the_ending_is_the_cause_of_the_cancellation() -> None:
    """A caller that was cancelled meanwhile still learns that COMMIT had failed."""
    going_on = asyncio.Event()

    async def fail() -> None:
        await going_on.wait()
        raise RefusedError

    task = asyncio.create_task(run_to_end(fail(), limit=LIMIT))
    await asyncio.sleep(0)
    task.cancel()
    asyncio.get_running_loop().call_soon(going_on.set)
    with pytest.raises(asyncio.CancelledError) as caught:
        await task
    assert isinstance(caught.value.__cause__, RefusedError)


async def test_waiting_under_a_cancelled_scope_costs_no_turns_of_the_loop() -> None:
    """anyio repeats its cancellation on every turn of the loop; the shield stops that."""
    release = asyncio.Event()
    with counted_turns() as turns, anyio.CancelScope() as scope:
        asyncio.get_running_loop().call_soon(scope.cancel)
        asyncio.get_running_loop().call_later(0.05, release.set)
        await run_to_end(release.wait(), limit=LIMIT)
    assert scope.cancelled_caught
    assert release.is_set()
    assert turns[0] < 25


async def test_time_limit_cancels_the_ending() -> None:
    """What hangs is cancelled by the limit; the caller, who is not, gets an error."""
    expired: list[bool] = []

    async def hang() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            task = asyncio.current_task()
            assert isinstance(task, Ending)
            expired.append(task.is_late)

    with pytest.raises(TransactionError, match=r"time limit of 0\.01 s"):
        await run_to_end(hang(), limit=0.01)
    assert expired == [True]


async def test_time_limit_of_an_ending_whose_caller_was_cancelled() -> None:
    """The caller was, so that is what it gets."""
    task = asyncio.create_task(run_to_end(asyncio.sleep(60), limit=0.01))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait((task,))
    assert task.cancelled()


async def test_time_limit_insists(monkeypatch: pytest.MonkeyPatch) -> None:
    """An ending whose next step hangs, too, is cancelled again."""
    monkeypatch.setattr(limit, "_INSIST_EVERY", 0.01)
    cancelled = []

    async def hang() -> str:
        for _ in range(3):
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                cancelled.append(True)
        return "done"

    assert await run_to_end(hang(), limit=0.01) == "done"
    assert cancelled == [True] * 3


async def test_timeouts_inside_the_ending_work() -> None:
    """Pools and drivers limit their waiting by cancelling the task they run in."""

    async def connect() -> None:
        async with asyncio.timeout(0.01):
            await asyncio.Event().wait()

    with pytest.raises(TimeoutError):
        await run_to_end(connect(), limit=LIMIT)


@pytest.mark.parametrize("how", ["succeeds", "fails", "is cancelled"])
async def test_ending_is_freed_without_the_garbage_collector(how: str) -> None:
    """No reference cycle is left, whatever comes out of it."""

    class Held:
        pass

    async def end(held: Held) -> None:
        await asyncio.sleep(0)
        if how == "fails":
            raise RefusedError

    async def caller(held: Held) -> None:
        with contextlib.suppress(RefusedError):
            await run_to_end(end(held), limit=LIMIT)

    held = Held()
    gone = weakref.ref(held)
    gc.collect()
    gc.disable()
    try:
        task = asyncio.create_task(caller(held))
        del held
        await asyncio.sleep(0)
        if how == "is cancelled":
            task.cancel()
        await asyncio.wait((task,))
        del task
        await asyncio.sleep(0)
        assert gone() is None
    finally:
        gc.enable()


async def test_ending_acts_for_the_task_that_waits_for_it() -> None:
    """What it holds while it runs is that task's, which will not do anything else meanwhile."""

    async def end() -> None:
        acting.append(acting_task())

    acting = [acting_task()]
    await run_to_end(end(), limit=LIMIT)
    here = asyncio.current_task()
    assert acting == [here, here]


async def test_an_ending_is_a_task_to_whoever_looks_at_it() -> None:
    """Tracing notes things on the current task, and asks it for its name."""
    seen: list[Any] = []

    async def end() -> None:
        task: Any = asyncio.current_task()
        task.noted = "a note"
        seen.extend([task.noted, task.get_name(), weakref.ref(task)() is task, task])

    await run_to_end(end(), limit=LIMIT)
    here = asyncio.current_task()
    assert here is not None
    assert seen[:3] == ["a note", here.get_name(), True]
    with pytest.raises(AttributeError, match="get_name"):
        seen[3].get_name()  # it is over, and keeps nothing alive
