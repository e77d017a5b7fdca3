"""The gate of a session: one at a time, in order, nobody forgotten, nobody after the end."""

import asyncio
import gc
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy.util import await_only, greenlet_spawn

from repom import gate as gate_module
from repom.errors import ConcurrentSessionUse, ScopeClosedError
from repom.gate import TaskGate, ThreadGate
from repom.shield import run_to_end


class Worker:
    """Tasks that pass one gate as sessions do, and what they did, in order."""

    def __init__(self) -> None:
        self.gate = TaskGate()
        self.log: list[str] = []

    async def work(self, name: str, until: Awaitable[Any] | None = None) -> None:
        """Pass the gate and stay inside for some turns, or until something has happened."""
        await greenlet_spawn(self._inside, name, until or asyncio.sleep(0))

    async def end(self, name: str) -> None:
        """Pass the gate as the owner does to roll back."""
        await greenlet_spawn(self._inside, name, asyncio.sleep(0), ending=True)

    async def commit(self, name: str) -> None:
        """Pass the gate as the owner does to commit."""
        await greenlet_spawn(self._inside, name, asyncio.sleep(0), committing=True)

    def _inside(self, name: str, until: Awaitable[Any], **how: bool) -> None:
        try:
            entered = self.gate.enter(**how)
        except BaseException:
            if asyncio.iscoroutine(until):
                until.close()
            raise
        try:
            self.log.append(f"{name} in")
            await_only(until)
            self.log.append(f"{name} out")
        finally:
            if entered:
                self.gate.leave()

    @contextmanager
    def block(self) -> Iterator[None]:
        """A savepoint, without the session."""
        self.gate.enter()
        block = self.gate.begin_block()
        self.gate.leave()
        try:
            yield
        finally:
            self.gate.blocks.end(block, undone=False)


async def turns(count: int = 5) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def test_who_has_left_is_not_inside_any_more() -> None:
    """Of several operations in one greenlet, as in `run_sync()`, each passes the gate."""
    gate = TaskGate()

    def work() -> None:
        assert gate.enter()
        assert not gate.enter()  # an operation inside another one
        gate.leave()
        assert gate.enter()
        gate.leave()
        gate.closed = True
        with pytest.raises(ScopeClosedError):
            gate.enter()

    await greenlet_spawn(work)


async def test_tasks_enter_one_after_the_other_in_the_order_they_came() -> None:
    worker = Worker()
    names = list("abcdefgh")
    await asyncio.gather(*(worker.work(name) for name in names))
    assert worker.log == [f"{name} {what}" for name in names for what in ("in", "out")]
    assert worker.gate.is_free


async def test_newcomer_does_not_overtake_those_who_wait() -> None:
    """Who leaves and comes back at once finds itself behind the others."""
    worker = Worker()

    async def twice() -> None:
        await worker.work("first")
        await worker.work("again")

    await asyncio.gather(twice(), worker.work("second"))
    assert [line for line in worker.log if line.endswith("in")] == [
        "first in",
        "second in",
        "again in",
    ]


async def test_task_inside_may_enter_again() -> None:
    """An execute that flushes first is one operation; only its first entry is to be left."""
    gate = TaskGate()
    assert gate.enter() is True
    assert gate.enter() is False
    assert gate.is_mine
    gate.leave()
    assert gate.is_free
    assert not gate.is_mine


async def test_failure_inside_lets_the_next_one_in() -> None:
    worker = Worker()

    async def fail() -> None:
        await asyncio.sleep(0)
        raise ValueError

    failing = asyncio.create_task(worker.work("bad", fail()))
    await asyncio.gather(failing, worker.work("good"), return_exceptions=True)
    assert isinstance(failing.exception(), ValueError)
    assert worker.log == ["bad in", "good in", "good out"]


