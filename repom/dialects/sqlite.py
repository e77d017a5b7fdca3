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
import time
import uuid
import weakref
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple
from urllib.parse import unquote, urlsplit

from sqlalchemy import URL, Engine
from sqlalchemy.engine.base import OptionEngine
from sqlalchemy.pool import PoolProxiedConnection
from sqlalchemy.util import asbool, await_only

from repom.context import Surroundings, surroundings
from repom.dialects.aiosqlite_cursor import execute_in_one_step
from repom.dialects.aiosqlite_threads import AbandonedThreads
from repom.dialects.base import Support
from repom.dialects.variants import marking_engine, variant_of
from repom.dialects.write_queue import Ticket, WriteQueue, write_queue
from repom.errors import (
    ConfigurationError,
    DatabaseFileError,
    DatabaseUnreachableError,
    RepomError,
    WouldDeadlockError,
)
from repom.lending import place_lent
from repom.shield import acting_task

Begin = Literal["IMMEDIATE", "DEFERRED"]

#: Seconds to wait for another writer, of this process or of another one.
BUSY_TIMEOUT = 30.0

# Seconds between two attempts to switch a new file to WAL.
_WAL_PAUSE = 0.01

# Key of `PoolProxiedConnection.info`: the transaction that begins now is to be IMMEDIATE.
_IMMEDIATE = "repom.immediate"


def is_sqlite(url: URL) -> bool:
    """Whether this is SQLite by Python's own driver; others, SQLCipher's say, are left alone."""
    drivers = ("pysqlite", "aiosqlite")
    return url.get_backend_name() == "sqlite" and url.get_driver_name() in drivers


def private_memory(url: URL) -> URL:
    """A URL for `:memory:` that every connection of this process can open.

    The database lives in SQLite's `memdb` VFS, which has real locks and no dirty reads, as
    shared cache has (https://sqlite.org/sharedcache.html, section 3.2). It is gone when its
    last connection is closed.

    Returns:
        `url` itself if it is a file, or a memory database that other code can open by name.
    """
    query = dict(url.query)
    mode, cache = query.pop("mode", None), query.pop("cache", None)
    nameless = url.database in (None, "", ":memory:", "file::memory:")
    if not nameless and (mode != "memory" or cache == "shared"):
        return url
    return url.set(
        database=f"file:/repom-{uuid.uuid4().hex}", query={**query, "vfs": "memdb", "uri": "true"}
    )


def immediate_engine(engine: Engine) -> Engine:
    """The same engine, with transactions that take the write lock when they begin."""
    return marking_engine(engine, _IMMEDIATE)


def queueing_engine(engine: Engine) -> Engine:
    """The same engine, whose transactions wait in line before they take a connection.

    Waiting with one in hand, they would keep it from the readers, and from the writer itself
    when that wants a second one.
    """
    variant = variant_of(engine)
    variant.__class__ = _QueueingEngine
    return variant  # type: ignore[no-any-return]


class _QueueingEngine(OptionEngine):
    def raw_connection(self) -> PoolProxiedConnection:
        dialect: Any = self.dialect
        ticket: Ticket = dialect.repom_queue_up()
        try:
            connection = super().raw_connection()
        except BaseException:
            ticket.release()
            raise
        sqlite_connection(connection.driver_connection).ticket = ticket
        return connection


