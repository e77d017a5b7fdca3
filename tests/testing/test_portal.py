"""The thread where an async connection of the tests lives, called from everywhere."""

import asyncio
import threading
from collections.abc import Iterator

import pytest
from sqlalchemy.util import await_only, greenlet_spawn

from repom.testing.portal import Cancellation, LoopPortal
from tests.support.polling import until


@pytest.fixture
def portal() -> Iterator[LoopPortal]:
    """One, that is closed after the test."""
    portal = LoopPortal()
    yield portal
    portal.close()


def sleep_and_tell(seconds: float = 0) -> tuple[str, bool]:
    """As a driver does: awaits, in a greenlet; tells where that was."""
    await_only(asyncio.sleep(seconds))
    thread = threading.current_thread()
    return thread.name, thread is threading.main_thread()


def test_call_from_sync_code(portal: LoopPortal) -> None:
    """Blocks until it is done; what it raises comes back."""
    assert portal.call(sleep_and_tell) == ("repom.testing", False)
    with pytest.raises(ZeroDivisionError):
        portal.call(lambda: 1 / 0)


async def test_call_from_async_code(portal: LoopPortal) -> None:
    """Awaits, so that the loop goes on meanwhile."""
    go_on = threading.Event()
    waiting = asyncio.create_task(greenlet_spawn(portal.call, go_on.wait, 10))
    await asyncio.sleep(0)
    go_on.set()
    assert await waiting
    with pytest.raises(ZeroDivisionError):
        await greenlet_spawn(portal.call, lambda: 1 / 0)


@pytest.mark.parametrize("allowed", [False, True])
async def test_call_that_is_cancelled(portal: LoopPortal, allowed: bool) -> None:
    """Goes on to its end, unless it says that it may be cut off."""
    cancellation = Cancellation()
    seen: list[str] = []
    started, go_on = threading.Event(), asyncio.Event()
    loop_of_portal: list[asyncio.AbstractEventLoop] = []

    def work() -> None:
        loop_of_portal.append(asyncio.get_running_loop())
        cancellation.allowed = allowed
        started.set()
        try:
            await_only(go_on.wait())
            seen.append("done")
        except asyncio.CancelledError:
            seen.append("cut off")
            raise

    def call() -> None:
        portal.call(work, cancellation=cancellation)

    task = asyncio.create_task(greenlet_spawn(call))
    await until(started.is_set)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    if not allowed:
        assert seen == []
        loop_of_portal[0].call_soon_threadsafe(go_on.set)
    await until(lambda: bool(seen))
    assert seen == ["cut off" if allowed else "done"]


def test_close_waits_for_what_was_posted() -> None:
    """The garbage collector does not wait, but a connection is closed all the same."""
    portal = LoopPortal()
    done: list[tuple[str, bool]] = []
    portal.post(lambda: done.append(sleep_and_tell(0.05)))
    assert done == []
    portal.close()
    assert len(done) == 1
