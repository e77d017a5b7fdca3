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


_WRITES_ON_MYSQL = re.compile(
    r"\s*(?:INSERT|UPDATE|DELETE|REPLACE|LOAD|TRUNCATE|CREATE|ALTER|DROP|RENAME"
    r"|SELECT\b.*\bFOR\s+UPDATE)\b",
    re.IGNORECASE | re.DOTALL,
)


class Backend:
    """The connection of the tests, on a database of which nothing more is known.

    Args:
        connection: it.

    Attributes:
        real: what executes statements.
        schema_touched: a statement that changes the schema has been executed by a test.
    """

    #: Whether statements can be executed in any thread, although the driver is an async one.
    is_direct = False
    #: Whether a statement can be cut off without losing the connection.
    can_cancel = False
    #: Whether a savepoint replaces one of the same name instead of hiding it.
    names_are_unique = False

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.real: Any = connection.connection.dbapi_connection
        self.schema_touched = False

    def cursor(self, *args: Any, **kwargs: Any) -> Any:
        """A DBAPI cursor.

        Args:
            args: of the real connection's `cursor`.
            kwargs: likewise.
        """
        return self.real.cursor(*args, **kwargs)

    def begin(self) -> None:
        """Begin the transaction of a test."""
        self._connection.begin()

    def rollback(self) -> None:
        """Roll the transaction of a test back."""
        self._connection.rollback()

    def execute(self, sql: str) -> Any:
        """Execute `sql` and return the first column of its first row, if there is one."""
        cursor = self.real.cursor()
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
        return self._connection.dialect.is_disconnect(error, self.real, None)  # type: ignore[arg-type]

    def commits(self, sql: str) -> bool:
        """Whether `sql` would commit all that the test has done."""
        return False

    def refuse_writes(self) -> None:
        """Let the database refuse what would write, until the savepoint or `allow_writes`."""

    def allow_writes(self) -> None:
        """The statement that only reads has been executed."""

    def check_reads(self, sql: str) -> None:
        """Refuse `sql` as the database would, if that cannot do so itself in a transaction.

        Raises:
            Exception: of the driver; it would write.
        """

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

    def refuse_writes(self) -> None:
        self.execute("SET TRANSACTION READ ONLY")  # ends with the savepoint

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
    """Deferred foreign keys are looked for by every commit.

    Statements are executed below the async driver, which has a thread for each connection: two
    journeys to it and two back would take longer than a statement of a test.
    """

    is_direct = True
    _defers: bool | None = None

    def __init__(self, connection: Connection) -> None:
        super().__init__(connection)
        self.real = sqlite_connection(connection.connection.driver_connection)

    def cursor(self, *args: Any, **kwargs: Any) -> Any:
        return self.real.cursor(BufferedCursor)

    def begin(self) -> None:
        # Without a place in the line of writers, in which the units of the test stand.
        self.real.execute("BEGIN")
        self.real.begun = True

    def rollback(self) -> None:
        self.real.rollback()

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

    def refuse_writes(self) -> None:
        self.execute("PRAGMA query_only = ON")

    def allow_writes(self) -> None:
        self.execute("PRAGMA query_only = OFF")

    def is_lost(self, error: Exception) -> bool:
        # INSERT OR ROLLBACK, a full disk and others end the whole transaction.
        try:
            return not self.real.in_transaction
        except sqlite3.ProgrammingError:  # it is closed
            return True


_DEFERS = "SELECT 1 FROM sqlite_master WHERE sql LIKE '%INITIALLY%DEFERRED%'"


class MySQL(Backend):
    """Statements that commit by themselves are refused."""

    names_are_unique = True

    def cursor(self, *args: Any, **kwargs: Any) -> Any:
        # None whose rows are still to be read, when others want to use the connection.
        return self.real.cursor()

    def commits(self, sql: str) -> bool:
        return _COMMITS_ON_MYSQL.match(sql) is not None

    def check_reads(self, sql: str) -> None:
        # The server does so for whole transactions only, and that of the test may write.
        if _WRITES_ON_MYSQL.match(sql):
            dbapi: Any = self._connection.dialect.dbapi
            raise dbapi.OperationalError(
                1792, "Cannot execute statement in a READ ONLY transaction"
            )

    def release_locks(self) -> None:
        self.execute("DO RELEASE_ALL_LOCKS()")


class BufferedCursor(sqlite3.Cursor):
    """A cursor that has read all rows when it has executed, as those of the async driver have.

    One that is still to be read would see what others write, and keep them from rolling back.
    """

    def execute(self, *args: Any) -> BufferedCursor:
        super().execute(*args)
        self._rows = super().fetchall() if self.description else []
        self._rows.reverse()
        return self

    def fetchone(self) -> Any:
        return self._rows.pop() if self._rows else None

    def fetchmany(self, size: int | None = None) -> list[Any]:
        wanted = self.arraysize if size is None else size
        return [self._rows.pop() for _ in range(min(wanted, len(self._rows)))]

    def fetchall(self) -> list[Any]:
        rows, self._rows = self._rows, []
        return rows[::-1]


def backend_of(connection: Connection) -> Backend:
    """What knows the database of `connection`."""
    kinds = {"postgresql": PostgreSQL, "sqlite": SQLite, "mysql": MySQL, "mariadb": MySQL}
    return kinds.get(connection.dialect.name, Backend)(connection)
