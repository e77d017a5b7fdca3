"""Connections that the database itself holds read-only, and that need no transaction to read.

Each statement is executed in autocommit, so a SELECT takes one round trip in place of three. A
transaction is begun only where one is needed: for a snapshot, for a cursor of PostgreSQL, and
where the connection cannot be held read-only without one.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar

from sqlalchemy import Connection, Engine, event
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.pool import PoolProxiedConnection

from repom.dialects.base import READING, Support, info_of
from repom.dialects.mysql import MySQL, errno
from repom.dialects.postgresql import PostgreSQL, sqlstate
from repom.dialects.sqlite import SQLite, sqlite_connection
from repom.dialects.variants import marking_engine
from repom.errors import ReadOnlyError

# Keys of `PoolProxiedConnection.info`.
_SNAPSHOT = "repom.snapshot"  # the transaction that begins now is to be one for the database, too
_IN_TRANSACTION = "repom.in_transaction"  # the names of its savepoints, while there is one

# What would make the connection writable, and with it whoever gets it next from the pool.
_MAKES_WRITABLE = re.compile(
    r"\s*(?:SET\b.*\b(?:READ\s+WRITE|(?:default_transaction|transaction|tx)_read_only)\b"
    r"|PRAGMA\s+(?:\w+\.)?query_only\s*[=(]"
    r"|SELECT\b.*\bset_config\s*\(\s*'(?:default_)?transaction_read_only'"
    r"|(?:DISCARD|RESET)\s+ALL\b"
    r"|RESET\s+(?:default_)?transaction_read_only\b)",
    re.IGNORECASE | re.DOTALL,
)


class Reading:
    """One unit of work that only reads.

    Attributes:
        label: what it is, for messages.
        refused: why the database has refused a write of it, until that is rolled back.
    """

    __slots__ = ("label", "refused")

    def __init__(self, label: object) -> None:
        self.label = label
        self.refused: Exception | None = None

    def check(self) -> None:
        """Raise if a write was refused.

        Raises:
            ReadOnlyError: it was, and whoever swallowed that error goes on as if it was not.
        """
        if self.refused is not None:
            raise read_only(self.label, self.refused) from self.refused


def read_only(label: object, refusal: Exception) -> ReadOnlyError:
    """The error for a write in a unit of work that only reads.

    Args:
        label: what that is.
        refusal: what the database has said.
    """
    # What SQLAlchemy makes of an error of asyncpg has that as its cause.
    said = " ".join(str(refusal.__cause__ or refusal).split())
    return ReadOnlyError(
        f"{label} only reads (`read_only`), and the database has refused a write: {said}.\n"
        "Nothing was written. Leave `read_only` out for it, or write in a unit of work of its own: "
        "`async with session_scope() as session:`."
    )


def makes_writable(sql: str) -> bool:
    """Whether `sql` would let a read-only connection write."""
    return _MAKES_WRITABLE.match(sql) is not None


def snapshot_engine(engine: Engine) -> Engine:
    """The same engine of read-only connections, with transactions that see one state."""
    return marking_engine(engine, _SNAPSHOT)


class ReadOnly(Support):
    """Holds the connections of an engine read-only, for as long as they live.

    Attributes:
        in_autocommit: whether statements are executed on their own, outside of a snapshot.
    """

    in_autocommit = True
    #: Executed on each new connection; of a session, so that every transaction inherits it.
    hold: ClassVar[str]
    _dialect: Any

    def engine_kwargs(self, given: Mapping[str, Any]) -> dict[str, Any]:
        kwargs = super().engine_kwargs(given)
        kwargs.pop("isolation_level", None)
        if self.in_autocommit:
            kwargs["isolation_level"] = "AUTOCOMMIT"
        return kwargs

    def install(self, engine: Engine) -> None:
        super().install(engine)
        self._dialect = engine.dialect
        self.install_savepoints(engine.dialect)
        dialect: Any = engine.dialect
        dialect.set_connection_execution_options = partial(
            _set_options, dialect.set_connection_execution_options
        )
        # Not by the arguments of `connect()`: an application may make its connections itself.
        event.listen(engine, "connect", self._hold)

    def _hold(self, dbapi_connection: Any, record: Any) -> None:
        cursor = dbapi_connection.cursor()
        try:
            cursor.execute(self.hold)
        finally:
            cursor.close()

    # --- transactions, where there are any

    def _enter(self, connection: PoolProxiedConnection, *, snapshot: bool) -> None:
        """This call begins a read-only transaction, or the next statement does.

        Args:
            connection: which is in no transaction.
            snapshot: whether all its statements are to see one state.
        """
        raise NotImplementedError  # pragma: no cover - each dialect has its own

    def _leave(self, connection: PoolProxiedConnection) -> None:
        """That transaction has ended."""

    def _begin(self, do_begin: Callable[..., None], connection: PoolProxiedConnection) -> None:
        info = connection.info
        info.pop(READING, None)
        is_snapshot = info.pop(_SNAPSHOT, False)
        if is_snapshot or not self.in_autocommit:
            self.begins(connection)
            info[_IN_TRANSACTION] = set()
            self._enter(connection, snapshot=is_snapshot)
            do_begin(connection)

    def commit(self, do_commit: Callable[..., None], connection: PoolProxiedConnection) -> None:
        if _IN_TRANSACTION in connection.info:
            super().commit(do_commit, connection)
            self._over(connection)

    def _rollback(
        self, do_rollback: Callable[..., None], connection: PoolProxiedConnection
    ) -> None:
        try:
            is_begun = _IN_TRANSACTION in connection.info
        except NotImplementedError:  # SQLAlchemy's first look at a server, before its pool's
            do_rollback(connection)
            return
        if is_begun:
            do_rollback(connection)
            self._over(connection)

    def _over(self, connection: PoolProxiedConnection) -> None:
        del connection.info[_IN_TRANSACTION]
        self._leave(connection)

    # --- savepoints: without a transaction there is nothing that one could undo

    def install_savepoints(self, dialect: Any) -> None:
        """Make `dialect` send those only that are inside of a transaction."""
        dialect.do_savepoint = partial(self._savepoint, dialect.do_savepoint)
        dialect.do_release_savepoint = partial(self._release, dialect.do_release_savepoint)
        dialect.do_rollback_to_savepoint = partial(
            self._rollback_to, dialect.do_rollback_to_savepoint
        )

    def _savepoint(self, do_savepoint: Callable[..., None], connection: Any, name: str) -> None:
        reading: Reading | None = connection.info.get(READING)
        if reading is not None:
            reading.check()
        begun = connection.info.get(_IN_TRANSACTION)
        if begun is not None:
            do_savepoint(connection, name)
            begun.add(name)

    def _release(self, do_release: Callable[..., None], connection: Any, name: str) -> None:
        if name in connection.info.get(_IN_TRANSACTION, ()):
            do_release(connection, name)

    def _rollback_to(self, do_rollback_to: Callable[..., None], connection: Any, name: str) -> None:
        info = connection.info
        if name in info.get(_IN_TRANSACTION, ()):
            do_rollback_to(connection, name)
        elif _IN_TRANSACTION in info:  # begun inside, by a cursor
            connection.dialect.do_rollback(connection.connection)
        if (reading := info.get(READING)) is not None:
            reading.refused = None

    # --- writes

    def is_answer(self, error: Exception) -> bool:
        # A COMMIT without an answer leaves nothing unknown: there was nothing to write.
        return True

    def is_demoted(self, error: Exception) -> bool:
        return False  # it says the same of a write, and reads go on

    def is_refusal(self, error: Exception) -> bool:
        """Whether the database has refused a write with `error`, for being one."""
        raise NotImplementedError  # pragma: no cover - each dialect has its own

    def _on_error(self, context: ExceptionContext) -> BaseException | None:
        found = super()._on_error(context)
        error = context.original_exception
        if found is not None or not isinstance(error, Exception) or not self.is_refusal(error):
            return found
        reading: Reading | None = None
        if context.connection is not None and not context.connection.invalidated:
            reading = info_of(context.connection.connection).get(READING)
        if reading is None:
            return read_only("this connection", error)
        reading.refused = error
        return read_only(reading.label, error)


def _set_options(
    set_options: Callable[..., None], connection: Connection, options: Mapping[str, Any]
) -> None:
    for option in ("isolation_level", "postgresql_readonly"):
        if option in options:
            raise ReadOnlyError(
                f"the execution option {option}={options[option]!r} was given for a connection "
                "that only reads (`read_only`), most of the time without any transaction.\n"
                'For statements that see one state write `read_only="snapshot"`.'
            )
    set_options(connection, options)


class ReadOnlyPostgreSQL(ReadOnly, PostgreSQL):
    """By `default_transaction_read_only`; behind a PgBouncer by each transaction.

    In PgBouncer's transaction mode what a session sets is another client's with the next
    transaction, and a statement on its own may run on any connection of the server.
    """

    hold = "SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY"

    def install(self, engine: Engine) -> None:
        super().install(engine)
        if self.in_autocommit:
            self._dialect.execution_ctx_cls = _with_transaction_for_cursors(
                self._dialect.execution_ctx_cls, self._begin_for_cursor
            )

    def _hold(self, dbapi_connection: Any, record: Any) -> None:
        if self.in_autocommit:
            super()._hold(dbapi_connection, record)
        else:
            # The driver says it in each BEGIN. Behind a PgBouncer the session is everybody's.
            self._dialect.set_readonly(dbapi_connection, True)

    def _begin_for_cursor(self, connection: PoolProxiedConnection) -> None:
        # Outside of a transaction the server has no cursors.
        if _IN_TRANSACTION not in connection.info:
            self.begins(connection)
            connection.info[_IN_TRANSACTION] = set()
            self._enter(connection, snapshot=True)

    def _enter(self, connection: PoolProxiedConnection, *, snapshot: bool) -> None:
        if snapshot:
            self._dialect.set_isolation_level(connection.dbapi_connection, "REPEATABLE READ")

    def _leave(self, connection: PoolProxiedConnection) -> None:
        # It sends nothing, like the other one.
        self._dialect.reset_isolation_level(connection.dbapi_connection)

    def is_refusal(self, error: Exception) -> bool:
        return sqlstate(error) == "25006"  # read_only_sql_transaction


def _with_transaction_for_cursors(
    base: Any, begin: Callable[[PoolProxiedConnection], None]
) -> type[Any]:
    """An execution context that begins a transaction before it opens a cursor of the server."""

    def create_server_side_cursor(self: Any) -> Any:
        begin(self._dbapi_connection)
        return base.create_server_side_cursor(self)

    attributes = {"create_server_side_cursor": create_server_side_cursor}
    return type(f"ReadOnly{base.__name__}", (base,), attributes)


class ReadOnlyMySQL(ReadOnly, MySQL):
    """By `SET SESSION TRANSACTION READ ONLY`, which statements on their own obey, too."""

    hold = "SET SESSION TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY"

    def _enter(self, connection: PoolProxiedConnection, *, snapshot: bool) -> None:
        if not snapshot:
            return  # the driver's own, which begins with the first statement
        cursor = connection.cursor()
        try:
            cursor.execute("START TRANSACTION WITH CONSISTENT SNAPSHOT, READ ONLY")
        finally:
            cursor.close()

    def is_refusal(self, error: Exception) -> bool:
        return errno(error) in _REFUSALS


_REFUSALS = frozenset(
    {
        1792,  # ER_CANT_EXECUTE_IN_READ_ONLY_TRANSACTION
        1290,  # ER_OPTION_PREVENTS_STATEMENT, of a server started with --read-only
        1836,  # ER_READ_ONLY_MODE
    }
)


class ReadOnlySQLite(ReadOnly, SQLite):
    """By `PRAGMA query_only`.

    A memory database has no readers beside its writer, so there all transactions wait in line,
    and statements on their own could not.
    """

    hold = "PRAGMA query_only = ON"

    def engine_kwargs(self, given: Mapping[str, Any]) -> dict[str, Any]:
        kwargs = super().engine_kwargs(given)
        kwargs.pop("isolation_level", None)  # see below
        return kwargs

    def connect_args(self, given: Mapping[str, Any]) -> dict[str, Any]:
        # None is the driver's autocommit: it begins nothing by itself.
        return super().connect_args(given) | {"isolation_level": None}

    def _enter(self, connection: PoolProxiedConnection, *, snapshot: bool) -> None:
        sqlite = sqlite_connection(connection.driver_connection)
        if sqlite.ticket is None:
            sqlite.ticket = self.place_in_line(connection, awaits=self.is_async)
        sqlite.begin_next = "BEGIN"

    def is_refusal(self, error: Exception) -> bool:
        return getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_READONLY
