"""Greenlets that are used again."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import subprocess
import sys
import threading
import traceback
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from types import MethodType
from typing import Any

import pytest
from greenlet import getcurrent, greenlet
from sqlalchemy import literal, select
from sqlalchemy.exc import AwaitRequired, MissingGreenlet
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.util import await_only

from repom import Database, session_scope
from repom.greenlets import MOST_IDLE, _idle, spawn, spawning_class


class Thing:
    """What can be referenced weakly."""


@pytest.fixture(autouse=True)
def no_idle_ones() -> None:
    """Each test makes its own."""
    _idle.workers.clear()


def here() -> greenlet:
    return getcurrent()


def wait_for(future: asyncio.Future[Any]) -> Any:
    return await_only(_wait(future))


async def _wait(future: asyncio.Future[Any]) -> Any:
    return await future


async def test_the_next_operation_runs_in_the_same_greenlet() -> None:
    assert await spawn(here) is await spawn(here)


async def test_arguments_and_results_are_those_of_the_function() -> None:
    def function(*args: Any, **kwargs: Any) -> Any:
        return args, kwargs

    assert await spawn(function, 1, [2], three=3) == ((1, [2]), {"three": 3})
    assert await spawn(function) == ((), {})


async def test_methods_are_called_as_they_are() -> None:
    """Of an object and of a class; and one that tracing has wrapped by what tracing put there."""

    class Adder:
        start = 1

        def __init__(self) -> None:
            self.start = 10

        def add(self, *numbers: int, more: int = 0) -> int:
            return self.start + sum(numbers) + more

        @classmethod
        def of_class(cls, number: int) -> int:
            return cls.start + number

    def traced(self: Any, *args: Any) -> str:
        return "traced"

    # As those of wrapt, which say that they are what they wrap.
    proxy: Any = type(
        "Proxy",
        (),
        {
            "__class__": property(lambda self: MethodType),
            "__func__": Adder.add,
            "__self__": Adder(),
            "__call__": traced,
        },
    )

    assert await spawn(Adder().add, 1, 2, more=3) == 16
    assert await spawn(Adder.of_class, 1) == 2
    assert await spawn([3, 1].index, 1) == 1
    assert await spawn(proxy(), 1) == "traced"


@pytest.mark.skipif(sys.version_info < (3, 12), reason="Python calls them all through C")
async def test_a_method_has_no_frame_of_c_below_it() -> None:
    """What C has on its stack is copied whenever the operation waits."""

    class Operation:
        def wait(self) -> None:
            wait()

    def wait() -> None:
        workers.append(getcurrent())
        await_only(asyncio.sleep(0))

    async def saved(function: Callable[[], None]) -> int:
        operation = spawn(function)
        operation.send(None)
        size: int = workers[-1]._stack_saved
        with pytest.raises(StopIteration):
            operation.send(None)
        return size

    workers: list[Any] = []

    assert await saved(Operation().wait) == await saved(wait)


async def test_a_function_waits_by_await_only() -> None:
    async def answer(number: int) -> int:
        await asyncio.sleep(0)
        return number

    def function() -> int:
        return await_only(answer(1)) + await_only(answer(2))

    assert await spawn(function) == 3
    assert await spawn(function) == 3


async def test_operations_at_the_same_time_have_a_greenlet_each() -> None:
    future = asyncio.get_running_loop().create_future()

    def function() -> tuple[greenlet, Any]:
        return getcurrent(), wait_for(future)

    waiting = [asyncio.create_task(spawn(function)) for _ in range(3)]
    await asyncio.sleep(0)
    meanwhile = await spawn(here)
    future.set_result("done")
    found = await asyncio.gather(*waiting)
    assert [result for _, result in found] == ["done"] * 3
    assert len({id(meanwhile), *(id(each) for each, _ in found)}) == 4


async def test_an_error_is_raised_as_by_a_new_greenlet() -> None:
    """With the frames of the function, and without what was done before."""

    def fail() -> None:
        raise LookupError("no such thing")

    await spawn(here)
    with pytest.raises(LookupError, match="no such thing") as raised:
        await spawn(fail)
    assert raised.value.__context__ is None
    names = [frame.name for frame in traceback.extract_tb(raised.value.__traceback__)]
    assert names[-1] == "fail"
    assert await spawn(here)


async def test_what_the_awaited_raises_is_raised_inside() -> None:
    async def fail() -> None:
        await asyncio.sleep(0)
        raise LookupError

    def function() -> str:
        try:
            await_only(fail())
        except LookupError:
            return "seen"
        return "not seen"

    assert await spawn(function) == "seen"


async def test_a_cancelled_operation_ends_inside() -> None:
    future = asyncio.get_running_loop().create_future()
    ended: list[str] = []

    def function() -> None:
        try:
            wait_for(future)
        finally:
            ended.append("ended")

    task = asyncio.create_task(spawn(function))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended == ["ended"]
    assert _idle.workers == []  # and nobody else gets its greenlet
    assert await spawn(here)


async def test_an_operation_sees_the_context_of_its_caller() -> None:
    """And what it sets, its caller sees, as with SQLAlchemy's."""
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable")

    def exchange(new: str) -> str:
        old = variable.get("none")
        variable.set(new)
        return old

    async def task(name: str) -> tuple[str, str]:
        variable.set(name)
        return await spawn(exchange, f"{name}, changed"), variable.get()

    assert await asyncio.create_task(task("a")) == ("a", "a, changed")
    assert await asyncio.create_task(task("b")) == ("b", "b, changed")
    assert await asyncio.create_task(spawn(exchange, "c")) == "none"


