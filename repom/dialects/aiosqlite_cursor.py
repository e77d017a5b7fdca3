"""aiosqlite: a statement and all its rows in one step of the connection's thread.

SQLAlchemy's own cursor takes four for each statement: it makes a cursor, executes, fetches, closes.
For each of them the event loop wakes the thread of the connection and the thread the event loop,
which costs more than what SQLite does meanwhile.
"""

from __future__ import annotations

import functools
import sqlite3
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from sqlalchemy.util import await_only


def execute_in_one_step(dbapi_connection: Any) -> None:
    """Give a connection of SQLAlchemy's aiosqlite dialect such cursors."""
    known: Any = type(dbapi_connection)
    dbapi_connection.__class__ = _executing_in_one_step(known)


@functools.cache
def _executing_in_one_step(base: Any) -> Any:
    class OneStepConnection(base):  # type: ignore[misc]
        __slots__ = ()

        def cursor(self, server_side: bool = False) -> Any:
            # One that is fetched bit by bit stays as it is.
            return super().cursor(server_side=True) if server_side else OneStepCursor(self)

    return OneStepConnection


class _Executed(NamedTuple):
    rows: list[Any]
    description: Any
    lastrowid: int | None
    rowcount: int


class OneStepCursor:
    """A DBAPI cursor (PEP 249) as SQLAlchemy's dialect uses it, inside a greenlet."""

    __slots__ = (
        "_adapt_connection",
        "_rows",
        "arraysize",
        "description",
        "lastrowid",
        "rowcount",
    )

    server_side = False

    def __init__(self, adapt_connection: Any) -> None:
        self._adapt_connection = adapt_connection
        self._rows: deque[Any] = deque()
        self.arraysize = 1
        self.description: Any = None
        self.lastrowid: int | None = None
        self.rowcount = -1

    def execute(self, operation: Any, parameters: Any = None) -> None:
        self._run(_execute, operation, () if parameters is None else parameters)

    def executemany(self, operation: Any, seq_of_parameters: Any) -> None:
        self._run(_execute_many, operation, seq_of_parameters)

    def _run(self, function: Any, operation: Any, parameters: Any) -> None:
        connection = self._adapt_connection._connection
        try:
            executed: _Executed = await_only(
                connection._execute(function, connection, operation, parameters)
            )
        except Exception as error:
            self._adapt_connection._handle_exception(error)
            raise
        rows, self.description, self.lastrowid, self.rowcount = executed
        self._rows = deque(rows)

    def fetchone(self) -> Any:
        return self._rows.popleft() if self._rows else None

    def fetchmany(self, size: int | None = None) -> Sequence[Any]:
        rows = self._rows
        return [rows.popleft() for _ in range(min(size or self.arraysize, len(rows)))]

    def fetchall(self) -> Sequence[Any]:
        rows = list(self._rows)
        self._rows.clear()
        return rows

    def __iter__(self) -> Iterator[Any]:
        while self._rows:
            yield self._rows.popleft()

    def setinputsizes(self, *inputsizes: Any) -> None:
        """Nothing, as in the module sqlite3."""

    def close(self) -> None:
        self._rows.clear()

    async def _async_soft_close(self) -> None:
        """Nothing: the driver's cursor is closed already."""


# --- in the thread


def _execute(connection: Any, operation: Any, parameters: Any) -> _Executed:
    cursor: sqlite3.Cursor = connection._conn.cursor()
    try:
        cursor.execute(operation, parameters)
        rows = cursor.fetchall() if cursor.description else []
        return _Executed(rows, cursor.description, cursor.lastrowid, cursor.rowcount)
    finally:
        cursor.close()


def _execute_many(connection: Any, operation: Any, seq_of_parameters: Any) -> _Executed:
    cursor: sqlite3.Cursor = connection._conn.cursor()
    try:
        cursor.executemany(operation, seq_of_parameters)
        return _Executed([], None, cursor.lastrowid, cursor.rowcount)
    finally:
        cursor.close()
