"""Results whose rows are still in the database, and who may yet read them.

A transaction must not end under somebody who reads on. Not every driver would notice: SQLite
reads on, on a connection that is another request's by then, and those of MySQL take the rows
that have not come yet for the end of the result.
"""

from __future__ import annotations

import sqlite3
import sys
from collections.abc import Sequence
from typing import Any

from sqlalchemy import CursorResult, Dialect
from sqlalchemy.sql.elements import RollbackToSavepointClause

from repom.errors import OpenCursorError

# Their server sends the rows of one statement at a time
# (https://dev.mysql.com/doc/c-api/8.4/en/mysql-use-result.html).
_ONE_AT_A_TIME = ("mysql", "mariadb")


class Cursors:
    """The results of one session that are fetched bit by bit while they are read."""

    __slots__ = ("_results",)

    def __init__(self) -> None:
        # Replaced and never changed: the event loop looks at it while a thread executes.
        self._results: tuple[Any, ...] = ()

    @property
    def is_open(self) -> bool:
        """Whether somebody may still read rows from the database."""
        return bool(self._results) and any(is_read for _, is_read in self._with_readers())

    def watch(self, result: CursorResult[Any]) -> None:
        """Remember a result that has rows, if they have not been fetched yet."""
        # The module sqlite3 finds a row when it is asked for it, whatever the options.
        if isinstance(result.cursor, sqlite3.Cursor) or _streams(result):
            self._results = (*self._results, result)

    def make_way(self, statement: Any, dialect: Dialect) -> None:
        """Let go of what nobody can read any more; a statement is about to be executed.

        Raises:
            OpenCursorError: somebody may still read, and would lose the rows.
        """
        if not self._results:
            return
        readable = []
        for result, is_read in self._with_readers():
            if is_read:
                readable.append(result)
            else:
                result.close()
        self._results = tuple(readable)
        if readable and dialect.name in _ONE_AT_A_TIME:
            if not isinstance(statement, RollbackToSavepointClause):
                raise OpenCursorError(
                    "a statement was executed while the rows of a stream were still coming: "
                    "MySQL and MariaDB send those of one statement at a time, and the rest of "
                    "the stream would have been lost.\n"
                    "Read it to its end or close it before, or execute the statement in a "
                    "transaction of its own: `async with session_scope() as session:`."
                )
            self.close()  # an error is on its way, which is worth more than the rows

    def close(self) -> None:
        """Close what was not read to its end: who reads on gets an error, and never the rows of
        a transaction that has ended."""
        if not self._results:
            return
        results, self._results = self._results, ()
        for result in results:
            if not _is_beyond_closing(result):
                result.close()

    def _with_readers(self) -> list[tuple[Any, bool]]:
        # Soft-closed is SQLAlchemy's word for read to its end.
        results = self._results
        counted = zip(results, _references(results), strict=True)
        return [(result, count > _OURS and not result._soft_closed) for result, count in counted]


def _streams(result: CursorResult[Any]) -> bool:
    return bool(result.context.execution_options.get("stream_results", False))


def _is_beyond_closing(result: CursorResult[Any]) -> bool:
    """Whether it is closed, or SQLAlchemy could do no more than log that it cannot close it."""
    connection = result.connection
    if result._soft_closed or result.cursor is None:  # its close() may have been cancelled
        return True
    # Closed under it, as by a cancelled statement. psycopg still wants its cursors closed.
    return connection.invalidated and not connection.dialect.driver.startswith("psycopg")


def _references(results: Sequence[Any]) -> list[int]:
    # Results take no weak references, so the strong ones are counted.
    return [sys.getrefcount(result) for result in results]


#: So many are those of the sequence, and of the counting itself.
_OURS = _references([object()])[0]