class SQLite(Support):
    """Begins every transaction for real, and lets the writers of one file queue.

    Args:
        begin: how transactions begin, but for those of `immediate_engine()`.
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
        self._abandoned = AbandonedThreads()

    def check(self) -> None:
        """Make the folder of the file; raise `DatabaseFileError` if nothing can be written."""
        if _is_uri(self.url):
            return  # says itself what may be created and written
        folder = os.path.dirname(self.path)
        try:
            os.makedirs(folder, exist_ok=True)
        except OSError as error:
            raise DatabaseFileError(_cannot_open(self.path, error)) from error
        for target in (folder, self.path):
            if os.path.exists(target) and not os.access(target, os.W_OK):
                raise DatabaseFileError(_cannot_open(self.path, f"{target} is not writable"))

    def connect_args(self, given: Mapping[str, Any]) -> dict[str, Any]:
        timeout = self.url.query.get("timeout", BUSY_TIMEOUT)
        args = {"timeout": timeout, "check_same_thread": False} | super().connect_args(given)
        args["timeout"] = self.timeout = float(args["timeout"])
        # None is SQLAlchemy's AUTOCOMMIT. With "" the driver would send a BEGIN of its own,
        # but never finds a transaction missing.
        args["isolation_level"] = ""
        args["factory"] = _factory(args.get("factory"), read_only=_is_read_only(self.url))
        return args

    def engine_kwargs(self, given: Mapping[str, Any]) -> dict[str, Any]:
        for option in ("creator", "async_creator"):
            if option in given:
                raise ConfigurationError(
                    f"engine_kwargs has {option!r}, but repom needs SQLite connections of a class "
                    "of its own.\nSay what they need in the URL, in connect_args (a `factory` "
                    'too), or in a listener of the engine\'s "connect" event.'
                )
        return super().engine_kwargs(given)

    def aborts(self, error: Exception, driver_connection: Any) -> bool:
        # INSERT OR ROLLBACK, a full disk and others end a transaction behind our back
        # (https://sqlite.org/lang_transaction.html, section 3).
        sqlite = sqlite_connection(driver_connection)
        ended = sqlite.begun and not sqlite.in_transaction
        if ended:
            # Without a transaction, each statement that follows would commit itself.
            sqlite.begin_next = "BEGIN"
        return ended

    def is_aborted(self, connection: PoolProxiedConnection) -> bool:
        sqlite = sqlite_connection(connection.driver_connection)
        return super().is_aborted(connection) or (sqlite.begun and not sqlite.in_transaction)

    def connect_failed(self, error: Exception) -> RepomError:
        if _is_busy(error):
            return DatabaseUnreachableError(
                f"no connection to the SQLite database {self.path}: another process has locked "
                f"it, and has not let go for {self.timeout:g} s ({error}).\n"
                "Let that one end its transaction, or wait longer: ?timeout=60 in the URL."
            )
        return DatabaseFileError(_cannot_open(self.path, error))

    def abandon(self, driver_connection: Any) -> None:
        self._abandoned.stop(driver_connection)

    def install(self, engine: Engine) -> None:
        super().install(engine)
        dialect: Any = engine.dialect
        dialect.repom_queue_up = partial(self._queue_up, awaits=self.is_async)
        if self.is_async:
            # SQLAlchemy awaits aiosqlite's close() first. Cancelled there, it stops the thread
            # that was to do that, and leaves a task behind that waits for it forever.
            dialect.do_terminate = lambda connection: self.abandon(connection.driver_connection)
            self._abandoned.wait_on_dispose(engine)

    def _connect(self, connect: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        dbapi_connection = super()._connect(connect, *args, **kwargs)
        driver_connection = getattr(dbapi_connection, "driver_connection", dbapi_connection)
        sqlite_connection(driver_connection).is_delivered = True
        if self.is_async:
            execute_in_one_step(dbapi_connection)
        return dbapi_connection

    def _begin(self, do_begin: Callable[..., None], connection: PoolProxiedConnection) -> None:
        super()._begin(do_begin, connection)
        sqlite = sqlite_connection(connection.driver_connection)
        immediate = self._is_immediate(connection)
        if sqlite.isolation_level is None:
            sqlite.release()
            return  # AUTOCOMMIT
        if sqlite.ticket is None:
            sqlite.ticket = self._wait_for_turn(immediate, awaits=self.is_async)
        sqlite.begin_next = "BEGIN IMMEDIATE" if immediate else "BEGIN"

    def _is_immediate(self, connection: PoolProxiedConnection) -> bool:
        marked = connection.info.pop(_IMMEDIATE, False)
        return marked or self.begin_mode == "IMMEDIATE"

    def place_in_line(self, connection: PoolProxiedConnection, *, awaits: bool) -> Ticket | None:
        return self._wait_for_turn(self._is_immediate(connection), awaits=awaits)

    def _wait_for_turn(self, immediate: bool, *, awaits: bool) -> Ticket | None:
        # A memory database has no readers beside its writer, so all of them wait in line.
        return self._queue_up(awaits=awaits) if immediate or self.is_memory else None

    def _queue_up(self, *, awaits: bool) -> Ticket:
        me = Writer(surroundings.get(), acting_task() if awaits else None)
        if me.would_wait_for_itself(self._queue.holder()):
            raise WouldDeadlockError(
                f"this scope would wait for itself: an enclosing one holds the write lock of "
                f"{self.path}.\nSQLite has one writer at a time. Use the enclosing session, or "
                "end its transaction first (`await current_scope().commit()`)."
            )
        try:
            if awaits:
                return await_only(self._queue.acquire_async(me, self.timeout))
            if self._queue.holder() is None:
                return self._queue.acquire(me, self.timeout)
            with place_lent():
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
        holds may well end, also when that task opened the enclosing scope; but not while sync
        code blocks its event loop. In threads there is no telling who waits for whom, so there
        an enclosing scope counts.
        """
        if not isinstance(holder, Writer):
            return False
        if self.task is not None:
            return self.task is holder.task
        if holder.task is not None and holder.task.get_loop() is asyncio._get_running_loop():
            return True
        scope = self.scope
        while scope is not None and scope is not holder.scope:
            scope = scope.parent
        return scope is not None


