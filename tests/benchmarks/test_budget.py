"""What the benchmarks' table says of a budget: kept, not kept, or not to be seen."""

import pytest

from benchmarks import budget
from benchmarks.results import Results, Row
from benchmarks.statistics import Ratio

NULL = Ratio(1.0, 0.99, 1.01)


def verdict(
    case: str,
    hand: float,
    repom: float,
    null: Ratio = NULL,
    *,
    database: str = "sqlite",
    name: str = "repom",
) -> str:
    """What the last column says when repom takes `repom` seconds."""
    rows = [
        Row(
            case,
            database,
            "asgi",
            "repom",
            contender,
            series=30,
            values={"cpu": value, "wall": value},
            ratios=dict.fromkeys(("cpu", "wall"), Ratio(value / hand, value / hand, value / hand)),
            null={"cpu": null, "wall": null},
        )
        for contender, value in (("hand-written", hand), (name, repom))
    ]
    line = budget.table(Results({}, {}, rows))[-2]
    return line.split("|")[-2].strip()


@pytest.mark.parametrize(
    ("ratio", "says"),
    [
        (0.85, "aim reached"),
        (0.95, "met"),
        (0.975, "undecided"),
        (0.985, "undecided"),
        (1.00, "**too much**"),
    ],
)
def test_a_ratio_is_held_against_its_budget(ratio: float, says: str) -> None:
    """One SELECT may take 0.98, give or take what the null cannot tell apart."""
    assert verdict("select", 1e-3, ratio * 1e-3) == says


@pytest.mark.parametrize(
    ("more", "says"),
    [(3e-6, "aim reached"), (5e-6, "met"), (6.02e-6, "undecided"), (7e-6, "**too much**")],
)
def test_without_a_database_microseconds_count(more: float, says: str) -> None:
    """The bare application is so cheap that no ratio to it would mean anything."""
    assert verdict("nothing", 4e-6, 4e-6 + more) == says


@pytest.mark.parametrize(
    ("ratio", "says"), [(0.65, "aim reached"), (0.75, "met"), (0.9, "**too much**")]
)
def test_a_select_of_requests_that_only_read(ratio: float, says: str) -> None:
    """It has a budget of its own, where it saves round trips; without one nothing is said."""
    found = verdict("select", 1e-3, ratio * 1e-3, database="postgresql", name="repom, read_only")

    assert found == says


def test_a_noisy_run_decides_nothing() -> None:
    """Neither for repom nor against it."""
    noisy = Ratio(1.0, 0.8, 1.2)

    assert verdict("select", 1e-3, 0.9e-3, noisy) == "undecided"
    assert verdict("select", 1e-3, 1.1e-3, noisy) == "undecided"
