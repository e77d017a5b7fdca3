"""The rule of recovery."""

import pytest

from repom.in_doubt import InDoubt, in_doubt, in_order, verdict
from repom.transaction_ids import TransactionId

UNIT, OTHER = 24 * "a", 24 * "b"
HERE, ELSEWHERE = "01234567", "89abcdef"


def an_id(branch: int, unit: str = UNIT) -> str:
    return str(TransactionId(unit, branch, HERE))


@pytest.mark.parametrize(
    ("branches", "asked", "expected"),
    [
        # Prepared on the first only, or on all: nobody has committed.
        ({0}, HERE, "roll back"),
        ({0, 1}, HERE, "roll back"),
        ({0, 1, 2}, HERE, "roll back"),
        # A rollback that was broken off.
        ({0, 2}, HERE, "roll back"),
        # The first has committed, and perhaps some after it.
        ({1}, HERE, "commit"),
        ({2}, HERE, "commit"),
        ({1, 2}, HERE, "commit"),
        # Others may have more of it.
        ({0}, ELSEWHERE, "unknown"),
        ({1}, ELSEWHERE, "unknown"),
    ],
)
def test_verdict(branches: set[int], asked: str, expected: str) -> None:
    unit = InDoubt(UNIT, HERE, {branch: ["a"] for branch in branches})
    assert verdict(unit, asked) == expected


def test_an_order_that_can_be_broken_off() -> None:
    """The first is rolled back last, and committed first."""
    assert in_order({1, 0, 2}, "commit") == [0, 1, 2]
    assert in_order({1, 0, 2}, "roll back") == [2, 1, 0]


def test_what_belongs_together() -> None:
    """By units; and what two databases of one server both tell is one branch."""
    found = in_doubt(
        {
            "a": [an_id(0), an_id(1), "_sa_123"],
            "b": [an_id(0), an_id(1)],
            "c": [an_id(2), an_id(1, OTHER)],
        }
    )
    assert found == [
        InDoubt(UNIT, HERE, {0: ["a", "b"], 1: ["a", "b"], 2: ["c"]}),
        InDoubt(OTHER, HERE, {1: ["c"]}),
    ]
    assert str(found[0].id(2)) == an_id(2)


def test_nothing() -> None:
    assert in_doubt({"a": []}) == []