class RepomSQLiteConnection(sqlite3.Connection):
    """A connection that begins transactions with their first statement, and knows their end.

    It runs in the thread that aiosqlite gives every connection, or in the caller's. A BEGIN of
    its own would be one more turn of that thread, for each transaction.
    """

    read_only = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        #: The place in the line of writers, given up when the transaction ends.
        self.ticket: Ticket | None = None
        #: The statement that begins the transaction, until there is something to do in it.
        self.begin_next: str | None = None
        self.begun = False
        #: Whether somebody has it who can close it.
        self.is_delivered = False
        self._is_open = False
        self._cursors: weakref.WeakSet[sqlite3.Cursor] = weakref.WeakSet()
        super().__init__(*args, **kwargs)
        self._is_open = True
        try:
            self.execute("PRAGMA foreign_keys = ON")
            if not self.read_only:
                self._use_wal(kwargs["timeout"])
        except sqlite3.Error:  # not a database, for instance
            self.close()
            raise

    def _use_wal(self, limit: float) -> None:
        # synchronous stays FULL: in WAL mode NORMAL may lose the last commits in a power cut
        # (https://sqlite.org/pragma.html#pragma_synchronous).
        end = time.monotonic() + limit
        while True:
            try:
                self.execute("PRAGMA journal_mode = WAL")
            except sqlite3.OperationalError as error:
                # The first connection to a new file has to lock it for this. SQLite does not
                # wait for others then, such as those of processes that start at the same time.
                if not _is_busy(error) or time.monotonic() > end:
                    raise
                time.sleep(_WAL_PAUSE)
            else:
                return

    def cursor(self, factory: Any = None) -> Any:
        if factory is not None:
            self.begin_if_due()
        cursor = super().cursor(factory or _BeginningCursor)
        self._cursors.add(cursor)
        return cursor

    def begin_if_due(self) -> None:
        if self.begin_next is not None:
            # Where it fails, the next statement tries again, and none is executed without it.
            super().cursor().execute(self.begin_next).close()
            self.begin_next = None
            self.begun = True

    def commit(self) -> None:
        super().commit()
        self._ended()

    def rollback(self) -> None:
        super().rollback()
        self._ended()

    def close(self) -> None:
        try:
            # A cursor that somebody still holds, a traceback for instance, would keep the
            # closed connection and its locks (https://sqlite.org/c3ref/close.html). A rollback
            # does not end a SELECT that has more rows.
            if self._is_open:
                for cursor in self._cursors:
                    cursor.close()
                super().rollback()
        finally:
            self._is_open = False
            super().close()
            self._ended()

    def __del__(self) -> None:
        # Cancelled while it connects, aiosqlite drops the connection that its thread then makes.
        if self._is_open and not self.is_delivered:
            self.close()
        self.release()
        parent_del = getattr(super(), "__del__", None)
        if parent_del is not None:  # pragma: no cover - since 3.13, warns of the unclosed
            parent_del()

    def release(self) -> None:
        """Let the next writer in."""
        ticket, self.ticket = self.ticket, None
        if ticket is not None:
            ticket.release()

    def _ended(self) -> None:
        self.begin_next = None
        self.begun = False
        self.release()


class _BeginningCursor(sqlite3.Cursor):
    """A cursor that begins the transaction first, if that is due."""

    def execute(self, *args: Any) -> Any:
        self._begin_if_due()
        return super().execute(*args)

    def executemany(self, *args: Any) -> Any:
        self._begin_if_due()
        return super().executemany(*args)

    def executescript(self, *args: Any) -> Any:
        self._begin_if_due()
        return super().executescript(*args)

    def _begin_if_due(self) -> None:
        connection: Any = self.connection
        connection.begin_if_due()


def _factory(base: Any, *, read_only: bool) -> Any:
    bases: tuple[type, ...] = (RepomSQLiteConnection,)
    if base is not None:
        bases += (base,)
    return type("RepomSQLiteConnection", bases, {"read_only": read_only})


def sqlite_connection(driver_connection: Any) -> RepomSQLiteConnection:
    """The sqlite3 connection, which aiosqlite wraps and SQLAlchemy's own dialect unwraps so."""
    return getattr(driver_connection, "_conn", driver_connection)  # type: ignore[no-any-return]


def _is_busy(error: Exception) -> bool:
    # The low byte: SQLITE_BUSY_RECOVERY and its like say the same, and why.
    return getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_BUSY


def _is_uri(url: URL) -> bool:
    return bool(asbool(url.query.get("uri", False)))


def _is_read_only(url: URL) -> bool:
    query = url.query
    return _is_uri(url) and (query.get("mode") == "ro" or query.get("immutable") in ("1", "true"))


def _path(url: URL) -> str:
    """The absolute path of the file, the same for all ways to name it; or of a memory database."""
    name = str(url.database)
    if url.query.get("vfs") == "memdb":
        return name
    return os.path.realpath(unquote(urlsplit(name).path) if _is_uri(url) else name)


def _cannot_open(path: str, why: object) -> str:
    return (
        f"cannot open the SQLite database {path}: {why}.\n"
        "Give the process write permission on the file and its folder (SQLite writes -wal and "
        "-shm files beside it), or name another place in DATABASE_URL."
    )
