"""What the series say: medians, ratios, and how far the same code differs from itself."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

_RESAMPLES = 1000


@dataclass(frozen=True)
class Ratio:
    """A median of ratios, and the range that 95 of 100 such runs would give."""

    median: float
    low: float
    high: float


def ratio(values: Sequence[float], baseline: Sequence[float]) -> Ratio:
    """`values` to `baseline`, series by series: what disturbs one of them disturbs the other.

    The range is the bootstrap's: medians of series drawn again, with the same seed always.
    """
    ratios = [value / base for value, base in zip(values, baseline, strict=True)]
    draw = random.Random(0)
    medians = sorted(median(draw.choices(ratios, k=len(ratios))) for _ in range(_RESAMPLES))
    edge = _RESAMPLES // 40
    return Ratio(*(round(x, 4) for x in (median(ratios), medians[edge], medians[-edge - 1])))


#: Of fewer series no bootstrap knows the range: of four, it is too narrow every tenth time.
ENOUGH = 6


def exactly(value: float) -> Ratio:
    """A ratio that was counted, once and for all."""
    return Ratio(*[round(value, 4)] * 3)


def spread(null: Ratio) -> float:
    """How far from 1 the null may be: the hand-written code against its own second copy."""
    return max(abs(null.low - 1), abs(null.high - 1))
