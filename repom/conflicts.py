"""Which errors say no more than that somebody else was faster: the work may simply be done again.

By SQLSTATE or error number, never by class: what one driver calls OperationalError is a plain
DBAPIError in another.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable

from sqlalchemy.exc import DBAPIError

from repom.dialects.mysql import errno
from repom.dialects.postgresql import sqlstate
from repom.errors import TransactionAbortedError

Predicate = Callable[[BaseException], bool]

_SQLSTATES = frozenset(
    {
        # serialization_failure and deadlock_detected
        # (https://www.postgresql.org/docs/current/mvcc-serialization-failure-handling.html);
        # CockroachDB, YugabyteDB and Aurora DSQL answer every conflict with the first
        "40001",
        "40P01",
    }
)

#: Of InnoDB (https://dev.mysql.com/doc/refman/8.4/en/innodb-error-handling.html) and TiDB
#: (https://docs.pingcap.com/tidb/stable/error-codes).
_ERRNOS = frozenset(
    {
        1213,  # ER_LOCK_DEADLOCK; on Galera also a failed certification, at COMMIT
        1020,  # ER_CHECKREAD: the row has changed since the snapshot (MariaDB)
        8002,  # TiDB: SELECT FOR UPDATE met a write
        8022,  # TiDB: COMMIT failed and was rolled back, to be tried again
        8028,  # TiDB: the schema has changed meanwhile
        9007,  # TiDB: write conflict
    }
)
_LOCK_WAIT_TIMEOUT = 1205


def _postgresql(error: BaseException) -> bool:
    return sqlstate(error) in _SQLSTATES


def _mysql(error: BaseException) -> bool:
    return errno(error) in _ERRNOS


def _sqlite(error: BaseException) -> bool:
    # The low byte: SQLITE_BUSY_SNAPSHOT and its like say the same, and why.
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    return code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


#: By what the driver's exceptions are: each looks at what only its own drivers' have.
_PREDICATES: tuple[Predicate, ...] = (_postgresql, _mysql, _sqlite)


def is_conflict(error: BaseException) -> bool:
    """Whether `error` says that the transaction lost a conflict, and was rolled back for that.

    A `TransactionAbortedError` is one if the swallowed error behind it was. An unknown outcome
    never is: that transaction may have been committed.

    Args:
        error: what left the unit of work.
    """
    orig = _of_driver(error)
    return orig is not None and any(predicate(orig) for predicate in _PREDICATES)


def is_lock_timeout(error: BaseException) -> bool:
    """Whether MySQL gave up waiting for a lock (1205).

    Not a conflict by itself: it has undone one statement only, after a long wait. Who wants to
    repeat the work all the same gives `retry_on=lambda e: is_conflict(e) or is_lock_timeout(e)`.

    Args:
        error: what left the unit of work.
    """
    orig = _of_driver(error)
    return orig is not None and errno(orig) == _LOCK_WAIT_TIMEOUT


def _of_driver(error: BaseException) -> BaseException | None:
    """The driver's own exception behind `error`, if there is one."""
    if isinstance(error, TransactionAbortedError):
        cause = error.__cause__
        return _of_driver(cause) or cause if cause is not None else None
    return error.orig if isinstance(error, DBAPIError) else None
