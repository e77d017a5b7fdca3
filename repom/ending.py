"""How the transactions of one scope end: which step follows which, and what a failure means.

The steps are generators that do no IO. They yield what is to be done, and are sent its
failure; `perform` and `perform_sync` do it. So sync and async scopes end by the same rules.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Sequence
from typing import Literal, NamedTuple, Protocol, TypeVar

from repom.errors import CommitOutcomeUnknown, PartialCommitError

logger = logging.getLogger("repom")

Action = Literal["flush", "prepare", "commit", "rollback", "invalidate", "close"]


class Party(Protocol):
    """One session of a scope, as the steps see it."""

    @property
    def name(self) -> str:
        """The name of its database, for messages."""
        ...

    @property
    def has_changes(self) -> bool:
        """Whether there is anything to flush."""
        ...


P = TypeVar("P", bound=Party)


class Step(NamedTuple):
    party: Party
    action: Action


Steps = Generator[Step, None, None]


def commit_steps(parties: Sequence[Party]) -> Steps:
    """Commit all, or roll back all that can still be rolled back.

    Args:
        parties: those with an open transaction, in the order in which they commit.

    Raises:
        PartialCommitError: a COMMIT failed when another had succeeded.
        BaseException: what a flush or the first COMMIT raised.
    """
    committed: list[Party] = []
    try:
        # What can fail is made to fail before the first COMMIT, and a time limit that is over
        # before COMMIT leaves no doubt about the outcome.
        for party in parties:
            if party.has_changes:
                yield Step(party, "flush")
        for party in parties:
            yield Step(party, "commit")
            committed.append(party)
    except GeneratorExit:
        raise  # the event loop is gone, and with it whoever could do another step
    except BaseException as error:
        remaining = parties[len(committed) :]
        yield from rollback_steps(remaining)
        if committed:
            partial = _partial(committed, remaining, error)
            if isinstance(error, Exception):
                raise partial from error
            error.add_note(str(partial))  # Ctrl-C stays what it is
        raise


def rollback_steps(parties: Sequence[Party]) -> Steps:
    """Roll all back. A failure is logged: it does not keep the others from being rolled back.

    The database rolls back by itself what has lost its connection.
    """
    for party in parties:
        try:
            yield Step(party, "rollback")
        except Exception:
            logger.warning(
                "ROLLBACK failed on database %r. Its connection was thrown away, and the "
                "database undoes the transaction by itself.",
                party.name,
                exc_info=True,
            )


def close_steps(parties: Sequence[Party]) -> Steps:
    """Close all; a failure is logged and does not keep the others open."""
    for party in parties:
        try:
            yield Step(party, "close")
        except Exception:
            logger.warning("closing the session of %r failed", party.name, exc_info=True)


def _partial(
    committed: Sequence[Party], remaining: Sequence[Party], error: BaseException
) -> PartialCommitError:
    failed, *rolled_back = [party.name for party in remaining]
    done = [party.name for party in committed]
    how = "its COMMIT failed"
    if isinstance(error, CommitOutcomeUnknown):
        how = "whether its COMMIT succeeded is not known"
    return PartialCommitError(
        f"committed on {', '.join(done)}, but not on {failed}: {how}"
        + (f"; rolled back on {', '.join(rolled_back)}" if rolled_back else "")
        + ".\nThe databases may now disagree; the COMMIT error is the __cause__.",
        committed=done,
        failed=failed,
        rolled_back=rolled_back,
    )
