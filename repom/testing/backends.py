"""What a commit means on each database, when it only ends a savepoint."""

from __future__ import annotations

import re
import sqlite3
from typing import Any

from sqlalchemy import Connection

from repom.dialects.postgresql import sqlstate
from repom.dialects.sqlite import sqlite_connection

_DDL = re.compile(r"\s*(?:CREATE|ALTER|DROP)\b", re.IGNORECASE)

# https://mariadb.com/kb/en/sql-statements-that-cause-an-implicit-commit/
_COMMITS_ON_MYSQL = re.compile(
    r"\s*(?:(?:CREATE|DROP)(?!\s+TEMPORARY\b)|ALTER|RENAME|TRUNCATE|GRANT|REVOKE|LOCK\s+TABLES?"
    r"|(?:ANALYZE|CHECK|OPTIMIZE|REPAIR)\s+TABLE|FLUSH|RESET|SET\s+PASSWORD)\b",
    re.IGNORECASE,
)


class Backend:
    """The connection of the tests, on a database of which nothing more is known.

    Args:
        connection: it.

    Attributes:
        schema_touched: a statement that changes the schema has been executed by a test.
    """

    #: Whether a statement can be cut off without losing the connection.
    can_cancel = False
    #: Whether nobody else can use the connection while rows of a cursor are still to be read.
    reads_block = False
    #: Whether a savepoint replaces one of the same name instead of hiding it.
    names_are_unique = False

    def __init__(self, connection: Connection) -> None:
        self._dialect = connection.dialect
        self.dbapi_connection: Any = connection.connection.dbapi_connection
        self.schema_touched = False

    def execute(self, sql: str) -> Any:
        """Execute `sql` and return the first column of its first row, if there is one."""
        cursor = self.dbapi_connection.cursor()
        try:
            cursor.execute(sql)
            row = cursor.fetchone() if cursor.description else None
        finally:
            cursor.close()
        return row and row[0]

    def check_constraints(self) -> None:
        """Raise what COMMIT would, for constraints that are checked only by that."""

    def aborts(self, error: BaseException) -> bool:
        """Whether the database, because of `error`, refuses what follows in the savepoint."""
        return False

    def is_lost(self, error: Exception) -> bool:
        """Whether `error` is about a connection that is closed."""
        return self._dialect.is_disconnect(error, self.dbapi_connection, None)  # type: ignore[arg-type]

    def commits(self, sql: str) -> bool:
        """Whether `sql` would commit all that the test has done."""
        return False

    def seen(self, sql: str) -> None:
        """`sql` has been executed for the code under test."""
        if _DDL.match(sql):
            self.schema_touched = True

    def release_locks(self) -> None:
        """Give up the locks that outlive a transaction."""


class PostgreSQL(Backend):
    """Deferred constraints are checked by every commit, and are then deferred again.

    A SAVEPOINT and a rollback to it would leave them deferred, too, but undo what constraint
    triggers have done.
    """

    can_cancel = True
    _deferrable: tuple[bool, str] | None = None  # if there are any, and those deferred at first

    def check_constraints(self) -> None:
        if self._deferrable is None or self.schema_touched:
            names = self.execute(_INITIALLY_DEFERRED)
            self._deferrable = (names is not None, names or "")
        exist, deferred = self._deferrable
        if exist:
            self.execute("SET CONSTRAINTS ALL IMMEDIATE")
        if deferred:
            self.execute(f"SET CONSTRAINTS {deferred} DEFERRED")

    def aborts(self, error: BaseException) -> bool:
        return sqlstate(error) is not None

    def release_locks(self) -> None:
        self.execute("SELECT pg_advisory_unlock_all()")


# Null if no constraint is deferrable.
_INITIALLY_DEFERRED = """
SELECT CASE WHEN count(*) > 0 THEN
    coalesce(string_agg(format('%I.%I', nspname, conname), ', ') FILTER (WHERE condeferred), '')
END
FROM pg_constraint JOIN pg_namespace ON pg_namespace.oid = connamespace WHERE condeferrable
"""


class SQLite(Backend):
    """Deferred foreign keys are looked for by every commit."""

    _defers: bool | None = None

    def __init__(self, connection: Connection) -> None:
        super().__init__(connection)
        driver_connection = connection.connection.driver_connection
        self._sqlite: sqlite3.Connection = sqlite_connection(driver_connection)

    def execute(self, sql: str) -> Any:
        # Below the driver, which has a thread for each connection. That has nothing to do now.
        row = self._sqlite.execute(sql).fetchone()
        return row and row[0]

    def check_constraints(self) -> None:
        if self._defers is None or self.schema_touched:
            self._defers = bool(self.execute(_DEFERS))
        deferred_once = self.execute("PRAGMA defer_foreign_keys")
        if not self._defers and not deferred_once:
            return
        if self.execute("PRAGMA foreign_keys") and self.execute("PRAGMA foreign_key_check"):
            raise sqlite3.IntegrityError("FOREIGN KEY constraint failed")
        if deferred_once:
            self.execute("PRAGMA defer_foreign_keys = OFF")

    def is_lost(self, error: Exception) -> bool:
        # INSERT OR ROLLBACK, a full disk and others end the whole transaction.
        return super().is_lost(error) or not self._sqlite.in_transaction


_DEFERS = "SELECT 1 FROM sqlite_master WHERE sql LIKE '%INITIALLY%DEFERRED%'"


class MySQL(Backend):
    """Statements that commit by themselves are refused."""

    reads_block = True
    names_are_unique = True

    def commits(self, sql: str) -> bool:
        return _COMMITS_ON_MYSQL.match(sql) is not None

    def release_locks(self) -> None:
        self.execute("DO RELEASE_ALL_LOCKS()")


def backend_of(connection: Connection) -> Backend:
    """What knows the database of `connection`."""
    kinds = {"postgresql": PostgreSQL, "sqlite": SQLite, "mysql": MySQL, "mariadb": MySQL}
    return kinds.get(connection.dialect.name, Backend)(connection)
