"""What a server tells of its replication."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from sqlalchemy import URL


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
        " ELSE pg_current_wal_flush_lsn() END) - '0/0')::bigint"
    ),
)

#: For databases whose servers do not tell.
IS_THERE = "SELECT 1"


def replication_of(url: URL) -> Replication | None:
    """The questions for the database of `url`; None if it does not tell."""
    return _POSTGRESQL if url.get_backend_name() == "postgresql" else None


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
