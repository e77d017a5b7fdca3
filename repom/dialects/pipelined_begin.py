"""asyncpg: BEGIN travels with the first statement, and costs no round trip of its own.

Nobody waits for the answer to BEGIN but the driver. So it is sent without a Sync of its own, and
the first statement right behind it, as libpq's pipeline mode does. Should BEGIN fail, the server
skips what follows up to the next Sync, so that no statement can run outside of a transaction
(https://www.postgresql.org/docs/current/protocol-flow.html#PROTOCOL-FLOW-PIPELINING). asyncpg
reads the answer to BEGIN as a part of the answer to the statement.

Only with a statement that this connection has prepared before: to prepare one is a round trip
anyway, and what the server says against it has to abort the transaction.
"""

from __future__ import annotations

import functools
from typing import Any

from repom.errors import TransactionError

#: The command tags of statements that end the transaction themselves.
_ENDS = frozenset({"COMMIT", "ROLLBACK", "PREPARE TRANSACTION"})

# Of asyncpg's connection and its protocol, beside what is public.
_OF_CONNECTION = ("_protocol", "_top_xact", "_transport")
_OF_PROTOCOL = ("_is_cancelling", "close_portal")


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

        async def _prepare_and_execute(self, operation: str, parameters: Any) -> None:
            cursor: Any = self
            connection = cursor._adapt_connection
            if (
                connection._transaction is None
                and connection.isolation_level != "autocommit"
                and connection._prepared_statement_cache
            ):
                since = cursor._invalidate_schema_cache_asof
                cursor._adapt_connection = _Beginning(connection, operation, since)
            try:
                await super()._prepare_and_execute(operation, parameters)
            finally:
                cursor._adapt_connection = connection  # what it executes next begins nothing

    return PipeliningCursor


class _Beginning:
    """What a cursor takes for its connection, and for its statement, to begin a transaction.

    The cursor calls all of it while it holds the connection's mutex.

    Args:
        connection: SQLAlchemy's.
        operation: the statement.
        since: a statement that was prepared before that time is prepared again.
    """

    _started = False  # for SQLAlchemy 2.0
    _transaction = None  # and for 2.1
    _statement: Any = None

    def __init__(self, connection: Any, operation: str, since: float) -> None:
        self._known = connection
        self._driver = connection._connection
        self._execute_mutex = connection._execute_mutex
        self._operation = operation
        self._since = since

    def __getattr__(self, name: str) -> Any:
        return getattr(self._known, name)

    async def _start_transaction(self) -> None:
        prepared = self._known._prepared_statement_cache.get(self._operation)
        if prepared is not None and prepared[2] > self._since:
            self._statement = prepared[0]
        else:
            await self._known._start_transaction()

    async def _prepare(self, operation: str, since: float) -> tuple[Any, Any]:
        statement, attributes = await self._known._prepare(operation, since)
        return (statement if self._statement is None else self), attributes

    def get_statusmsg(self) -> Any:
        return self._statement.get_statusmsg()

    async def fetch(self, *parameters: Any) -> Any:
        """Execute the statement, with BEGIN before it."""
        driver, statement = self._driver, self._statement
        if not self._can_send():
            await self._known._start_transaction()
            return await statement.fetch(*parameters)
        begin = self._send_begin()
        try:
            rows = await statement.fetch(*parameters)
        except BaseException as error:
            if not begin.is_written:  # nor is the statement
                begin.take_back()
                self._begun(None)
            # After the others SQLAlchemy gives up the connection.
            if isinstance(error, Exception) and not isinstance(error, TimeoutError):
                await self._settle()
            raise
        if not (
            driver.is_closed() or driver.is_in_transaction() or statement.get_statusmsg() in _ENDS
        ):
            self._begun(None)
            raise TransactionError(
                "the server did not begin a transaction, and has executed a statement outside "
                "of one.\nIf a pooler stands before it, write pgbouncer=True."
            )
        return rows

    def _can_send(self) -> bool:
        """Whether the statement can follow at once, and nobody has begun a transaction by hand."""
        driver = self._driver
        return not (
            driver._top_xact is not None
            or driver.is_closed()
            or driver._protocol.is_in_transaction()
            or driver._protocol._is_cancelling()
        )

    def _send_begin(self) -> _BeforeTheNext:
        known, driver = self._known, self._driver
        options = known.isolation_level, known.readonly, known.deferrable
        transaction = driver.transaction(
            isolation=options[0], readonly=options[1], deferrable=options[2]
        )
        transaction._state = type(transaction._state).STARTED
        self._begun(transaction)
        return _BeforeTheNext(driver._transport, _begin(*options))

    async def _settle(self) -> None:
        """Be in the transaction that the statement would have failed in.

        If it has not told, it was not sent behind BEGIN, so that there was no Sync yet, or BEGIN
        has failed. What is asked here is nothing; the Sync behind it counts.
        """
        driver = self._driver
        if driver.is_closed() or driver.is_in_transaction():
            return
        if self._known._transaction is None:  # neither has left
            await self._known._start_transaction()
            return
        try:
            await driver._protocol.close_portal("", None)
        except BaseException:  # so that nobody knows what is open on it, and unread
            driver.terminate()
            raise
        if not driver.is_in_transaction():
            self._begun(None)

    def _begun(self, transaction: Any) -> None:
        self._driver._top_xact = self._known._transaction = transaction
        if hasattr(self._known, "_started"):  # SQLAlchemy 2.0
            self._known._started = transaction is not None


class _BeforeTheNext:
    """`data` that is written in one packet with what is written next.

    Attributes:
        is_written: whether it was. Transports of uvloop, which send all that a turn of the loop
            writes at once, let nothing come between, so there it is from the beginning.
    """

    __slots__ = ("_data", "_transport", "is_written")

    def __init__(self, transport: Any, data: bytes) -> None:
        self._transport = transport
        self._data = data
        self.is_written = False
        try:
            transport.write = self._write_both
        except AttributeError:
            self.is_written = True
            transport.write(data)

    def _write_both(self, more: bytes | memoryview) -> None:
        self.take_back()
        self.is_written = True
        self._transport.write(b"".join((self._data, more)))

    def take_back(self) -> None:
        """Do not write it."""
        del self._transport.write


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
