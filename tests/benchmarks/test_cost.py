"""What a request through repom costs, counted: it does not grow unnoticed.

Counted are Python's own instructions and the turns of the event loop, by `benchmarks.cost`, of a
request through repom and of the same one written by hand. Both are exact, so no machine is too
slow or too busy for these tests. What a request may cost is in `benchmarks/cost.json`; where a
change is worth its price, `python -m benchmarks.cost --update` writes the new one down. Seconds
are measured by `make bench`.
"""

import json
import subprocess
import sys

import pytest
from sqlalchemy.engine import make_url

from benchmarks import cost
from tests.support.databases import in_ci

#: What may be added before somebody has to think about it.
TOLERANCE = 1.10

#: As `benchmarks.databases` calls them, by SQLAlchemy's name.
KINDS = {"sqlite": "sqlite", "postgresql": "postgresql", "mysql": "mariadb"}


def allowed(kind: str) -> dict[str, dict[str, float]]:
    """The ratios written down for the Python and the SQLAlchemy of this run."""
    try:
        return cost.stored()[cost.versions()][kind]
    except KeyError:
        reason = (
            f"benchmarks/cost.json knows no cost of {kind} with {cost.versions()}: "
            "`python -m benchmarks.cost --update` adds it"
        )
        if in_ci():
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason)


def counted(database_url: str) -> dict[str, dict[str, float]]:
    """The ratios now, counted in a process where nothing else runs: no debug mode, no coverage."""
    run = subprocess.run(
        [sys.executable, "-E", "-m", "benchmarks.cost", "--url", database_url],
        cwd=cost.STORED.parent.parent,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    ratios: dict[str, dict[str, float]] = json.loads(run.stdout)
    return ratios


def test_a_request_costs_no_more_than_is_written_down(database_url: str) -> None:
    """No database, one SELECT, one INSERT: none has become a tenth dearer, by hand being 1."""
    limits = allowed(KINDS[make_url(database_url).get_backend_name()])

    found = counted(database_url)

    too_much = {
        f"{what} of {case}": f"{value} instead of {limits[case][what]}"
        for case, by in found.items()
        for what, value in by.items()
        if value > limits[case][what] * TOLERANCE
    }
    assert not too_much, "`python -m benchmarks.cost --where 20` shows what makes the difference"
    assert found.keys() == limits.keys()
