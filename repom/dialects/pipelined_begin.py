"""asyncpg: BEGIN travels with the first statement, and costs no round trip of its own.

Nobody waits for the answer to BEGIN but the driver. So it is sent without a Sync of its own, and
the first statement right behind it, as libpq's pipeline mode does. Should BEGIN fail, the server
skips what follows up to the next Sync, so that no statement can run outside of a transaction
(https://www.postgresql.org/docs/current/protocol-flow.html#PROTOCOL-FLOW-PIPELINING). asyncpg
reads the answer to BEGIN as a part of the answer to the statement.

Only with a statement that this connection has prepared before: to prepare one is a round trip
anyway, and what the server says against it has to abort the transaction.

A transaction that has begun so also commits in fewer steps.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Coroutine
from types import FunctionType
from typing import Any

from repom.dialects.base import aborted
from repom.errors import TransactionError

#: The command tags of statements that end the transaction themselves.
_ENDS = frozenset({"COMMIT", "ROLLBACK", "PREPARE TRANSACTION"})

# Of asyncpg's connection and its protocol, beside what is public.
_OF_CONNECTION = ("_protocol", "_query_loggers", "_top_xact", "_transport")
_OF_PROTOCOL = ("_is_cancelling", "close_portal", "query")


def pipeline_begin(dbapi_connection: Any) -> None:
    """Let the transactions of this connection of SQLAlchemy's asyncpg dialect begin so.

    If it is asyncpg's own, and not one of its pool's for instance, which stands before it.
    """
    driver = dbapi_connection.driver_connection
    if (
        issubclass(type(driver), dbapi_connection.dbapi.asyncpg.Connection)
        and all(hasattr(driver, name) for name in _OF_CONNECTION)
        and all(hasattr(driver._protocol, name) for name in _OF_PROTOCOL)
    ):
        known: Any = type(dbapi_connection)
        dbapi_connection.__class__ = _pipelining(known)


@functools.cache
def _pipelining(base: Any) -> Any:
    class PipeliningConnection(base):  # type: ignore[misc]
        __slots__ = ()

        def cursor(self, server_side: bool = False) -> Any:
            cursor = super().cursor(server_side=server_side)
            if not server_side:  # whose statement is prepared, and asks for more by itself
                cursor.__class__ = _pipelining_cursor(cursor.__class__)
            return cursor

    return PipeliningConnection


@functools.cache
def _pipelining_cursor(base: Any) -> Any:
    class PipeliningCursor(base):  # type: ignore[misc]
        __slots__ = ()

        def _prepare_and_execute(
            self, operation: str, parameters: Any
        ) -> Coroutine[Any, Any, None]:
            cursor: Any = self
            execute = super()._prepare_and_execute
            connection = cursor._adapt_connection
            if connection._transaction is None and connection.isolation_level != "autocommit":
                since = cursor._invalidate_schema_cache_asof
                return _begin_and_execute(connection, since, execute, operation, parameters)
            return execute(operation, parameters)  # type: ignore[no-any-return]

    return PipeliningCursor


async def _begin_and_execute(
    adapted: Any,
    since: float,
    execute: Callable[..., Coroutine[Any, Any, None]],
    operation: str,
    parameters: Any,
) -> None:
    """Execute the first statement of a transaction.

    Args:
        adapted: SQLAlchemy's connection, which adapts the driver's.
        since: a statement that was prepared before that time is prepared again.
        execute: what SQLAlchemy's cursor does. It begins the transaction, if none has begun.
        operation: the statement.
        parameters: of the statement.
    """
    statement = _ready(adapted, operation, since)
    if statement is None:
        await execute(operation, parameters)
        return
    driver = adapted._connection
    _send_begin(adapted)
    try:
        await execute(operation, parameters)
    except BaseException as error:
        if _take_back(driver._transport):  # so that the statement was not written either
            _begun(adapted, None)
        # After the others SQLAlchemy gives up the connection.
        if isinstance(error, Exception) and not isinstance(error, TimeoutError):
            await _settle(adapted)
        raise
    if not (driver.is_closed() or driver.is_in_transaction() or statement.get_statusmsg() in _ENDS):
        _begun(adapted, None)
        raise TransactionError(
            "the server did not begin a transaction, and has executed a statement outside "
            "of one.\nIf a pooler stands before it, write pgbouncer=True."
        )


def _ready(adapted: Any, operation: str, since: float) -> Any:
    """The prepared statement, if it will be executed as it is, and at once.

    Not if somebody has begun a transaction by hand.
    """
    driver, cache = adapted._connection, adapted._prepared_statement_cache
    prepared = cache.get(operation) if cache else None
    if (
        prepared is None
        or not prepared[2] > since
        or adapted._invalidate_schema_cache_asof < since
        or adapted._transaction is not None  # begun since this was called
        or adapted._execute_mutex.locked()
        or driver._top_xact is not None
        or driver.is_closed()
    ):
        return None
    protocol = driver._protocol
    return None if protocol.is_in_transaction() or protocol._is_cancelling() else prepared[0]


def _send_begin(adapted: Any) -> None:
    driver = adapted._connection
    options = adapted.isolation_level, adapted.readonly, adapted.deferrable
    connection_class: Any = type(driver)
    transaction = _begun_class(adapted.dbapi.asyncpg.transaction.Transaction, connection_class)
    _begun(adapted, transaction(driver, *options))
    _write_before_the_next(driver._transport, _begin(*options))


def _begun(adapted: Any, transaction: Any) -> None:
    adapted._connection._top_xact = adapted._transaction = transaction
    if hasattr(adapted, "_started"):  # SQLAlchemy 2.0
        adapted._started = transaction is not None


async def _settle(adapted: Any) -> None:
    """Be in the transaction that the statement would have failed in.

    If it has not told, it was not sent behind BEGIN, so that there was no Sync yet, or BEGIN
    has failed. What is asked here is nothing; the Sync behind it counts.
    """
    driver = adapted._connection
    if driver.is_closed() or driver.is_in_transaction():
        return
    # Who waits for the mutex comes first, and begins a transaction, since we say there is none.
    transaction = adapted._transaction
    _begun(adapted, None)
    async with adapted._execute_mutex:
        if transaction is None:  # neither has left
            if adapted._transaction is None:
                await adapted._start_transaction()
            return
        try:
            await driver._protocol.close_portal("", None)
        except BaseException as error:  # so that nobody knows what is open on it, and unread
            driver.terminate()
            if isinstance(error, Exception):
                adapted._handle_exception(error)  # which raises SQLAlchemy's
            raise
        if driver.is_in_transaction() and adapted._transaction is None:
            _begun(adapted, transaction)


def refuse_rollback(tag: str) -> None:
    """Raise if that is the server's answer to COMMIT: the transaction was aborted."""
    if tag == "ROLLBACK":
        raise aborted()


