"""DBAPI connections (PEP 249) whose work is done elsewhere, for SQLAlchemy's pools to hand out.

Any thread and any event loop can use them. What SQLAlchemy asks them for beyond the DBAPI, they
ask the real connection for.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from sqlalchemy import Connection

from repom.connection import ends_by_hand
from repom.dialects.write_queue import Ticket
from repom.errors import InnerCommitError
from repom.testing.cursors import RemoteCursor
from repom.testing.portal import Portal
from repom.testing.turns import Turns
from repom.testing.units import Unit

T = TypeVar("T")

_numbers = itertools.count(1)


class RemoteConnection:
    """A DBAPI connection that does its work where the real one lives.

    Attributes:
        autocommit: whether every statement is a transaction of its own.
    """

    autocommit = False

    def __init__(self, real: Any, driver_connection: Any, portal: Portal) -> None:
        self._real = real
        self._portal = portal
        #: The driver's, for code that uses it directly.
        self.driver_connection = driver_connection

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def cursor(self, *args: Any, **kwargs: Any) -> RemoteCursor:
        """A cursor, which opens a real one when it executes."""
        return RemoteCursor(self, lambda: self.real_cursor(*args, **kwargs))

    def real_cursor(self, *args: Any, **kwargs: Any) -> Any:
        """A cursor of the real connection."""
        return self._real.cursor(*args, **kwargs)

    def execute(self, sql: str, function: Callable[..., T], *args: Any) -> T:
        """Execute `sql` in a transaction, by calling `function` there."""
        try:
            result = self.perform(sql, function, *args)
        except Exception:
            if self.autocommit:
                self.rollback()
            raise
        if self.autocommit:
            self.commit()
        return result

    def finish(self, function: Callable[[], T]) -> T:
        """Call `function` there, without beginning anything."""
        return self._portal.call(function)

    def set_isolation_level(self, level: str) -> None:
        """All transactions here have that of the one they are inside of."""
        self.autocommit = level == "AUTOCOMMIT"

    def reset_isolation_level(self) -> None:
        self.autocommit = False

    # --- what each kind has of its own

    def begin(self, place_in_line: Callable[[], Ticket | None]) -> None:
        """A transaction begins with the next statement.

        Args:
            place_in_line: waits for the right to write, to be released at the end.
        """

    def perform(self, sql: str, function: Callable[..., T], *args: Any) -> T:
        """Call `function` there, in a transaction."""
        raise NotImplementedError  # pragma: no cover

    def own_name(self, savepoint: str) -> str:
        """The name for what SQLAlchemy calls `savepoint` on each of its connections."""
        return savepoint

    def savepoint_begun(self, savepoint: str) -> None:
        """The code that has this connection has begun `savepoint`."""

    def savepoint_ended(self, savepoint: str, *, undone: bool) -> None:
        """It has released `savepoint`, or rolled back to it."""

    def commit(self) -> None:
        raise NotImplementedError  # pragma: no cover

    def rollback(self) -> None:
        raise NotImplementedError  # pragma: no cover

    def close(self) -> None:
        raise NotImplementedError  # pragma: no cover

    def collected(self) -> None:
        """The garbage collector is about to close it, since nobody else can any more."""


class OnClose(Protocol):
    def __call__(self, connection: SharedConnection, *, by_collector: bool) -> None: ...


class SharedConnection(RemoteConnection):
    """One of many on the connection of a test. Its transactions are units of that.

    Args:
        turns: of the test.
        driver_connection: the one that is shared.
        place: where this one was opened.
        is_of_the_test: whether it is of the test's own session.
        reads_only: whether each of its statements is to be refused if it writes, and is a unit
            of its own.
        on_close: called when it is closed, by its user or by the garbage collector.
    """

    def __init__(
        self,
        turns: Turns,
        driver_connection: Any,
        *,
        place: str,
        is_of_the_test: bool,
        reads_only: bool,
        on_close: OnClose,
    ) -> None:
        super().__init__(turns.backend.real, driver_connection, turns.portal)
        self.place = place
        self.is_of_the_test = is_of_the_test
        self.autocommit = self._reads_only = reads_only
        self._turns = turns
        self._on_close = on_close
        self._number = next(_numbers)
        self._unit: Unit | None = None
        self._ticket: Ticket | None = None

    @property
    def unit(self) -> Unit:
        """The transaction that is open, or a new one."""
        if self._unit is None:
            self._unit = Unit(
                self.place, is_of_the_test=self.is_of_the_test, reads_only=self._reads_only
            )
        return self._unit

    def begin(self, place_in_line: Callable[[], Ticket | None]) -> None:
        if not self.is_of_the_test:
            self._ticket = place_in_line()

    def real_cursor(self, *args: Any, **kwargs: Any) -> Any:
        return self._turns.backend.cursor(*args, **kwargs)

    def perform(self, sql: str, function: Callable[..., T], *args: Any) -> T:
        self._refuse_ending(sql)
        if self._reads_only:
            self._turns.backend.check_reads(sql)
        result: T = self._turns.execute(self.unit, function, *args, sql=sql)
        self._turns.backend.seen(sql)
        return result

    def commit(self) -> None:
        if self._unit is not None:
            self._turns.commit(self._unit)
        self._ended()

    def rollback(self) -> None:
        if self._unit is not None:
            self._turns.rollback(self._unit)
        self._ended()

    def close(self) -> None:
        self.rollback()
        self._on_close(self, by_collector=False)

    def collected(self) -> None:
        self._on_close(self, by_collector=True)

    def abandon(self) -> None:
        """The test has ended, and this one was not closed."""
        self._ended()

    def _ended(self) -> None:
        self._unit = None
        ticket, self._ticket = self._ticket, None
        if ticket is not None:
            ticket.release()

    def _refuse_ending(self, sql: str) -> None:
        if ends_by_hand(sql):
            raise InnerCommitError(
                f"{_shown(sql)} was executed in {self._turns.test}, whose transaction is to be "
                "rolled back at its end.\n"
                "Write `commit()` or `rollback()` of a session: those are savepoints of it."
            )
        if self._turns.backend.commits(sql):
            raise InnerCommitError(
                f"{_shown(sql)} would commit all that {self._turns.test} has done: this database "
                "commits before and after such a statement.\n"
                "Execute it before the tests, or leave out the fixture that rolls back."
            )

    def own_name(self, savepoint: str) -> str:
        unique = self._turns.backend.names_are_unique
        return f"{savepoint}_{self._number}" if unique else savepoint

    def savepoint_begun(self, savepoint: str) -> None:
        self.unit.own_savepoints.append(savepoint)

    def savepoint_ended(self, savepoint: str, *, undone: bool) -> None:
        unit = self.unit
        if savepoint in unit.own_savepoints:
            del unit.own_savepoints[unit.own_savepoints.index(savepoint) :]
        if undone:
            unit.failed = False
            self._turns.rolled_back_to(unit, len(unit.own_savepoints))


class OwnConnection(RemoteConnection):
    """One that has a real one to itself, for code that runs outside of a test."""

    def __init__(self, connection: Connection, portal: Portal) -> None:
        raw = connection.connection
        super().__init__(raw.dbapi_connection, portal.bound(raw.driver_connection), portal)
        self._connection = connection

    def perform(self, sql: str, function: Callable[..., T], *args: Any) -> T:
        result: T = self._portal.call(self._in_transaction, function, *args)
        return result

    def _in_transaction(self, function: Callable[..., T], *args: Any) -> T:
        if not self._connection.in_transaction():
            self._connection.begin()
        return function(*args)

    def commit(self) -> None:
        self._portal.call(self._connection.commit)

    def rollback(self) -> None:
        self._portal.call(self._connection.rollback)

    def close(self) -> None:
        self._portal.post(self._connection.close)


def _shown(sql: str) -> str:
    line = " ".join(sql.split())
    return repr(line if len(line) <= 60 else f"{line[:57]}...")
