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
        is_of_the_test: of the test's own session.
        reads_only: of a unit of work with `read_only`: the database refuses its writes.
        savepoint: its name, while it is on the stack.
        own_savepoints: those that its code has begun, innermost last.
        has_written: a statement of it may have changed something.
        failed: PostgreSQL would refuse its statements, because an earlier one has failed.
        over: it is to be rolled back.
        committed_inside: places of the units that were committed as a part of this one, and
            the number of own savepoints each was inside of.
        worked_inside: places of outer units that have gone on while this one was on top.
    """

    def __init__(
        self, place: str, *, is_of_the_test: bool = False, reads_only: bool = False
    ) -> None:
        self.place = place
        self.is_of_the_test = is_of_the_test
        self.reads_only = reads_only
        self.savepoint: str | None = None
        self.own_savepoints: list[str] = []
        self.has_written = False
        self.failed = False
        self.over = False
        self.committed_inside: list[tuple[int, str]] = []
        self.worked_inside: list[str] = []
        self.caller = Caller.here()

    @property
    def gives_way(self) -> bool:
        """Whether it need not be on the stack: what it has done will never be undone.

        What the test's own session has done is as good as committed, for whoever works next;
        and who has only read has done nothing.
        """
        return not self.own_savepoints and (self.is_of_the_test or not self.has_written)

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
        stack: the units under way, the one whose turn it is included if it has begun.
        sql: to be executed before.
        begins: the name of the savepoint by which that makes it begin, if it does.
        undone: the units whose work that undoes.
    """

    stack: tuple[Unit, ...]
    sql: tuple[str, ...]
    begins: str | None
    undone: tuple[Unit, ...]


def turn_of(
    unit: Unit, stack: Sequence[Unit], caller: Caller, *, begins: bool = True
) -> Turn | None:
    """The turn of `unit`; None if it has to wait for the unit on top.

    Args:
        unit: which wants to work.
        stack: the units under way, outermost first.
        caller: the code that wants it.
        begins: whether it needs a savepoint; not to end.
    """
    remaining = list(stack)
    sql: list[str] = []
    undone: list[Unit] = []
    while remaining and remaining[-1] is not unit:
        top = remaining[-1]
        if top.over or (top.failed and not top.own_savepoints):
            # Nothing of what has failed can be committed any more.
            sql += [_rollback_to(top.savepoint), _release(top.savepoint)]
            undone.append(top)
        elif top.gives_way:
            sql.append(_release(top.savepoint))
        else:
            break
        remaining.pop()
    is_new = unit not in remaining
    if remaining and remaining[-1] is not unit:
        top = remaining[-1]
        if _has_to_wait(caller, top, is_new=is_new):
            return None
        if top.failed and is_new:
            sql.append(_rollback_to(top.own_savepoints[-1]))
    name = None
    if begins and is_new:
        name = _free_name(remaining)
        sql.append(f"SAVEPOINT {name}")
        remaining.append(unit)
    return Turn(tuple(remaining), tuple(sql), name, tuple(undone))


def _has_to_wait(caller: Caller, top: Unit, *, is_new: bool) -> bool:
    if not caller.can_wait_for(top):
        return False
    # A savepoint of the test's own session may be open until the end of the test.
    return not is_new or not (caller.is_inside(top) or top.is_of_the_test)


def _rollback_to(savepoint: str | None) -> str:
    return f"ROLLBACK TO SAVEPOINT {savepoint}"


def _release(savepoint: str | None) -> str:
    return f"RELEASE SAVEPOINT {savepoint}"


def _free_name(stack: Sequence[Unit]) -> str:
    # Few names, since drivers prepare statements once for each text.
    taken = {unit.savepoint for unit in stack}
    return next(name for n in range(len(stack) + 1) if (name := f"repom_{n}") not in taken)
