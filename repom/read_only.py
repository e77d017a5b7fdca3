"""The sessions of a unit of work that only reads: whoever swallows a refused write is not believed.

Their connections are held read-only by the database itself, see `repom.dialects.read_only`.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import event
from sqlalchemy.orm import Session, SessionTransaction

from repom.dialects.read_only import READING, Reading
from repom.ending import Action
from repom.managed import ManagedSession, managed_class


class ReadOnlySession(ManagedSession):
    """A managed session on a connection that can only read."""

    repom_reads_only = True
    _repom_reading: Reading | None = None

    @property
    def repom_reading(self) -> Reading:
        """What is known of its unit of work."""
        if self._repom_reading is None:
            self._repom_reading = Reading(self.repom_label)
        return self._repom_reading

    def _for_real(self, how: Action) -> None:
        if how in ("flush", "commit"):
            self.repom_reading.check()
        super()._for_real(how)


_read_only: dict[type[Session], type[ManagedSession]] = {}


def read_only_class(base: type[Session]) -> type[ManagedSession]:
    """The twin of `managed_class` for units of work that only read."""
    found = _read_only.get(base)
    if found is None:
        made = type(f"ReadOnly{base.__name__}", (ReadOnlySession, managed_class(base)), {})
        found = _read_only.setdefault(base, made)
    return found


def _after_begin(session: Any, transaction: SessionTransaction, connection: Any) -> None:
    connection.info[READING] = session.repom_reading


def _after_transaction_end(session: Any, transaction: SessionTransaction) -> None:
    if transaction.parent is None:
        session.repom_reading.refused = None


event.listen(ReadOnlySession, "after_begin", _after_begin)
event.listen(ReadOnlySession, "after_transaction_end", _after_transaction_end)
