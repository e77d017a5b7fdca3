"""The units of one test take turns on its connection."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from repom.dialects.base import aborted
from repom.errors import SharedConnectionError, WouldDeadlockError
from repom.testing.backends import Backend
from repom.testing.changes import Changes
from repom.testing.portal import Cancellation, Portal
from repom.testing.units import Caller, Turn, Unit, turn_of, units_here

T = TypeVar("T")

#: Seconds that one unit of work waits for another one to end.
TURN_TIMEOUT = 10.0

_ONLY_READS = re.compile(r"\s*(?:SELECT|SHOW|EXPLAIN|(?:RELEASE )?SAVEPOINT)\b", re.IGNORECASE)


class Turns:
    """Lets one unit after the other work on the connection of a test.

    Args:
        portal: calls functions where the connection lives.
        backend: what the database needs.
        test: the name of the test, for messages.

    Attributes:
        differences: what was not as it would have been with a connection for each unit.
    """

    def __init__(self, portal: Portal, backend: Backend, test: str) -> None:
        self.portal = portal
        self.backend = backend
        self.test = test
        self.differences: list[str] = []
        self._stack: tuple[Unit, ...] = ()
        self._busy = False
        self._lost: BaseException | None = None
        self._closed = False
        # Reentrant, because the garbage collector gives up units too, at any allocation.
        self._mutex = threading.RLock()
        self._changes = Changes()

    # --- for the connections

    def execute(self, unit: Unit, function: Callable[..., T], *args: Any, sql: str) -> T:
        """Execute a statement as a part of `unit`, which it begins if that is new.

        Args:
            unit: whose statement it is.
            function: executes it; gets `args`.
            sql: what it executes.
        """
        turn = self._enter(unit)
        if not _ONLY_READS.match(sql):
            unit.has_written = True
            for above in turn.stack[turn.stack.index(unit) + 1 :]:
                above.worked_inside.append(unit.place)
        here = units_here.get()
        if unit not in here:
            units_here.set((*(one for one in here if one.savepoint), unit))
        result: T = self._perform(unit, turn, self._statement, function, *args)
        return result

    def commit(self, unit: Unit) -> None:
        """End `unit` by what COMMIT means: checks, and its work becomes a part of the outer one.

        Raises:
            TransactionAbortedError: an earlier statement has failed, and PostgreSQL with it.
            Exception: a deferred constraint is violated.
        """
        if unit.failed:
            raise aborted()
        self._perform(unit, self._enter(unit, begins=False), self._commit)

    def rollback(self, unit: Unit) -> None:
        """End `unit`. Its savepoint is rolled back before the next statement of any unit.

        Not now, since the garbage collector and cancelled tasks must not wait for a database.
        """
        unit.over = True
        self._changes.notify()

    def close(self) -> bool:
        """The test has ended: nothing is executed any more.

        Returns:
            Whether what was being executed has ended, too.
        """
        deadline = time.monotonic() + TURN_TIMEOUT
        with self._mutex:
            self._closed = True
        self._changes.notify()
        while self._busy and (remaining := deadline - time.monotonic()) > 0:
            wait = self._changes.next(awaits=False)
            if self._busy:
                wait(remaining)
        return not self._busy

    @property
    def lost(self) -> BaseException | None:
        """The error by which the connection was found to be closed."""
        return self._lost

    # --- turns

    def _enter(self, unit: Unit, *, begins: bool = True) -> Turn:
        """Wait for the turn of `unit`, and take it."""
        self.portal.pause()
        unit.caller = caller = Caller.here()
        deadline = time.monotonic() + TURN_TIMEOUT
        while True:
            with self._mutex:
                self._check()
                turn = None if self._busy else turn_of(unit, self._stack, caller, begins=begins)
                if turn is not None:
                    self._take(unit, turn)
                    return turn
                other = self._stack[-1] if self._stack else unit
                wait = self._changes.next(awaits=caller.awaits)
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise _waited_in_vain(unit, other)
            wait(remaining)

    def _check(self) -> None:
        if self._lost is not None:
            raise SharedConnectionError(
                f"{self.test} has lost its connection, which all sessions of a test share.\n"
                "Something closed it, or ended its transaction: see the __cause__."
            ) from self._lost
        if self._closed:
            raise SharedConnectionError(
                f"this connection belongs to {self.test}, which has ended.\n"
                "Close sessions, and await tasks, before the test ends."
            )

    def _take(self, unit: Unit, turn: Turn) -> None:
        self._busy = True
        for gone in self._stack:
            if gone not in turn.stack:
                gone.savepoint = None
        for gone in turn.undone:
            self._note_undone(gone)
        self._stack = turn.stack
        if turn.begins is not None:
            unit.savepoint = turn.begins

    def _perform(self, unit: Unit, turn: Turn, function: Callable[..., T], *args: Any) -> T:
        cancellation = Cancellation() if self.backend.can_cancel else None
        result: T = self.portal.call(
            self._there, unit, turn, function, args, cancellation, cancellation=cancellation
        )
        return result

    def _there(
        self,
        unit: Unit,
        turn: Turn,
        function: Callable[..., T],
        args: tuple[Any, ...],
        cancellation: Cancellation | None,
    ) -> T:
        """In the place where the connection lives."""
        try:
            for sql in turn.sql:
                self.backend.execute(sql)
            if unit.failed:
                self._fail_again()
            return function(unit, cancellation, *args)
        except Exception as error:
            if self.backend.is_lost(error):
                self._lost = error
            raise
        finally:
            with self._mutex:
                self._busy = False
            self._changes.notify()

    def _fail_again(self) -> None:
        """Let PostgreSQL refuse the next statement, if others have worked since it did."""
        try:
            self.backend.execute("ROLLBACK TO SAVEPOINT repom_failed")
        except Exception:
            return  # as it is meant to
        raise AssertionError("there is no such savepoint")  # pragma: no cover

    def _statement(
        self,
        unit: Unit,
        cancellation: Cancellation | None,
        function: Callable[..., T],
        *args: Any,
    ) -> T:
        try:
            if unit.reads_only:
                self.backend.refuse_writes()
            if cancellation is not None:
                cancellation.allowed = True
            return function(*args)
        except BaseException as error:
            if self.backend.aborts(error):
                unit.failed = True
            raise
        finally:
            if cancellation is not None:
                cancellation.allowed = False
            if unit.reads_only:
                self.backend.allow_writes()

    def _commit(self, unit: Unit, cancellation: Cancellation | None) -> None:
        stack = self._stack
        try:
            self.backend.check_constraints()
            if stack and stack[-1] is unit:
                self.backend.execute(f"RELEASE SAVEPOINT {unit.savepoint}")
        except BaseException as error:
            if self.backend.aborts(error):
                unit.failed = True
            raise
        if unit in stack:
            # Not on top: what is above goes on, and its own savepoint counts.
            outer = stack[stack.index(unit) - 1] if unit is not stack[0] else None
            if outer is not None:
                places = [unit.place] if unit.has_written else []
                places += [place for _, place in unit.committed_inside]
                depth = len(outer.own_savepoints)
                outer.committed_inside += [(depth, place) for place in places]
            unit.savepoint = None
            self._stack = tuple(one for one in stack if one is not unit)

    # --- what would have been different

    def rolled_back_to(self, unit: Unit, depth: int) -> None:
        """`unit` has rolled back to one of its own savepoints, and `depth` of them remain."""
        gone = [place for inside, place in unit.committed_inside if inside > depth]
        unit.committed_inside = [one for one in unit.committed_inside if one[0] <= depth]
        self._note(unit, gone)

    def _note_undone(self, unit: Unit) -> None:
        self._note(unit, [place for _, place in unit.committed_inside])
        unit.committed_inside = []
        if unit.worked_inside:
            self.differences.append(
                f"the unit of work at {unit.worked_inside[0]} has worked while another one, at "
                f"{unit.place}, was open; when that was rolled back, this work was undone too"
            )
            unit.worked_inside = []

    def _note(self, unit: Unit, places: list[str]) -> None:
        for place in places:
            self.differences.append(
                f"the unit of work at {place} was committed inside the one at {unit.place}; when "
                "that was rolled back, it was undone too"
            )


def _waited_in_vain(unit: Unit, other: Unit) -> WouldDeadlockError:
    return WouldDeadlockError(
        f"the unit of work at {unit.place} has waited {TURN_TIMEOUT:g} s for the end of the one at "
        f"{other.place}: those of a test share one connection, and take turns.\n"
        "If they wait for each other, end the first before the other begins; to test both at "
        "once, leave out the fixture that rolls back, and clean up."
    )
