"""What a run has found, as rows that are written to a file and read again for the report."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.statistics import ENOUGH, Ratio, spread


@dataclass
class Row:
    """One contender in one case.

    Attributes:
        case: as `--case` has it, and the endpoint where that is another word.
        answers_first: it answers before it has committed.
        again: it is the second copy of the hand-written code.
        series: in how many processes of each contender it was measured.
        values: medians over the series, in seconds and bytes for one request.
        ratios: of the values, to those of the hand-written code of the same environment.
        null: the ratios of its second copy.
        error: why it is no result.
    """

    case: str
    database: str
    host: str
    environment: str
    contender: str
    concurrency: int = 1
    again: bool = False
    answers_first: bool = False
    series: int = 0
    values: dict[str, float] = field(default_factory=dict)
    ratios: dict[str, Ratio] = field(default_factory=dict)
    null: dict[str, Ratio] = field(default_factory=dict)
    error: str = ""

    def is_result(self, name: str) -> bool:
        """Whether the ratio says more than that the same code does not always take the same."""
        return self.is_known(name) and abs(self.ratios[name].median - 1) > self.doubt(name)

    def is_known(self, name: str) -> bool:
        """Whether there were enough series to tell."""
        return self.series >= ENOUGH or name == "peak"  # which is counted

    def doubt(self, name: str) -> float:
        """How far the truth may be: as the null is from 1, or the series are from their median."""
        found = self.ratios[name]
        own = max(found.high - found.median, found.median - found.low)
        return max(spread(self.null[name]), own)


@dataclass
class Results:
    """A run.

    Attributes:
        about: the date, the machine, the databases.
        environments: the versions of everything in each, by name.
    """

    about: dict[str, str]
    environments: dict[str, dict[str, str]]
    rows: list[Row] = field(default_factory=list)

    def write(self, path: Path) -> None:
        """As JSON, one row a line."""
        rows = ",\n".join(json.dumps(asdict(row)) for row in self.rows)
        head = json.dumps({"about": self.about, "environments": self.environments}, indent=1)
        path.write_text(f'{head[:-2]},\n "rows": [\n{rows}\n]}}\n')

    @classmethod
    def read(cls, path: Path) -> Results:
        """What `write` has written."""
        found = json.loads(path.read_text())
        rows = [Row(**{**row, **_ratios(row)}) for row in found.pop("rows")]
        return cls(**found, rows=rows)


def _ratios(row: dict[str, Any]) -> dict[str, dict[str, Ratio]]:
    return {
        which: {name: Ratio(**value) for name, value in row[which].items()}
        for which in ("ratios", "null")
    }
