"""`Limit`: all limits of an event loop share one timer."""

import asyncio
import contextlib
import contextvars
import gc
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import pytest

from repom import limit as module
from repom.limit import Limit


@contextlib.contextmanager
def timers(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """The times for which timers of the running loop are set inside the block."""
    loop = asyncio.get_running_loop()
    found: list[float] = []
    call_at = loop.call_at

    def counting(when: float, *args: Any, **kwargs: Any) -> asyncio.TimerHandle:
        found.append(when)
        return call_at(when, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(loop, "call_at", counting)
        yield found


async def test_many_limits_need_one_timer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those who come later are due later."""
    with timers(monkeypatch) as found:
        for _ in range(100):
            Limit(60, pytest.fail).lift()
    assert len(found) == 1


async def test_who_is_due_earlier_is_not_kept_waiting() -> None:
    """A shorter limit rings first, and the longer one is not forgotten."""
    over: list[str] = []
    rung = asyncio.Event()

    def late_is_over() -> None:
        over.append("late")
        rung.set()

    late = Limit(0.03, late_is_over)
    early = Limit(0.01, lambda: over.append("early"))
    await asyncio.wait_for(rung.wait(), 5)
    assert over == ["early", "late"]
    assert early.is_over
    assert late.is_over
    early.lift()
    late.lift()


async def test_timers_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """However often a shorter limit comes, the longer one is rung for once."""
    rung, over = asyncio.Event(), asyncio.Event()
    late = Limit(0.3, over.set)
    for _ in range(3):
        early = Limit(0.005, rung.set)
        await asyncio.wait_for(rung.wait(), 5)
        early.lift()
        rung.clear()
    async with asyncio.timeout(5):
        with timers(monkeypatch) as found:
            await over.wait()
            await asyncio.sleep(0)
    late.lift()
    assert len(found) == 1  # to insist


async def test_what_was_lifted_is_not_cancelled() -> None:
    """Though the timer that was set for it rings."""
    rung = asyncio.Event()
    lifted = Limit(0.01, pytest.fail)
    other = Limit(0.01, rung.set)
    lifted.lift()
    await asyncio.wait_for(rung.wait(), 5)
    other.lift()
    assert not lifted.is_over


async def test_who_does_not_end_is_cancelled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the limit is lifted."""
    monkeypatch.setattr(module, "_INSIST_EVERY", 0.01)
    third = asyncio.Event()
    calls: list[None] = []

    def cancel() -> None:
        calls.append(None)
        if len(calls) == 3:
            third.set()

    limit = Limit(0.01, cancel)
    await asyncio.wait_for(third.wait(), 5)
    limit.lift()
    assert limit.is_over


def test_every_loop_has_a_timer_of_its_own() -> None:
    """Loops one after the other in one thread, and others in other threads at the same time."""

    async def wait() -> bool:
        rung = asyncio.Event()
        limit = Limit(0.01, rung.set)
        await asyncio.wait_for(rung.wait(), 5)
        limit.lift()
        return limit.is_over

    assert asyncio.run(wait())
    assert asyncio.run(wait())
    found: list[bool] = []
    threads = [threading.Thread(target=lambda: found.append(asyncio.run(wait()))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 3


def test_loop_is_not_kept_alive() -> None:
    """By the timer that is left over, which would ring in half a minute."""

    async def end() -> weakref.ref[asyncio.AbstractEventLoop]:
        Limit(30, pytest.fail).lift()
        return weakref.ref(asyncio.get_running_loop())

    loop = asyncio.run(end())
    gc.collect()
    assert loop() is None


async def test_context_is_not_kept_alive() -> None:
    """A timer is set in the context of who comes first, and outlives that."""

    class Value:
        pass

    def begin() -> weakref.ref[Value]:
        value = Value()
        context = contextvars.copy_context()
        context.run(variable.set, value)
        context.run(lambda: Limit(30, pytest.fail).lift())
        return weakref.ref(value)

    variable = contextvars.ContextVar[Value]("variable")
    found = begin()
    gc.collect()
    assert found() is None
