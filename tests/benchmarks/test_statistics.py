"""When a benchmark's ratio is a result, and when it is only noise."""

import random

from benchmarks.results import Row
from benchmarks.statistics import ENOUGH, Ratio, ratio, spread


def noisy(value: float, seed: int) -> list[float]:
    """Thirty rounds that differ by up to a tenth from each other."""
    draw = random.Random(seed)
    return [value * draw.uniform(0.95, 1.05) for _ in range(30)]


def row(contender: Ratio, null: Ratio, series: int = 30) -> Row:
    return Row(
        *("select", "sqlite", "asgi", "repom", "repom"),
        series=series,
        ratios={"cpu": contender},
        null={"cpu": null},
    )


def test_a_round_that_was_disturbed_moves_nothing() -> None:
    """A ratio is taken within a round, and the median of the rounds counts."""
    baseline = [1.0, 1.0, 9.0, 1.0, 1.0]
    disturbed_alike = [1.2, 1.2, 10.8, 1.2, 1.2]
    disturbed_alone = [1.2, 1.2, 90.0, 1.2, 1.2]

    assert ratio(disturbed_alike, baseline).median == 1.2
    assert ratio(disturbed_alone, baseline).median == 1.2


def test_what_differs_less_than_the_same_code_does_is_no_result() -> None:
    """The second copy of the hand-written code says how far noise goes."""
    baseline = noisy(1.0, 1)
    null = ratio(noisy(1.0, 2), baseline)

    assert not row(ratio(noisy(1.0, 3), baseline), null).is_result("cpu")
    assert row(ratio(noisy(1.2, 3), baseline), null).is_result("cpu")


def test_a_few_series_are_no_result() -> None:
    """They may all have been disturbed alike."""
    exactly = Ratio(1.2, 1.2, 1.2), Ratio(1.0, 1.0, 1.0)

    assert not row(*exactly, series=ENOUGH - 1).is_result("cpu")
    assert row(*exactly, series=ENOUGH).is_result("cpu")


def test_a_ratio_that_differs_from_series_to_series_is_no_result() -> None:
    """However well the hand-written code agrees with itself."""
    assert not row(Ratio(1.2, 0.9, 1.3), Ratio(1.0, 1.0, 1.0)).is_result("cpu")


def test_the_spread_is_the_far_end_of_the_null() -> None:
    """On whichever side of 1 it is, and also if the whole range is on one side."""
    assert spread(Ratio(1.0, 0.97, 1.01)) == 1 - 0.97
    assert spread(Ratio(1.03, 1.02, 1.05)) == 1.05 - 1


def test_the_same_rounds_give_the_same_range() -> None:
    """A report that is written again says the same."""
    assert ratio(noisy(1.1, 1), noisy(1.0, 2)) == ratio(noisy(1.1, 1), noisy(1.0, 2))