@pytest.mark.parametrize("at", range(1, 8))
async def test_cancelled_task_is_forgotten_wherever_it_was(at: int) -> None:
    """Waiting, just given its turn, or inside: the others get theirs all the same."""
    worker = Worker()
    first = asyncio.create_task(worker.work("first", turns(2)))
    cancelled = asyncio.create_task(worker.work("cancelled"))
    last = asyncio.create_task(worker.work("last"))
    await turns(at)
    cancelled.cancel()
    await asyncio.wait((first, cancelled, last), timeout=5)
    assert worker.log[-2:] == ["last in", "last out"]
    assert worker.gate.is_free
    await asyncio.wait_for(worker.work("later"), 5)


async def test_cancelled_in_the_very_turn_it_was_let_in() -> None:
    """The turn that a task can no longer take goes to the next one."""
    worker = Worker()
    going_on = asyncio.Event()

    async def leave_and_cancel() -> None:
        await going_on.wait()
        # Called after `first` has let `second` in, and before `second` knows.
        asyncio.get_running_loop().call_soon(second.cancel)

    first = asyncio.create_task(worker.work("first", leave_and_cancel()))
    second = asyncio.create_task(worker.work("second"))
    third = asyncio.create_task(worker.work("third"))
    await turns()
    going_on.set()
    await asyncio.wait((first, second, third), timeout=5)
    assert second.cancelled()
    assert worker.log == ["first in", "first out", "third in", "third out"]


async def test_closed_gate_refuses_those_who_come_and_those_who_wait() -> None:
    """Whoever is inside finishes; the owner gets in, in its turn."""
    worker = Worker()
    inside = asyncio.create_task(worker.work("inside", turns()))
    waiting = asyncio.create_task(worker.work("waiting"))
    await turns(2)
    worker.gate.closed = True
    owner = asyncio.create_task(worker.end("owner"))
    newcomer = asyncio.create_task(worker.work("newcomer"))
    await asyncio.wait((inside, waiting, owner, newcomer), timeout=5)
    assert worker.log == ["inside in", "inside out", "owner in", "owner out"]
    for task in (waiting, newcomer):
        assert isinstance(task.exception(), ScopeClosedError)
        assert "session_scope()" in str(task.exception())
    assert worker.gate.is_free


def test_gate_leaves_no_cycle() -> None:
    """Every session has one, and none of them is to wait for the garbage collector."""
    gc.collect()
    for gate in (TaskGate, ThreadGate):
        gate()
    assert gc.collect() == 0


# --- blocks ---------------------------------------------------------------------------------------


async def test_block_keeps_siblings_out_until_it_is_left() -> None:
    """What a sibling did meanwhile would be undone together with the block."""
    worker = Worker()
    begun = asyncio.Event()

    async def sibling() -> None:
        await begun.wait()
        await worker.work("sibling")

    waiting = asyncio.create_task(sibling())
    with worker.block():
        begun.set()
        await worker.work("own")
        await turns()
        await worker.work("own again")
    await waiting
    assert [line for line in worker.log if line.endswith("in")] == [
        "own in",
        "own again in",
        "sibling in",
    ]


async def test_tasks_started_in_a_block_belong_to_it() -> None:
    """They are a part of its work, and the one that entered may wait for them."""
    worker = Worker()
    with worker.block():
        async with asyncio.timeout(5), asyncio.TaskGroup() as group:
            group.create_task(worker.work("child"))
            group.create_task(worker.work("other child"))
    assert len(worker.log) == 4


async def test_inner_block_keeps_out_the_tasks_of_the_outer_one() -> None:
    worker = Worker()
    begun, leave = asyncio.Event(), asyncio.Event()

    async def child() -> None:
        with worker.block():
            begun.set()
            await leave.wait()
            await worker.work("inner")

    with worker.block():
        task = asyncio.create_task(child())
        await begun.wait()
        own = asyncio.create_task(worker.work("outer"))
        await turns()
        assert worker.log == []
        leave.set()
        await asyncio.gather(task, own)
    assert worker.log == ["inner in", "inner out", "outer in", "outer out"]