@functools.cache
def _begun_class(base: Any, connection_class: Any) -> Any:
    """asyncpg's transaction as one that has begun, and whose COMMIT is one coroutine, not four.

    Each of them would lie on the stack, and take memory, while the database commits. But what the
    application or its tracing puts in place of `Connection.execute()` gets COMMIT, too.
    """
    states = sys.modules[base.__module__].TransactionState
    STARTED, COMMITTED, FAILED = states.STARTED, states.COMMITTED, states.FAILED  # noqa: N806
    below = connection_class.__bases__[0]  # below our own class
    own = below.execute if _is_asyncpgs_own(below.execute) else None

    class BegunTransaction(base):  # type: ignore[misc]
        __slots__ = ()

        def __init__(self, driver: Any, *options: Any) -> None:
            super().__init__(driver, *options)
            self._state = STARTED  # type: ignore[misc]

        async def commit(self) -> None:
            driver: Any = self._connection
            if (
                below.execute is not own
                or self._state is not STARTED
                or driver._top_xact is not self
                or driver._query_loggers
                or driver.is_closed()
            ):
                await super().commit()
                return
            driver._top_xact = None
            try:
                refuse_rollback(await driver._protocol.query("COMMIT;", None))
            except BaseException:
                self._state = FAILED
                raise
            self._state = COMMITTED

    return BegunTransaction


def _is_asyncpgs_own(method: Any) -> bool:
    return (
        isinstance(method, FunctionType)
        and method.__module__ == "asyncpg.connection"
        and not hasattr(method, "__wrapped__")
    )


def _write_before_the_next(transport: Any, data: bytes) -> None:
    """Write `data` in one packet with what is written next.

    Or at once on a transport of uvloop's, which sends all that a turn of the loop writes in one,
    and lets nothing come between.
    """

    def write(more: bytes | memoryview) -> None:
        del transport.write
        transport.write(b"".join((data, more)))

    try:
        transport.write = write
    except AttributeError:
        transport.write(data)


def _take_back(transport: Any) -> bool:
    """Do not write it; False if that has happened."""
    try:
        del transport.write
    except AttributeError:
        return False
    return True


@functools.cache
def _begin(isolation: str | None, readonly: bool, deferrable: bool) -> bytes:
    """The BEGIN that asyncpg would send, as Parse, Bind and Execute.

    See https://www.postgresql.org/docs/current/protocol-message-formats.html
    """
    query = "BEGIN"
    if isolation:
        query += " ISOLATION LEVEL " + isolation.replace("_", " ").upper()
    if readonly:
        query += " READ ONLY"
    if deferrable:
        query += " DEFERRABLE"
    # The statement and the portal without a name; nothing is said of any types and formats.
    parse = b"\0" + query.encode() + b";\0" + b"\0\0"
    bind = b"\0" + b"\0" + b"\0\0" * 3
    execute = b"\0" + b"\0\0\0\0"
    return b"".join(
        kind + (len(body) + 4).to_bytes(4, "big") + body
        for kind, body in ((b"P", parse), (b"B", bind), (b"E", execute))
    )
