"""Which errors are conflicts: real ones, of real drivers; and those that only look like them."""

import sqlite3
from typing import Any

import pytest
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError

from repom.conflicts import is_conflict, is_lock_timeout
from repom.errors import CommitOutcomeUnknown, PartialCommitError, TransactionAbortedError


class DriverError(Exception):
    """An exception of a driver, with what repom looks at."""

    def __init__(self, *args: object, **attributes: Any) -> None:
        super().__init__(*args)
        self.__dict__.update(attributes)


def wrapped(orig: Exception, kind: type[DBAPIError] = DBAPIError) -> DBAPIError:
    """As SQLAlchemy raises it."""
    return kind("UPDATE ...", {}, orig)


def busy(code: int) -> sqlite3.OperationalError:
    error = sqlite3.OperationalError("database is locked")
    error.sqlite_errorcode = code
    return error


@pytest.mark.parametrize(
    "orig",
    [
        DriverError("could not serialize access", sqlstate="40001"),
        DriverError("deadlock detected", pgcode="40P01"),
        DriverError(1213, "Deadlock found"),
        DriverError(1020, "Record has changed since last read"),
        DriverError(9007, "Write conflict"),
        busy(sqlite3.SQLITE_BUSY),
        busy(sqlite3.SQLITE_BUSY_SNAPSHOT),
        busy(sqlite3.SQLITE_LOCKED),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", [DBAPIError, OperationalError, IntegrityError])
def test_conflict_is_known_by_its_number(orig: Exception, kind: type[DBAPIError]) -> None:
    """Whatever class the driver, and so SQLAlchemy, gives it."""
    assert is_conflict(wrapped(orig, kind))


@pytest.mark.parametrize(
    "error",
    [
        wrapped(DriverError("duplicate key", sqlstate="23505")),
        wrapped(DriverError(1062, "Duplicate entry")),
        wrapped(DriverError(2013, "Lost connection during query")),
        wrapped(busy(sqlite3.SQLITE_CONSTRAINT)),
        wrapped(DriverError()),
        # numbers that are no error numbers
        KeyError(1213),
        DriverError("of the application", sqlstate="40001"),
        DBAPIError("SELECT", {}, None),  # type: ignore[arg-type]
    ],
    ids=repr,
)
def test_other_errors_are_no_conflicts(error: Exception) -> None:
    assert not is_conflict(error)


def test_swallowed_conflict_is_one() -> None:
    """The database has rolled everything back for it, so everything can be done again."""
    error = TransactionAbortedError("aborted")
    assert not is_conflict(error)
    error.__cause__ = DriverError(1213, "Deadlock found")
    assert is_conflict(error)
    error.__cause__ = wrapped(DriverError("x", sqlstate="40001"))
    assert is_conflict(error)
    error.__cause__ = DriverError("x", sqlstate="23505")
    assert not is_conflict(error)


@pytest.mark.parametrize(
    "error",
    [
        CommitOutcomeUnknown("unknown"),
        PartialCommitError("half", committed=["a"], failed="b", rolled_back=[]),
    ],
    ids=repr,
)
def test_what_may_have_been_committed_is_never_repeated(error: Exception) -> None:
    """Although a conflict was behind it."""
    error.__cause__ = wrapped(DriverError("x", sqlstate="40001"))
    assert not is_conflict(error)


def test_lock_timeout_is_for_those_who_ask_for_it() -> None:
    error = wrapped(DriverError(1205, "Lock wait timeout exceeded"))
    assert is_lock_timeout(error)
    assert not is_conflict(error)
    assert not is_lock_timeout(KeyError(1205))
