"""What a server tells of its replication, and how it is asked."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

from sqlalchemy import URL
from sqlalchemy.util import await_only, greenlet_spawn

if TYPE_CHECKING:
    from repom.database import Database

#: Seconds that an answer may take, in async code. Sync code waits as long as its driver does.
ANSWER_WITHIN = 2.0


class Replication(NamedTuple):
    """The questions for positions in the writer's log, which are numbers that only grow.

    Attributes:
        written: asked of the writer: behind all that was committed before.
        flushed: asked of the writer: what replicas can have by now.
        replayed: asked of a reader: what it has.
    """

    written: str
    flushed: str
    replayed: str


# https://www.postgresql.org/docs/current/functions-admin.html#FUNCTIONS-ADMIN-BACKUP
# With `synchronous_commit = off` what was committed may be inserted and not flushed yet.
_POSTGRESQL = Replication(
    written="SELECT (pg_current_wal_insert_lsn() - '0/0')::bigint",
    flushed="SELECT (pg_current_wal_flush_lsn() - '0/0')::bigint",
    # One that was promoted has what it writes.
    replayed=(
        "SELECT ((CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn()"
        " ELSE pg_current_wal_insert_lsn() END) - '0/0')::bigint"
    ),
)

#: For servers that do not tell: whether they answer at all.
ALIVE = "SELECT 1"


def replication_of(url: URL) -> Replication | None:
    """The questions for the database of `url`; None if it does not tell."""
    return _POSTGRESQL if url.get_backend_name() == "postgresql" else None


def ask(database: Database[Any, Any], question: str, *, is_async: bool) -> Any:
    """The answer to `question`, which is one value.

    Args:
        database: asked on a connection that only reads.
        is_async: whether by its async driver, inside of a greenlet.

    Raises:
        Exception: there is none.
    """
    if is_async:
        return await_only(ask_async(database, question))
    with database.engine_for_reading(is_async=False).connect() as connection:
        return connection.exec_driver_sql(question).scalar()


async def ask_async(database: Database[Any, Any], question: str) -> Any:
    """The same, from a coroutine."""
    async with asyncio.timeout(ANSWER_WITHIN):
        return await greenlet_spawn(_ask_in_greenlet, database, question)


def _ask_in_greenlet(database: Database[Any, Any], question: str) -> Any:
    with database.engine_for_reading(is_async=True).connect() as connection:
        return connection.exec_driver_sql(question).scalar()


def wait_for_cluster(dbapi_connection: Any) -> bool:
    """Let each statement of a connection to Galera wait for what the cluster has committed.

    Returns:
        Whether it is one (https://mariadb.com/kb/en/galera-cluster-system-variables/#wsrep_sync_wait).
    """
    cursor = dbapi_connection.cursor()
    try:
        cursor.execute("SHOW VARIABLES LIKE 'wsrep_on'")
        found: Iterable[Any] | None = cursor.fetchone()
        if found is None or "ON" not in found:
            return False
        cursor.execute("SET SESSION wsrep_sync_wait = 1")
        return True
    finally:
        cursor.close()
