"""asyncpg: BEGIN travels with the first statement, and costs no round trip of its own.

Nobody waits for the answer to BEGIN but the driver. So it is sent without a Sync of its own, and the
first statement right behind it, as libpq's pipeline mode does
(https://www.postgresql.org/docs/current/protocol-flow.html#PROTOCOL-FLOW-PIPELINING): should BEGIN
fail, then the server skips what follows up to the next Sync, so that no statement can run outside of
a transaction. asyncpg reads the answer to BEGIN as a part of the answer to the statement.

Only with a statement that this connection has prepared before: to prepare one is a round trip anyway,
and asyncpg expects another answer to it.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Generator
from typing import Any

from repom.errors import TransactionError


def pipeline_begin(dbapi_connection: Any) -> None:
    """Let the transactions of this connection of SQLAlchemy's asyncpg dialect begin so."""
    dbapi_connection.__class__ = _pipelining(type(dbapi_connection))


@functools.cache
def _pipelining(base: Any) -> Any:
    class PipeliningConnection(base):  # type: ignore[misc]
        __slots__ = ()

        def cursor(self, server_side: bool = False) -> Any:
            cursor = super().cursor(server_side=server_side)
            if not server_side:  # a portal of asyncpg's cannot begin with it
                cursor.__class__ = _pipelining_cursor(type(cursor))
            return cursor

        def begin_with(self, operation: str, prepared_since: float) -> bool:
            """Send BEGIN without waiting, if a transaction begins with this statement.

            Args:
                operation: what is executed next.
                prepared_since: since when it must have been prepared.

            Returns:
                Whether BEGIN was sent.
            """
            driver = self._connection
            if (
                self._transaction is not None
                or self.isolation_level == "autocommit"
                or self._prepared_statement_cache is None
                or self._execute_mutex.locked()
                or driver.is_closed()
                or driver.is_in_transaction()  # somebody has begun one by hand
            ):
                return False
            prepared = self._prepared_statement_cache.get(operation)
            if prepared is None or prepared[2] <= prepared_since:
                return False
            transaction = driver.transaction(
                isolation=self.isolation_level, readonly=self.readonly, deferrable=self.deferrable
            )
            _start(transaction, driver)
            self._begun(transaction)
            return True

        async def undo_begin(self) -> None:
            """After a statement that has not reached the server, or a BEGIN that has failed."""
            transaction = self._transaction
            self._begun(None)
            if not self._connection.is_closed():
                await transaction.rollback()

        def _begun(self, transaction: Any) -> None:
            self._transaction = transaction
            if hasattr(self, "_started"):  # SQLAlchemy 2.0
                self._started = transaction is not None

    return PipeliningConnection


@functools.cache
def _pipelining_cursor(base: Any) -> Any:
    class PipeliningCursor(base):  # type: ignore[misc]
        __slots__ = ()

        async def _prepare_and_execute(self, operation: str, parameters: Any) -> None:
            connection = self._adapt_connection
            if not connection.begin_with(operation, self._invalidate_schema_cache_asof):
                await super()._prepare_and_execute(operation, parameters)
                return
            try:
                await super()._prepare_and_execute(operation, parameters)
            except Exception:
                if not connection._connection.is_in_transaction():
                    await connection.undo_begin()
                raise
            if not connection._connection.is_in_transaction():
                raise TransactionError(
                    "the server did not begin a transaction, and has executed a statement outside "
                    "of one.\nIf a pooler stands before it, write pgbouncer=True."
                )

    return PipeliningCursor


def _start(transaction: Any, driver: Any) -> None:
    """Start asyncpg's transaction, and send what it would have sent; the answer comes later."""
    known = type(driver)
    driver.__class__ = _handing_over(known)
    try:
        start = transaction.start()
        driver._transport.write(_without_sync(start.send(None)))
        try:
            start.send("BEGIN")
        except StopIteration:
            return
    finally:
        driver.__class__ = known


@functools.cache
def _handing_over(base: Any) -> Any:
    class HandingOver(base):  # type: ignore[misc]
        __slots__ = ()

        def execute(self, query: str) -> Any:
            return _hand_over(query)

    return HandingOver


@types.coroutine
def _hand_over(query: str) -> Generator[str, str, str]:
    """Give `query` to who sends a coroutine its next value, which is the answer."""
    return (yield query)


@functools.cache
def _without_sync(query: str) -> bytes:
    """Parse, Bind and Execute of a query without parameters, by the unnamed statement and portal.

    See https://www.postgresql.org/docs/current/protocol-message-formats.html
    """
    parse = b"\0" + query.encode() + b"\0" + b"\0\0"
    bind = b"\0" + b"\0" + b"\0\0" * 3
    execute = b"\0" + b"\0\0\0\0"
    return b"".join(
        kind + (len(body) + 4).to_bytes(4, "big") + body
        for kind, body in ((b"P", parse), (b"B", bind), (b"E", execute))
    )
