"""Who may use the connection that a test has, and what has to be done there before.

The transaction of the test is never committed. What the code under test takes for a transaction
is a savepoint of it: a `Unit`. The units that are under way lie on a stack, as savepoints do.
Only who is on top may work; others wait until what is above them has ended, and newcomers until
everything has, unless they are inside of it.

Pure functions and data: `repom.testing.turns` does the waiting and the work.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from contextvars import ContextVar
from typing import NamedTuple

from sqlalchemy.util.concurrency import in_greenlet

from repom.context import Surroundings, surroundings
from repom.shield import acting_task

#: The units that were begun in this context. Tasks inherit them from the one that starts them.
units_here: ContextVar[tuple[Unit, ...]] = ContextVar("repom_testing_units", default=())


class Unit:
    """What the code under test takes for a transaction of its own.

    Attributes:
        place: where its connection was opened.
        gives_way: it is of the test's own session, whose work is as good as committed for
            whoever works next.
        savepoint: its name, while it is on the stack.
        own_savepoints: those that its code has begun, innermost last.
        has_written: a statement of it may have changed something.
        failed: PostgreSQL would refuse its statements, because an earlier one has failed.
        over: it is to be rolled back.
        committed_inside: places of the units that were committed as a part of this one, and
            the number of own savepoints each was inside of.
        worked_inside: places of outer units that have gone on while this one was on top.
    """

    def __init__(self, place: str, *, gives_way: bool = False) -> None:
        self.place = place
        self.gives_way = gives_way
        self.savepoint: str | None = None
        self.own_savepoints: list[str] = []
        self.has_written = False
        self.failed = False
        self.over = False
        self.committed_inside: list[tuple[int, str]] = []
        self.worked_inside: list[str] = []
        self.caller = Caller.here()

    def __repr__(self) -> str:
        return f"<Unit of {self.place}: {self.savepoint}>"


class Caller(NamedTuple):
    """The code that asks for the connection."""

    scope: Surroundings | None
    task: asyncio.Task[object] | None
    loop: asyncio.AbstractEventLoop | None
    thread: int
    awaits: bool  # False if it blocks its thread, and with that its event loop
    units: tuple[Unit, ...]  # that it is inside of

    @classmethod
    def here(cls) -> Caller:
        loop = asyncio._get_running_loop()
        return cls(
            surroundings.get(),
            acting_task() if loop is not None else None,
            loop,
            threading.get_ident(),
            in_greenlet(),
            units_here.get(),
        )

    def is_inside(self, unit: Unit) -> bool:
        """Whether this code runs between the beginning and the end of `unit`."""
        if unit in self.units:
            return True
        outer = unit.caller.scope
        scope = self.scope
        while scope is not None and scope is not outer:
            scope = scope.parent
        return scope is not None

    def can_wait_for(self, unit: Unit) -> bool:
        """Whether `unit` may end while this code waits."""
        other = unit.caller
        if self.task is not None and self.awaits:
            return self.task is not other.task
        if self.loop is not None:
            return self.loop is not other.loop
        if self.scope is not None and other.scope is not None:
            return True  # a pool's thread serves many; whose is inside of whose is known
        return self.thread != other.thread


class Turn(NamedTuple):
    """What a unit may do now.

    Attributes:
        stack: as it is then, the unit included if it has begun.
        sql: to be executed before.
        undone: units whose work that undoes.
    """

    stack: tuple[Unit, ...]
    sql: tuple[str, ...]
    undone: tuple[Unit, ...]


#: Fails on every database with savepoints, and aborts the transaction on PostgreSQL.
ABORT = "ROLLBACK TO SAVEPOINT repom_failed"


def turn_of(
    unit: Unit, stack: Sequence[Unit], caller: Caller, *, begins: bool = True
) -> Turn | None:
    """The turn of `unit`; None if it has to wait for the end of the unit on top.

    Args:
        unit: which wants to work.
        stack: the units under way, outermost first.
        caller: the code that wants it.
        begins: whether it is to have a savepoint; not needed to end it.
    """
    under_way = list(stack)
    sql: list[str] = []
    undone: list[Unit] = []
    while under_way and under_way[-1] is not unit:
        top = under_way[-1]
        if top.over or (top.failed and not top.own_savepoints):
            # Of what has failed nothing can be committed any more.
            sql += undo(top)
            undone.append(top)
        elif top.gives_way and not top.own_savepoints:
            sql.append(f"RELEASE SAVEPOINT {top.savepoint}")
        else:
            break
        under_way.pop()
    if under_way and under_way[-1] is not unit:
        top = under_way[-1]
        known = unit in under_way
        if caller.can_wait_for(top) and (known or not (caller.is_inside(top) or top.gives_way)):
            return None
        if top.failed and not known:
            sql.append(f"ROLLBACK TO SAVEPOINT {top.own_savepoints[-1]}")
    if begins and unit not in under_way:
        sql.append(f"SAVEPOINT {_free_name(under_way)}")
        under_way.append(unit)
        if unit.failed:
            sql.append(ABORT)
    return Turn(tuple(under_way), tuple(sql), tuple(undone))


def undo(unit: Unit) -> list[str]:
    """The SQL that rolls `unit` back."""
    name = unit.savepoint
    return [f"ROLLBACK TO SAVEPOINT {name}", f"RELEASE SAVEPOINT {name}"]


def _free_name(stack: Sequence[Unit]) -> str:
    # Few names, since drivers prepare statements once for each text.
    taken = {unit.savepoint for unit in stack}
    return next(name for n in range(len(stack) + 1) if (name := f"repom_{n}") not in taken)
