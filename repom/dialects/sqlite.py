"""SQLite: real transactions, and writers that wait in line.

Python's driver begins a transaction only before the first INSERT, so that a SELECT before it
is outside, and SAVEPOINT and ROLLBACK do not do what they say
(https://docs.sqlalchemy.org/en/21/dialects/sqlite.html#pysqlite-serializable). Here every
transaction has its BEGIN.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
import uuid
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from sqlalchemy import URL, Connection, Engine, event
from sqlalchemy.util import await_only

from repom.context import Surroundings, surroundings
from repom.dialects.base import Support
from repom.dialects.write_queue import Ticket, WriteQueue, write_queue
from repom.errors import DatabaseFileError, RepomError, WouldDeadlockError

Begin = Literal["IMMEDIATE", "DEFERRED"]

#: The execution option that says how a transaction begins.
BEGIN_OPTION = "repom_sqlite_begin"

#: Seconds to wait for another writer, of this process or of another one.
BUSY_TIMEOUT = 30.0


def private_memory(url: URL) -> URL:
    """A URL for `:memory:` that every connection of this process can open.

    The database lives in SQLite's `memdb` VFS, which has real locks and no dirty reads, as
    shared cache has (https://sqlite.org/sharedcache.html, section 3.2). It is gone when its
    last connection is closed.
    """
    if url.database not in (None, "", ":memory:"):
        return url
    query = {**url.query, "vfs": "memdb", "uri": "true"}
    return url.set(database=f"file:/repom-{uuid.uuid4().hex}", query=query)


class SQLite(Support):
    """Begins every transaction for real, and lets the writers of one file queue.

    Args:
        begin: how transactions begin that do not say it themselves by `BEGIN_OPTION`.
    """

    def __init__(
        self,
        url: URL,
        connect_args: Mapping[str, Any],
        *,
        is_async: bool,
        begin: Begin = "DEFERRED",
    ) -> None:
        super().__init__(url, connect_args, is_async=is_async)
        self.begin_mode = begin
        self.is_memory = url.query.get("vfs") == "memdb"
        self.path = _path(url)
        self.timeout = BUSY_TIMEOUT
        self._queue: WriteQueue = write_queue(self.path)

    def check(self) -> None:
        """Make the folder of the file; raise `DatabaseFileError` if nothing can be written."""
        if not _is_plain_file(self.url):
            return
        folder = os.path.dirname(self.path)
        try:
            os.makedirs(folder, exist_ok=True)
        except OSError as error:
            raise DatabaseFileError(_cannot_open(self.path, error)) from error
        target = self.path if os.path.exists(self.path) else folder
        if not os.access(target, os.W_OK):
            raise DatabaseFileError(_cannot_open(self.path, "no permission to write there"))

    def connect_args(self, given: Mapping[str, Any]) -> dict[str, Any]:
        args = {"timeout": self.timeout, "check_same_thread": False} | super().connect_args(given)
        if "timeout" in self.url.query:  # what the URL says wins over our default
            args["timeout"] = float(str(self.url.query["timeout"]))
        self.timeout = float(args["timeout"])
        args["isolation_level"] = None  # the driver sends no BEGIN of its own
        args["factory"] = _factory(args.get("factory"), read_only=_is_read_only(self.url))
        return args

    def install(self, engine: Engine) -> None:
        super().install(engine)
        event.listen(engine, "begin", self._begin)

    def is_aborted(self, driver_connection: Any) -> bool:
        # INSERT OR ROLLBACK, a full disk and others end a transaction behind our back
        # (https://sqlite.org/lang_transaction.html, section 3).
        connection = _sqlite(driver_connection)
        return connection.begun and not connection.in_transaction

    def connect_failed(self, error: Exception) -> RepomError:
        return DatabaseFileError(_cannot_open(self.path, error))

    def _begin(self, connection: Connection) -> None:
        options = connection.get_execution_options()
        if options.get("isolation_level") == "AUTOCOMMIT":
            return
        driver_connection = connection.connection.driver_connection
        sqlite = _sqlite(driver_connection)
        immediate = options.get(BEGIN_OPTION, self.begin_mode) == "IMMEDIATE"
        # A memory database has no readers beside its writer, so all of them wait in line.
        if immediate or self.is_memory:
            sqlite.ticket = self._wait_for_turn()
        sql = "BEGIN IMMEDIATE" if immediate else "BEGIN"
        try:
            if self.is_async:
                await_only(driver_connection.execute(sql))  # type: ignore[union-attr]
            else:
                sqlite.execute(sql)
        except sqlite3.Error:
            # Cancelled is another matter: then BEGIN may still be running in the connection's
            # thread, and its rollback, on the way back to the pool, gives the ticket up.
            sqlite.release()
            raise
        sqlite.begun = True

    def _wait_for_turn(self) -> Ticket:
        me = Writer(surroundings.get(), asyncio.current_task() if self.is_async else None)
        if me.would_wait_for_itself(self._queue.holder()):
            raise WouldDeadlockError(
                f"this scope would wait for itself: an enclosing one holds the write lock of "
                f"{self.path}.\nSQLite has one writer at a time. Use the enclosing session, or "
                "end its transaction first (`await current_scope().commit()`)."
            )
        try:
            if self.is_async:
                return await_only(self._queue.acquire_async(me, self.timeout))
            return self._queue.acquire(me, self.timeout)
        except TimeoutError:
            raise sqlite3.OperationalError(
                f"database is locked: waited {self.timeout:g} s for other writers of {self.path}"
            ) from None


class Writer(NamedTuple):
    """Who holds the write lock of a file, or waits for it."""

    scope: Surroundings | None
    task: asyncio.Task[Any] | None

    def would_wait_for_itself(self, holder: object) -> bool:
        """Whether `holder` can only end after this writer has.

        A task does not end one transaction while it waits to begin another. What another task
        holds may well end, also when that task opened the enclosing scope. In threads there is
        no telling who waits for whom, so there an enclosing scope counts.
        """
        if not isinstance(holder, Writer):
            return False
        if self.task is not None:
            return self.task is holder.task
        scope = self.scope
        while scope is not None and scope is not holder.scope:
            scope = scope.parent
        return scope is not None


class RepomSQLiteConnection(sqlite3.Connection):
    """A connection that gives up its place in the line of writers when its transaction ends.

    It runs in the thread that aiosqlite gives every connection, or in the caller's.
    """

    read_only = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.ticket: Ticket | None = None
        self.begun = False
        super().__init__(*args, **kwargs)
        self.execute("PRAGMA foreign_keys = ON")
        if not self.read_only:
            # synchronous stays FULL: in WAL mode NORMAL may lose the last commits in a power
            # cut (https://sqlite.org/pragma.html#pragma_synchronous).
            self.execute("PRAGMA journal_mode = WAL")

    def commit(self) -> None:
        try:
            super().commit()
        except sqlite3.Error:
            # Refused by a deferred constraint, the transaction is still open. SQLAlchemy takes
            # it for over and would put the connection back into its pool as it is.
            super().rollback()
            raise
        finally:
            self._ended()

    def rollback(self) -> None:
        super().rollback()
        self._ended()

    def close(self) -> None:
        try:
            super().close()
        finally:
            self._ended()

    def __del__(self) -> None:
        self.release()
        parent_del = getattr(super(), "__del__", None)  # 3.13 warns of unclosed connections
        if parent_del is not None:
            parent_del()

    def release(self) -> None:
        """Let the next writer in."""
        ticket, self.ticket = self.ticket, None
        if ticket is not None:
            ticket.release()

    def _ended(self) -> None:
        self.begun = False
        self.release()


def _factory(base: Any, *, read_only: bool) -> Any:
    bases: tuple[type, ...] = (RepomSQLiteConnection,)
    if base is not None:
        bases += (base,)
    return type("RepomSQLiteConnection", bases, {"read_only": read_only})


def _sqlite(driver_connection: Any) -> RepomSQLiteConnection:
    """The sqlite3 connection, which aiosqlite wraps and SQLAlchemy's own dialect unwraps so."""
    return getattr(driver_connection, "_conn", driver_connection)  # type: ignore[no-any-return]


def _is_plain_file(url: URL) -> bool:
    return bool(url.database) and "uri" not in url.query


def _is_read_only(url: URL) -> bool:
    return url.query.get("mode") == "ro" or url.query.get("immutable") in ("1", "true")


def _path(url: URL) -> str:
    return os.path.abspath(str(url.database)) if _is_plain_file(url) else str(url.database)


def _cannot_open(path: str, why: object) -> str:
    return (
        f"cannot open the SQLite database {path}: {why}.\n"
        "Give the process write permission on the file and its folder (SQLite writes -wal and "
        "-shm files beside it), or name another place in DATABASE_URL."
    )
