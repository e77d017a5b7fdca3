"""The line of writers: fair across threads and event loops, and never blocked by who has gone."""

import asyncio
import gc
import os
import signal
import threading
import weakref
from collections import deque
from typing import Any

import pytest

from repom.dialects.write_queue import Ticket, WriteQueue, write_queue
from tests.support.polling import block_until

FOREVER = 60.0


def length(queue: WriteQueue) -> int:
    return len(queue._line)


def test_first_come_first_served_across_threads_and_loops() -> None:
    """Every second writer is a thread, the others are tasks on loops of their own threads."""
    queue = WriteQueue()
    first = queue.acquire("first", 0)
    order: list[int] = []

    def in_thread(number: int) -> None:
        ticket = queue.acquire(number, FOREVER)
        order.append(number)
        ticket.release()

    async def in_task(number: int) -> None:
        ticket = await queue.acquire_async(number, FOREVER)
        order.append(number)
        ticket.release()

    threads = []
    for number in range(8):
        work = in_thread if number % 2 else lambda n: asyncio.run(in_task(n))
        thread = threading.Thread(target=work, args=(number,))
        thread.start()
        threads.append(thread)
        block_until(lambda number=number: length(queue) == number + 2)  # type: ignore[misc]
    first.release()
    for thread in threads:
        thread.join()
    assert order == list(range(8))


async def test_a_newcomer_does_not_overtake_who_was_called() -> None:
    """Between the call and the task's next turn, the place is taken already."""
    queue = WriteQueue()
    first = await queue.acquire_async("first", FOREVER)
    waiter = asyncio.create_task(queue.acquire_async("waiter", FOREVER))
    await asyncio.sleep(0)
    first.release()
    newcomer = asyncio.create_task(queue.acquire_async("newcomer", FOREVER))
    ticket = await waiter
    assert not newcomer.done()
    assert queue.holder() == "waiter"
    ticket.release()
    (await newcomer).release()
    assert queue.holder() is None


def test_releasing_twice_is_releasing_once() -> None:
    """A ticket whose time is over cannot end the turn of another writer."""
    queue = WriteQueue()
    first = queue.acquire("first", 0)
    first.release()
    second = queue.acquire("second", 0)
    first.release()
    assert queue.holder() == "second"
    second.release()


def test_a_thread_that_waited_too_long_leaves_the_line() -> None:
    """It raises, and is no obstacle to those behind it."""
    queue = WriteQueue()
    first = queue.acquire("first", 0)
    with pytest.raises(TimeoutError):
        queue.acquire("second", 0.01)
    first.release()
    assert queue.holder() is None


@pytest.mark.parametrize("how", ["late", "cancelled"])
async def test_a_task_that_does_not_wait_longer_leaves_the_line(how: str) -> None:
    """Whether its time was up or it was cancelled, who is behind it moves up."""
    queue = WriteQueue()
    first = await queue.acquire_async("first", FOREVER)
    limit = 0.01 if how == "late" else FOREVER
    second = asyncio.create_task(queue.acquire_async("second", limit))
    await asyncio.sleep(0)
    third = asyncio.create_task(queue.acquire_async("third", FOREVER))
    await asyncio.sleep(0)
    if how == "cancelled":
        second.cancel()
    with pytest.raises(TimeoutError if how == "late" else asyncio.CancelledError):
        await second
    first.release()
    (await third).release()
    assert length(queue) == 0


async def test_a_task_cancelled_when_it_was_called_passes_the_turn_on() -> None:
    """Its turn had come, but it will never know."""
    queue = WriteQueue()
    first = await queue.acquire_async("first", FOREVER)
    second = asyncio.create_task(queue.acquire_async("second", FOREVER))
    await asyncio.sleep(0)
    first.release()
    second.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second
    assert queue.holder() is None


def test_a_task_of_a_closed_loop_passes_the_turn_on() -> None:
    """Its loop was closed while it stood in line: the call reaches nobody."""
    queue = WriteQueue()
    first = queue.acquire("first", 0)
    loop = asyncio.new_event_loop()
    task = loop.create_task(queue.acquire_async("lost", FOREVER))
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    second: list[Ticket] = []
    thread = threading.Thread(target=lambda: second.append(queue.acquire("second", FOREVER)))
    thread.start()
    block_until(lambda: length(queue) == 3)
    first.release()
    thread.join()
    assert queue.holder() == "second"
    second[0].release()
    # The rest is about this test: let the task of the closed loop go without a complaint.
    task._log_destroy_pending = False  # type: ignore[attr-defined]
    coroutine: Any = task.get_coro()
    coroutine.close()


def test_a_thread_interrupted_while_it_waits_leaves_the_line() -> None:
    """Ctrl-C in the main thread."""
    queue = WriteQueue()
    first = queue.acquire("first", 0)

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR1, interrupt)

    def when_waiting() -> None:
        block_until(lambda: length(queue) == 2)
        os.kill(os.getpid(), signal.SIGUSR1)

    thread = threading.Thread(target=when_waiting)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            queue.acquire("second", FOREVER)
    finally:
        signal.signal(signal.SIGUSR1, before)
        thread.join()
    first.release()
    assert queue.holder() is None


def test_the_garbage_collector_may_release_at_any_moment() -> None:
    """It runs in the thread that is just changing the line, and releases there: that thread must
    not wait for itself, and whose turn it now is must be called."""
    queue = WriteQueue()
    forgotten = queue.acquire("forgotten", 0)
    called: list[str] = []
    leaving = queue._enter("leaving", lambda _: called.append("leaving"))
    queue._enter("last", lambda _: called.append("last"))

    class Line(deque[Ticket]):
        def remove(self, ticket: Ticket) -> None:
            forgotten.release()  # what the garbage collector would do
            super().remove(ticket)

    queue._line = Line(queue._line)
    # In a thread, which the test can give up if it blocks itself for ever.
    thread = threading.Thread(target=leaving.release, daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive()
    assert called[-1] == "last"
    assert queue.holder() == "last"


def test_one_line_for_each_file_while_anybody_knows_it() -> None:
    """However many engines there are; a file that nobody uses any more costs nothing."""
    queue = write_queue("/a")
    assert write_queue("/a") is queue
    assert write_queue("/b") is not queue
    reference = weakref.ref(queue)
    del queue
    gc.collect()
    assert reference() is None