async def test_one_that_waits_keeps_nothing_alive() -> None:
    """Not what was given to it nor what it returned, and not the context it was called in."""

    def things() -> Iterator[Any]:
        for _ in range(3):
            thing = Thing()
            alive.append(weakref.ref(thing))
            yield thing

    async def once() -> None:
        argument, keyword, result = things()
        await spawn(lambda *_, **__: result, argument, keyword=keyword)

    alive: list[weakref.ref[Any]] = []
    gc.collect()
    gc.disable()
    try:
        for _ in range(2):  # in a new one, and again
            await once()
            [worker] = _idle.workers
            assert [each() for each in alive] == [None] * len(alive)
            assert worker.gr_context is None
    finally:
        gc.enable()


async def test_only_so_many_are_kept() -> None:
    future = asyncio.get_running_loop().create_future()
    tasks = [asyncio.create_task(spawn(wait_for, future)) for _ in range(2 * MOST_IDLE)]
    await asyncio.sleep(0)
    future.set_result(None)
    await asyncio.gather(*tasks)
    assert len(_idle.workers) == MOST_IDLE


def test_they_end_with_their_thread() -> None:
    """Whether the loop was run by `asyncio.run()` or not."""

    async def work() -> None:
        for _ in range(3):
            await spawn(here)

    def by_hand() -> None:
        loop = asyncio.new_event_loop()
        loop.run_until_complete(work())
        loop.close()

    def alive() -> int:
        gc.collect()
        return sum(issubclass(type(each), greenlet) for each in gc.get_objects())

    before = alive()
    for target in (lambda: asyncio.run(work()), by_hand) * 5:
        thread = threading.Thread(target=target)
        thread.start()
        thread.join()
    # The main greenlet of the last thread may still be there.
    assert alive() <= before + 2


def test_a_loop_after_another_one_uses_them_too() -> None:
    async def found() -> greenlet:
        return await spawn(here)

    assert asyncio.run(found()) is asyncio.run(found())


async def test_what_asks_for_an_await_gets_one() -> None:
    """`greenlet_spawn(..., _require_await=True)` is SQLAlchemy's, which says so."""
    with pytest.raises(AwaitRequired):
        await spawn(here, _require_await=True)


# --- sessions


@asynccontextmanager
async def session_of(url: str, **kwargs: Any) -> AsyncIterator[AsyncSession]:
    database = Database(url, **kwargs)
    async with session_scope(database) as session:
        yield session
    await database.dispose()


async def test_operations_of_a_session_share_one(sqlite_url: str) -> None:
    """Also those of the scope: COMMIT runs where the statements have run."""
    async with session_of(sqlite_url) as session:
        first = await session.run_sync(lambda _: getcurrent())
        assert await session.scalar(select(literal(1))) == 1
        assert await session.run_sync(lambda _: getcurrent()) is first
    assert _idle.workers == [first]


def test_every_method_that_spawns_is_replaced() -> None:
    """SQLAlchemy's may be new ones."""
    replaced = spawning_class(AsyncSession)
    for name, method in vars(AsyncSession).items():
        code = getattr(method, "__code__", None)
        if code is not None and "greenlet_spawn" in code.co_names:
            mine: Any = getattr(replaced, name)
            assert mine.__globals__["greenlet_spawn"] is spawn, name
            assert mine.__doc__ == method.__doc__


def test_a_class_is_made_once_and_named_as_its_base() -> None:
    class Own(AsyncSession):
        pass

    made = spawning_class(Own)
    assert made is spawning_class(Own)
    assert issubclass(made, Own)
    assert repr(made) == repr(Own)


async def test_methods_of_the_application_come_first(sqlite_url: str) -> None:
    """And `super()` in them leads to SQLAlchemy's."""

    class Own(AsyncSession):
        async def scalar(self, *args: Any, **kwargs: Any) -> Any:
            return "own", await super().scalar(*args, **kwargs)

    async with session_of(sqlite_url, session_class=Own) as session:
        found: Any = await session.scalar(select(literal(1)))
        assert found == ("own", 1)


async def test_io_outside_of_a_greenlet_is_refused_as_ever(sqlite_url: str) -> None:
    async with session_of(sqlite_url) as session:
        with pytest.raises(MissingGreenlet):
            session.sync_session.execute(select(literal(1)))


def test_the_interpreter_ends_in_peace() -> None:
    """With workers that wait, and with one that is at work."""
    code = """
import asyncio
from sqlalchemy.util import await_only
from repom.greenlets import spawn

async def main():
    await asyncio.gather(*(spawn(lambda: await_only(asyncio.sleep(0))) for _ in range(5)))

asyncio.run(main())
loop = asyncio.new_event_loop()
left = spawn(lambda: await_only(asyncio.sleep(0)))
left.send(None)
left.close()
loop.close()
"""
    run = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-c", code], capture_output=True, text=True
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
