"""A soak would notice: what is a disagreement of client and database, and what is not."""

from collections.abc import Mapping

import pytest

from tests.soak.client import Manners, Request
from tests.soak.judgement import disagreements, surprises
from tests.soak.kinds import NO_ANSWER, Kind, Seen, kinds_of
from tests.soak.layers import LIMIT
from tests.soak.load import Answer

KINDS: Mapping[str, Kind] = {kind.name: kind for kind in kinds_of("postgresql")}

COMPLETE_201, BROKEN_201 = Seen(201, complete=True), Seen(201)
COMPLETE_200, BROKEN_200 = Seen(200, complete=True), Seen(200)
REFUSED, CRASHED = Seen(409, complete=True), Seen(500)
NOTHING = Seen()

#: The kind of request, what its client has seen, what is committed, and whether that is right.
TABLE: list[tuple[str, Seen, dict[str, int], bool]] = [
    ("core", COMPLETE_201, {"request": 3}, True),
    ("core", COMPLETE_201, {}, False),
    ("core", BROKEN_201, {}, False),  # COMMIT comes before the first byte
    ("core", CRASHED, {"request": 3}, False),
    ("core", Seen(503, complete=True), {"request": 3}, False),
    ("core", NOTHING, {}, True),
    ("core", NOTHING, {"request": 3}, True),
    ("core", NOTHING, {"request": 2}, False),
    ("core", COMPLETE_201, {"request": 6}, False),
    ("core", COMPLETE_201, {"request": 3, "other": 3}, False),
    ("refused/409", REFUSED, {}, True),
    ("refused/409", REFUSED, {"request": 3}, False),
    ("upload", Seen(sent=False), {}, True),
    ("upload", Seen(sent=False), {"request": 3}, False),
    ("body", BROKEN_200, {"request": 3}, True),
    ("body", BROKEN_200, {"request": 3, "body": 3}, True),
    ("body", BROKEN_200, {"request": 3, "body": 1}, False),
    ("body", COMPLETE_200, {"request": 3}, False),
    ("body-breaks", BROKEN_200, {"request": 3, "body": 3}, False),
    ("cursor", BROKEN_200, {}, True),
    ("cursor", COMPLETE_200, {}, False),
    ("scope-refused", REFUSED, {"own": 3}, True),
    ("scope-refused", REFUSED, {}, False),
    ("scope-refused", Seen(504, complete=True), {}, True),
    ("callback-refused", REFUSED, {"told": 3}, True),
    ("callback-refused", REFUSED, {}, False),
    ("callback-refused", REFUSED, {"told": 3, "called": 3}, False),
    ("background", COMPLETE_201, {"request": 3}, False),
    ("savepoint", COMPLETE_201, {"request": 3, "undone": 3}, False),
    ("limited-savepoint", COMPLETE_201, {"request": 3}, True),
    ("limited-savepoint", COMPLETE_201, {"request": 3, "tried": 3}, True),
    ("limited-savepoint", COMPLETE_201, {"request": 3, "tried": 2}, False),
    ("limited-savepoint", Seen(500, complete=True), {"tried": 3}, False),
]


@pytest.mark.parametrize(("kind", "seen", "committed", "right"), TABLE)
def test_disagreements(kind: str, seen: Seen, committed: dict[str, int], right: bool) -> None:
    """What the response says, and half a transaction in any case."""
    answer = Answer(Request(7, KINDS[kind]), seen)
    assert (disagreements(answer, committed) == []) == right


def test_background_tasks_may_still_be_at_work() -> None:
    """They are not asked for before the end."""
    answer = Answer(Request(7, KINDS["background"]), COMPLETE_201)
    assert disagreements(answer, {"request": 3}, at_once=True) == []


@pytest.mark.parametrize(
    ("kind", "seen", "surprising"),
    [
        ("core", COMPLETE_201, False),
        ("core", Seen(500, complete=True), True),
        ("core", Seen(200, complete=True), True),
        ("core", Seen(504, complete=True), True),
        ("core", BROKEN_201, True),
        ("core", NOTHING, True),
        ("core", Seen(reused=True), False),
        ("core", Seen(reused=True, error=NO_ANSWER), True),
        ("core", Seen(503, complete=True, body=b"deadlock"), False),
        ("core", Seen(503, complete=True, body=b"pool"), True),
        ("narrow", Seen(503, complete=True, body=b"pool"), False),
        ("body-breaks", BROKEN_200, False),
        ("body-breaks", COMPLETE_200, True),
        ("total", Seen(200, complete=True, body=b"7999"), True),
    ],
)
def test_surprises(kind: str, seen: Seen, surprising: bool) -> None:
    """An answer that this application does not give to a client that waits for it."""
    assert bool(surprises(Answer(Request(7, KINDS[kind]), seen))) == surprising


def test_reasons_to_break_off() -> None:
    """A client that goes, and a time limit."""
    impatient = Request(7, KINDS["core"], manners=Manners(waits=0.1))
    limited = Request(7, KINDS["core"], headers={LIMIT: "0.1"})
    assert surprises(Answer(impatient, NOTHING)) == []
    assert surprises(Answer(limited, BROKEN_201)) == []
    assert surprises(Answer(limited, Seen(504, complete=True))) == []