async def test_block_that_its_task_has_left_open_is_for_all() -> None:
    """A savepoint that is begun by hand in one task may be released by another."""
    worker = Worker()
    begun, leave = asyncio.Event(), asyncio.Event()
    blocks = []

    async def begin() -> None:
        blocks.append(block := worker.block())
        block.__enter__()
        begun.set()
        await leave.wait()

    task = asyncio.create_task(begin())
    await begun.wait()
    waiting = asyncio.create_task(worker.work("waiting"))
    await turns()
    assert worker.log == []
    leave.set()
    await asyncio.gather(task, waiting)
    await worker.work("newcomer")
    assert worker.log == ["waiting in", "waiting out", "newcomer in", "newcomer out"]
    blocks[0].__exit__(None, None, None)


async def test_block_that_begins_while_others_wait_and_is_left_open(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Who has waited before it began is let in as soon as its task is done."""
    monkeypatch.setattr(gate_module, "BLOCK_TIMEOUT", 60)
    worker = Worker()

    async def begin() -> None:
        await greenlet_spawn(begin_inside)

    def begin_inside() -> None:
        worker.gate.enter()
        await_only(turns())  # the statement that begins it, for whose end another one waits
        worker.gate.begin_block()
        worker.gate.leave()

    task = asyncio.create_task(begin())
    await turns(2)
    waiting = asyncio.create_task(worker.work("waiting"))
    await asyncio.wait((task, waiting), timeout=5)
    assert worker.log == ["waiting in", "waiting out"]


async def test_block_left_open_inside_another_one_opens_that_to_nobody() -> None:
    worker = Worker()
    begun, leave = asyncio.Event(), asyncio.Event()

    async def outer() -> None:
        with worker.block():
            await asyncio.create_task(leave_open())
            begun.set()
            await leave.wait()
            await worker.work("own")

    async def leave_open() -> None:
        blocks.append(block := worker.block())
        block.__enter__()

    blocks: list[Any] = []
    task = asyncio.create_task(outer())
    await begun.wait()
    waiting = asyncio.create_task(worker.work("waiting"))
    await turns()
    assert worker.log == []
    leave.set()
    await asyncio.gather(task, waiting)
    assert worker.log == ["own in", "own out", "waiting in", "waiting out"]
    blocks[0].__exit__(None, None, None)


async def test_commit_waits_for_the_block_of_another_task() -> None:
    """Also when the gate is closed: a block is not to be committed by half."""
    worker = Worker()
    begun = asyncio.Event()

    async def sibling() -> None:
        with worker.block():
            begun.set()
            await turns()
            with pytest.raises(ScopeClosedError):
                await worker.work("too late")

    task = asyncio.create_task(sibling())
    await begun.wait()
    worker.gate.closed = True
    await worker.commit("owner")
    assert task.done()
    assert worker.log == ["owner in", "owner out"]


async def test_commit_does_not_wait_for_the_block_of_its_own_task() -> None:
    """A generator dependency may be in one while the response is sent. The end runs in a task of
    its own, on behalf of the one that waits for it."""
    worker = Worker()
    with worker.block():
        await run_to_end(worker.commit("owner"), limit=5)
    assert worker.log == ["owner in", "owner out"]


async def test_task_left_over_from_a_block_that_was_rolled_back() -> None:
    """It is refused; the one that had entered the block is not, nor is a sibling."""
    worker = Worker()
    begun, over = asyncio.Event(), asyncio.Event()

    async def left_over() -> None:
        begun.set()
        await over.wait()
        with pytest.raises(ScopeClosedError, match="was rolled back"):
            await worker.work("left over")
        with pytest.raises(ScopeClosedError, match="was rolled back"):
            worker.gate.refuse_if_over()

    async def sibling() -> None:
        await over.wait()
        await worker.work("sibling")

    other = asyncio.create_task(sibling())
    worker.gate.enter()
    block = worker.gate.begin_block()
    worker.gate.leave()
    task = asyncio.create_task(left_over())
    await begun.wait()
    worker.gate.blocks.end(block, undone=True)
    over.set()
    await asyncio.gather(task, other)
    await worker.work("own")
    assert [line for line in worker.log if line.endswith("in")] == ["sibling in", "own in"]


async def test_owner_rolls_back_over_an_open_block() -> None:
    """An error response does not wait for a savepoint that nobody has released."""
    worker = Worker()
    begun = asyncio.Event()

    async def owner() -> None:
        await begun.wait()
        await worker.end("owner")

    ending = asyncio.create_task(owner())
    with worker.block():
        begun.set()
        await asyncio.wait((ending,), timeout=5)
        assert worker.log == ["owner in", "owner out"]


async def test_waiting_for_a_block_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tasks that wait for each other get an error that names both."""
    monkeypatch.setattr(gate_module, "BLOCK_TIMEOUT", 0.02)
    worker = Worker()
    begun = asyncio.Event()

    async def sibling() -> None:
        await begun.wait()
        await worker.work("sibling")

    waiting = asyncio.create_task(sibling(), name="the sibling")
    with worker.block():
        begun.set()
        own = asyncio.current_task()
        assert own is not None
        own.set_name("the owner of the block")
        with pytest.raises(ConcurrentSessionUse) as caught:
            await waiting
    assert "'the sibling'" in str(caught.value)
    assert "'the owner of the block'" in str(caught.value)
    assert "session_scope()" in str(caught.value)
    await asyncio.wait_for(worker.work("later"), 5)


async def test_slow_statement_has_no_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a block is a reason to give up; a sibling's statement may take its time."""
    monkeypatch.setattr(gate_module, "BLOCK_TIMEOUT", 0.01)
    worker = Worker()
    slow = asyncio.create_task(worker.work("slow", asyncio.sleep(0.05)))
    await turns(2)
    await worker.work("patient")
    await slow
    assert worker.log == ["slow in", "slow out", "patient in", "patient out"]


# --- threads --------------------------------------------------------------------------------------


def in_thread(function: Callable[[], object]) -> tuple[threading.Thread, list[BaseException]]:
    errors: list[BaseException] = []

    def run() -> None:
        try:
            function()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, errors


def test_threads_enter_one_after_the_other() -> None:
    gate = ThreadGate()
    entered = threading.Event()
    log = []

    def work() -> None:
        entered.set()
        assert gate.enter() is True
        log.append("other")
        gate.leave()

    assert gate.enter() is True
    assert gate.enter() is False
    assert gate.is_mine
    assert not gate.is_free
    thread, errors = in_thread(work)
    entered.wait()
    log.append("first")
    gate.leave()
    thread.join()
    assert not errors
    assert log == ["first", "other"]
    assert gate.is_free


def test_closed_gate_refuses_threads_and_lets_the_owner_in() -> None:
    """Those that waited when it was closed are refused, too."""
    gate = ThreadGate()
    gate.enter()
    thread, errors = in_thread(gate.enter)
    gate.closed = True
    gate.leave()
    thread.join()
    assert isinstance(errors[0], ScopeClosedError)
    with pytest.raises(ScopeClosedError):
        gate.enter()
    assert gate.enter(ending=True) is True
    gate.leave()
    assert gate.is_free


def test_blocks_of_a_sync_session_are_for_all_threads() -> None:
    """A `def` dependency that yields inside its block is resumed in another thread."""
    gate = ThreadGate()
    gate.enter()
    block = gate.begin_block()
    gate.leave()

    def work() -> None:
        gate.enter()
        gate.leave()

    thread, errors = in_thread(work)
    thread.join()
    gate.blocks.end(block, undone=True)
    assert not errors
