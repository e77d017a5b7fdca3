"""What the two-phase transactions of a dialect need, to keep the two truths of COMMIT."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError

from repom.dialects.base import Support, aborted
from repom.dialects.mysql import MySQL

_INSTALLED = "repom_two_phase"
# In the `info` of a connection: PREPARE was sent, and has not succeeded.
_PREPARING = "repom.preparing"


def make_two_phase(dialect: Any, support: Callable[[], Support]) -> None:
    """Prepare the dialect of an engine for two-phase transactions, once.

    Raises:
        TwoPhaseUnavailableError: its driver cannot do them.
    """
    if not hasattr(dialect, _INSTALLED):
        of_dialect = support()
        of_dialect.check_two_phase()
        kind = _XA if isinstance(of_dialect, MySQL) else _TwoPhase
        setattr(dialect, _INSTALLED, kind(dialect, of_dialect))


class _TwoPhase:
    """Stands in for the two-phase methods of a dialect."""

    def __init__(self, dialect: Any, support: Support) -> None:
        self._support = support
        self._do_begin = dialect.do_begin_twophase
        self._do_prepare = dialect.do_prepare_twophase
        self._do_commit = dialect.do_commit_twophase
        self._do_rollback = dialect.do_rollback_twophase
        dialect.do_begin_twophase = self.begin
        dialect.do_prepare_twophase = self.prepare
        dialect.do_commit_twophase = self.commit
        dialect.do_rollback_twophase = self.rollback

    def begin(self, connection: Connection, xid: str) -> None:
        self._support.begins(connection.connection)
        self._do_begin(connection, xid)

    def prepare(self, connection: Connection, xid: str) -> None:
        # PostgreSQL answers PREPARE TRANSACTION as it answers COMMIT: with a silent rollback.
        if self._support.is_aborted(connection.connection):
            raise aborted()
        info = connection.connection.info
        info[_PREPARING] = True
        try:
            self._do_prepare(connection, xid)
            del info[_PREPARING]
        except Exception as error:
            unavailable = self._support.prepare_failed(error)
            if unavailable is None:
                raise
            raise unavailable from error

    def commit(
        self, connection: Connection, xid: str, is_prepared: bool = True, recover: bool = False
    ) -> None:
        self._support.commit(
            lambda _: self.do_commit(connection, xid, is_prepared), connection.connection
        )

    def do_commit(self, connection: Connection, xid: str, is_prepared: bool) -> None:
        self._do_commit(connection, xid, is_prepared)

    def rollback(
        self, connection: Connection, xid: str, is_prepared: bool = True, recover: bool = False
    ) -> None:
        if connection.connection.info.pop(_PREPARING, False):
            # psycopg takes it for prepared, and MySQL for ended. The server rolls it back.
            connection.invalidate()
        else:
            self.undo(connection, xid, is_prepared)

    def undo(self, connection: Connection, xid: str, is_prepared: bool) -> None:
        self._do_rollback(connection, xid, is_prepared)


class _XA(_TwoPhase):
    """MySQL and MariaDB."""

    def undo(self, connection: Connection, xid: str, is_prepared: bool) -> None:
        if not is_prepared:
            try:
                connection.execute(text("XA END :xid"), {"xid": xid})
            except DBAPIError:
                # A deadlock has ended it already.
                if connection.invalidated:
                    raise
        connection.execute(text("XA ROLLBACK :xid"), {"xid": xid})

    def do_commit(self, connection: Connection, xid: str, is_prepared: bool) -> None:
        one_phase = "" if is_prepared else " ONE PHASE"
        if not is_prepared:
            # SQLAlchemy would prepare it first, and leave it prepared if it got no further.
            connection.execute(text("XA END :xid"), {"xid": xid})
        connection.execute(text(f"XA COMMIT :xid{one_phase}"), {"xid": xid})
