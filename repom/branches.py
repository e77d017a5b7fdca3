"""The branches of one unit of work: its two-phase transactions, one on each database."""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Engine, TwoPhaseTransaction

from repom.database import Database
from repom.dialects.two_phase import make_two_phase
from repom.ending import P
from repom.errors import TransactionError, TwoPhaseUnavailableError
from repom.registry import Databases
from repom.transaction_ids import DECIDER, TransactionId, fingerprint, new_unit


@dataclass(eq=False)
class _Branch:
    id: TransactionId
    session: Any
    transaction: TwoPhaseTransaction | None = None  # while it begins

    @property
    def has_ended(self) -> bool:
        return self.transaction is not None and not self.transaction.is_active


class Branches:
    """Gives the transactions of a unit of work their ids, when they begin.

    Which databases take part is known only at its end. So the branch that was begun first
    decides, and the ids tell which databases may have the others.

    Args:
        databases: those that may take part.
    """

    def __init__(self, databases: Databases) -> None:
        self._databases = databases
        self._open: list[_Branch] = []
        self._begun = 0
        self._unit = self._known = ""
        self._mutex = threading.Lock()  # threads of one request may begin at the same time

    @property
    def unit(self) -> str:
        """The unit of the ids given last."""
        return self._unit

    def take_part(self, session: Any, database: Database) -> None:
        """Let the transactions of `session` be branches.

        Args:
            session: bound to an engine of its database.
            database: that one.

        Raises:
            TwoPhaseUnavailableError: the driver cannot prepare transactions, or the database
                has no name, by which recovery would know of it.
        """
        known = self._databases.known()
        if database not in known:
            raise _has_no_name(database)
        self._known = fingerprint(it.url for it in known)
        bind = session.bind
        make_two_phase(
            bind.dialect, database.async_support if bind.dialect.is_async else database.sync_support
        )
        engine: Any = bind.execution_options()
        engine._connection_cls = functools.partial(_BranchConnection, self, session)
        session.bind = engine
        session.twophase = True

    def order(self, parties: Sequence[P]) -> list[P]:
        """The parties that have a branch, the one that decides first.

        Raises:
            TransactionError: that one has been ended before, by its own.
        """
        branches = {id(branch.session): branch.id.branch for branch in self._still_open()}
        by_number = {
            branches[session]: party
            for party in parties
            if (session := id(getattr(party, "sync_session", None))) in branches
        }
        if len(by_number) > 1 and DECIDER not in by_number:
            raise TransactionError(
                "the transaction with which this two-phase unit of work began was ended before "
                "the others, by `session.rollback()` or `commit()`: recovery could not tell how "
                "the others are to end.\n"
                "Undo a part by `async with atomic():`, which rolls back to a savepoint."
            )
        return [by_number[number] for number in sorted(by_number)]

    def begin(self, session: Any) -> _Branch:
        """The next branch, which begins now."""
        with self._mutex:
            if not self._still_open():
                self._unit, self._begun = new_unit(), 0
            branch = _Branch(TransactionId(self._unit, self._begun, self._known), session)
            self._open.append(branch)
            self._begun += 1
            return branch

    def not_begun(self, branch: _Branch) -> None:
        """It could not begin."""
        with self._mutex:
            self._open.remove(branch)

    def _still_open(self) -> list[_Branch]:
        self._open = [branch for branch in self._open if not branch.has_ended]
        return self._open


class _BranchConnection(Connection):
    """Begins two-phase transactions under the ids of their unit of work."""

    def __init__(self, branches: Branches, session: Any, engine: Engine) -> None:
        super().__init__(engine)
        self._repom_branches = branches
        self._repom_for = session

    def begin_twophase(self, xid: Any = None) -> TwoPhaseTransaction:
        branch = self._repom_branches.begin(self._repom_for)
        try:
            branch.transaction = super().begin_twophase(str(branch.id))
        except BaseException:
            self._repom_branches.not_begun(branch)
            raise
        return branch.transaction


def _has_no_name(database: Database) -> TwoPhaseUnavailableError:
    return TwoPhaseUnavailableError(
        f"two_phase=True: {database!r} has no name, and after a crash "
        "`python -m repom.recovery` would not know of it.\n"
        "Name it in RepomConfig.databases, or in the mapping given to DatabaseSessionMiddleware."
    )
