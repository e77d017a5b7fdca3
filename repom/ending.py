"""How the transactions of one scope end: which step follows which, and what a failure means.

The steps are generators that do no IO. They yield what is to be done, and are sent its
failure; `perform` and `perform_sync` do it. So sync and async scopes end by the same rules.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Sequence
from typing import Literal, NamedTuple, Protocol, TypeVar

from repom.errors import PartialCommitError

logger = logging.getLogger("repom")

Action = Literal["flush", "commit", "rollback", "close"]


class Party(Protocol):
    """One session of a scope, as the steps see it."""

    @property
    def name(self) -> str:
        """The name of its database, for messages."""


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
        # With several databases, what can fail is made to fail before the first COMMIT.
        if len(parties) > 1:
            for party in parties:
                yield Step(party, "flush")
        for party in parties:
            yield Step(party, "commit")
            committed.append(party)
    except BaseException as error:
        remaining = [party for party in parties if party not in committed]
        yield from rollback_steps(remaining)
        if committed:
            raise _partial(committed, remaining) from error
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


def _partial(committed: list[Party], remaining: list[Party]) -> PartialCommitError:
    failed, *rolled_back = [party.name for party in remaining]
    done = [party.name for party in committed]
    return PartialCommitError(
        f"committed on {', '.join(done)}, but not on {failed}: its COMMIT failed"
        + (f"; rolled back on {', '.join(rolled_back)}" if rolled_back else "")
        + ".\nThe databases now disagree; the COMMIT error is the __cause__.",
        committed=done,
        failed=failed,
        rolled_back=rolled_back,
    )
