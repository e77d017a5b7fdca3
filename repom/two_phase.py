"""How a unit of work ends on several databases at once: all commit, or none.

As in `repom.ending` the steps do no IO. What they keep true is what recovery
(`repom.in_doubt`) goes by after a crash:

* The branch that decides is prepared before any other. So where one is prepared and the
  deciding one is not, that one has been committed, and so must the others.
* It is rolled back only when no other branch is, or may be, prepared.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Protocol

from sqlalchemy.exc import DBAPIError

from repom.ending import P, Party, Step, Steps, commit_steps, rollback_steps
from repom.errors import (
    CommitOutcomeUnknown,
    CommitPendingError,
    TransactionAbortedError,
    TwoPhaseUnavailableError,
)

logger = logging.getLogger("repom")

_RECOVER = "`python -m repom.recovery` shows what is left, and ends it"


class Order(Protocol):
    """What the steps ask the branches of their unit of work."""

    @property
    def unit(self) -> str: ...
    def order(self, parties: Sequence[P]) -> list[P]: ...


def two_phase_steps(parties: Sequence[Party], branches: Order) -> Steps:
    """Commit all, or roll back all.

    Args:
        parties: those with an open transaction.
        branches: which of them take part, and in which order.

    Raises:
        CommitOutcomeUnknown: it was decided to commit, and whether the database that keeps the
            decision has heard that is not known.
        CommitPendingError: a database has not confirmed what is decided.
        BaseException: what a flush or a PREPARE raised; nothing is committed.
    """
    in_order: list[Party] = []
    prepared = 0
    try:
        for party in parties:
            if party.has_changes:
                yield Step(party, "flush")
        in_order = branches.order(parties)  # a flush may have begun one
        if len(in_order) > 1:
            for party in in_order:
                yield Step(party, "prepare")
                prepared += 1
    except GeneratorExit:
        raise  # the event loop is gone, and with it whoever could do another step
    except BaseException as error:
        others = [party for party in parties if party not in in_order]
        yield from rollback_steps(others)
        yield from _undo(in_order, prepared, error, branches)
        raise
    if not prepared:
        yield from commit_steps(parties)  # one branch at most
        return
    yield from _commit_prepared(in_order, branches)
    # They have asked nothing of their databases.
    yield from commit_steps([party for party in parties if party not in in_order])


def _undo(in_order: Sequence[Party], prepared: int, error: BaseException, branches: Order) -> Steps:
    """Roll back what a failed PREPARE, of the one after those `prepared`, leaves."""
    is_doubtful = bool(in_order) and _may_be_prepared(error)
    for number, party in reversed([*enumerate(in_order)][1:]):
        try:
            yield Step(party, "rollback")
        except Exception:
            is_doubtful |= number < prepared
            logger.warning("ROLLBACK failed on database %r.", party.name, exc_info=True)
    for decider in in_order[:1]:
        if is_doubtful:
            logger.error(
                "unit of work %s was not committed, but a part of it may be left prepared, and "
                "that on %r is left so on purpose, which says that nothing was committed.\n%s.",
                branches.unit,
                decider.name,
                _RECOVER,
            )
            yield from _leave_prepared([decider])
        else:
            yield from rollback_steps([decider])


def _commit_prepared(in_order: Sequence[Party], branches: Order) -> Steps:
    """Commit what is prepared on all."""
    decider, *others = in_order
    committed: list[Party] = []
    pending: dict[str, Exception] = {}
    try:
        try:
            yield Step(decider, "commit")
        except Exception as error:
            raise _undecided(in_order, branches) from error
        committed.append(decider)
        for party in others:
            try:
                yield Step(party, "commit")
                committed.append(party)
            except Exception as error:
                pending[party.name] = error
    except GeneratorExit:
        raise
    except BaseException:
        # Not to be rolled back by whoever closes their sessions.
        yield from _leave_prepared([party for party in in_order if party not in committed])
        raise
    if pending:
        yield from _leave_prepared([party for party in others if party not in committed])
        done = [party.name for party in committed]
        raise _pending(done, list(pending), branches) from next(iter(pending.values()))


def _leave_prepared(parties: Sequence[Party]) -> Steps:
    """Let go of connections whose transactions are to stay as they are."""
    for party in parties:
        try:
            yield Step(party, "invalidate")
        except Exception:
            logger.warning("invalidating the session of %r failed", party.name, exc_info=True)


def _may_be_prepared(error: BaseException) -> bool:
    """Whether a PREPARE that has raised this may have happened all the same."""
    if isinstance(error, DBAPIError):
        return error.connection_invalidated
    return not isinstance(error, (TransactionAbortedError, TwoPhaseUnavailableError))


def _undecided(in_order: Sequence[Party], branches: Order) -> CommitOutcomeUnknown:
    names = ", ".join(party.name for party in in_order)
    return CommitOutcomeUnknown(
        f"unit of work {branches.unit} is prepared on {names}, and whether the COMMIT on "
        f"{in_order[0].name}, which decides, has happened is not known (see the __cause__).\n"
        f"{_RECOVER}."
    )


def _pending(committed: list[str], pending: list[str], branches: Order) -> CommitPendingError:
    return CommitPendingError(
        f"unit of work {branches.unit} is committed, on {', '.join(committed)}, but not yet on "
        f"{', '.join(pending)}, which keeps its part prepared, with its locks; the error is the "
        f"__cause__.\n{_RECOVER}.",
        committed=committed,
        pending=pending,
        unit=branches.unit,
    )
