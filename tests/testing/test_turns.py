"""How the units of one test take turns, where a database is too fast to see it.

More of this: `inner/units.py`, test_units.py (the rules).
"""

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy.util import await_only, greenlet_spawn

from repom.testing.portal import LoopPortal
from repom.testing.turns import Turns
from repom.testing.units import Unit
from tests.support.polling import until


class SlowBackend:
    """Executes when it is told to."""

    can_cancel = True

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.done: list[str] = []
        self.go_on = threading.Event()

    def execute(self, sql: str) -> None:
        self.begun.append(sql)
        while not self.go_on.is_set():
            await_only(asyncio.sleep(0.001))
        self.done.append(sql)

    def aborts(self, error: BaseException) -> bool:
        return False

    is_lost = aborts


@pytest.fixture
def portal() -> Iterator[LoopPortal]:
    """One, that is closed after the test."""
    portal = LoopPortal()
    yield portal
    portal.close()


async def test_savepoint_is_not_cut_off(portal: LoopPortal) -> None:
    """Only a statement is, when its caller is cancelled: whether a savepoint is there must be
    known to all. The unit is undone before anybody else works."""
    backend: Any = SlowBackend()
    turns = Turns(portal, backend, "a test")
    unit, other = Unit("app.py:1"), Unit("app.py:2")

    def execute(unit: Unit, sql: str) -> None:
        turns.execute(unit, backend.execute, sql, sql=sql)

    task = asyncio.create_task(greenlet_spawn(execute, unit, "INSERT"))
    await until(lambda: backend.begun == ["SAVEPOINT repom_0"])
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    turns.rollback(unit)
    next_task = asyncio.create_task(greenlet_spawn(execute, other, "UPDATE"))
    await asyncio.sleep(0.02)
    assert not next_task.done()
    backend.go_on.set()
    await next_task
    undone = ["ROLLBACK TO SAVEPOINT repom_0", "RELEASE SAVEPOINT repom_0"]
    assert backend.done == [
        "SAVEPOINT repom_0", "INSERT", *undone, "SAVEPOINT repom_0", "UPDATE",
    ]  # fmt: skip


async def test_end_of_the_test_waits_for_what_is_being_executed(portal: LoopPortal) -> None:
    """And nothing is begun after it."""
    backend: Any = SlowBackend()
    turns = Turns(portal, backend, "a test")

    def execute() -> None:
        turns.execute(Unit("app.py:1"), backend.execute, "INSERT", sql="INSERT")

    task = asyncio.create_task(greenlet_spawn(execute))
    await until(lambda: bool(backend.begun))
    ending = asyncio.create_task(asyncio.to_thread(turns.close))
    await asyncio.sleep(0.02)
    assert not ending.done()
    backend.go_on.set()
    assert await ending
    await task
    assert backend.done == ["SAVEPOINT repom_0", "INSERT"]
