"""What a crash has left prepared, and which end that has.

Pure functions. The rule rests on the order in which `repom.two_phase` prepares, commits and rolls
back: of the branches of a unit of work, the one that decides comes first, and is undone last.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from repom.transaction_ids import DECIDER, TransactionId

Verdict = Literal["commit", "roll back", "unknown"]


@dataclass
class InDoubt:
    """A unit of work of which something is still prepared.

    Attributes:
        unit: its name.
        known: the fingerprint of the databases that may have a part in it.
        branches: where each branch was found, by its number: the names of databases. A server
            of MySQL tells of all its databases at each of them.
    """

    unit: str
    known: str
    branches: dict[int, list[str]] = field(default_factory=dict)

    def id(self, branch: int) -> TransactionId:
        """What the databases call that branch."""
        return TransactionId(self.unit, branch, self.known)


def in_doubt(found: Mapping[str, Iterable[str]]) -> list[InDoubt]:
    """The units of work to which prepared transactions belong.

    Args:
        found: the ids that each database has told, by its name. Those that are not repom's are
            left out.
    """
    units: dict[str, InDoubt] = {}
    for name, texts in found.items():
        for text in texts:
            it = TransactionId.parse(text)
            if it is not None:
                unit = units.setdefault(it.unit, InDoubt(it.unit, it.known))
                unit.branches.setdefault(it.branch, []).append(name)
    return list(units.values())


def verdict(unit: InDoubt, asked: str) -> Verdict:
    """How a unit of work is to end, at whose end nobody works any more.

    Args:
        unit: with all its branches that are prepared on the databases that were asked.
        asked: the fingerprint of these databases.

    Returns:
        "roll back" if nothing of it is committed; "commit" if a part is; "unknown" if not all
        databases were asked that may have a part.
    """
    if unit.known != asked:
        return "unknown"
    return "roll back" if DECIDER in unit.branches else "commit"


def in_order(branches: Iterable[int], how: Verdict) -> list[int]:
    """The branches in an order that, broken off anywhere, leaves the verdict what it was."""
    return sorted(branches, reverse=how == "roll back")
