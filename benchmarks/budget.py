"""The decisive table: repom and the same code by hand, against what repom promises itself."""

from __future__ import annotations

from typing import NamedTuple

from benchmarks.contenders import HAND_WRITTEN
from benchmarks.cost import READ, READ_ONLY, REPOM
from benchmarks.databases import KINDS
from benchmarks.results import Results, Row
from benchmarks.statistics import spread
from benchmarks.tables import TITLES, ratio, section, title

#: What there is a budget for.
CASES = ("nothing", "select", "insert", "memory", "instructions")


class Budget(NamedTuple):
    """What repom may cost more than hand-written code: a factor, or seconds on top."""

    at_most: float
    aim: float


#: What repom promises itself. Seconds where there is no database, else the ratio.
BUDGET = {
    **{("nothing", database): Budget(6e-6, 4e-6) for database in KINDS},
    **{("select", database): Budget(0.98, 0.90) for database in ("sqlite", "postgresql")},
    **{("insert", database): Budget(1.00, 0.92) for database in ("sqlite", "postgresql")},
    (READ, "postgresql"): Budget(0.80, 0.70),
    **{
        (f"memory {case}", database): Budget(1.00, 1.00)
        for case in ("select", "insert")
        for database in KINDS
    },
}


def table(results: Results) -> list[str]:
    """The decisive table: on the bare host, against what is promised."""
    lines = []
    for row in results.rows:
        if row.host != "asgi" or row.error or row.concurrency > 1 or not _is_ours(row):
            continue
        if row.case in TITLES:
            hand = _baseline(results, row)
            lines.append(
                f"| {_title(row)} | {hand.values['cpu'] * 1e6:.1f} µs "
                f"| {row.values['cpu'] * 1e6:.1f} µs | {ratio(row, 'cpu')} "
                f"| ±{spread(row.null['cpu']):.3f} "
                f"| ±{row.doubt('cpu'):.3f} | {ratio(row, 'wall')} "
                f"| {_counted(results, row, 'machine')} | {_counted(results, row, 'instructions')} "
                f"| {_allowed(row)} | {_verdict(row, hand)} |"
            )
        elif row.case.startswith("memory") and (row.case, row.database) in BUDGET:
            hand = _baseline(results, row)
            lines.append(
                f"| memory, {title(row)} | {hand.values['peak'] / 1024:.1f} KiB "
                f"| {row.values['peak'] / 1024:.1f} KiB | {row.ratios['peak'].median:.4f} "
                f"| ±{spread(row.null['peak']):.3f} | ±{row.doubt('peak'):.3f} | | | "
                f"| {_allowed(row)} | {_verdict(row, hand)} |"
            )
    return section(
        "repom and the same code by hand, without a framework",
        "CPU time of one request; then ratios to the code by hand: of CPU time, how far its second "
        "copy may be from it, and how far that or the ratio itself may be from what is said here; "
        "of the clock, of machine instructions, of Python's own.",
        "| | by hand | repom | CPU | null | doubt | clock | machine | Python | at most (aim) | |",
        lines,
    )


def _is_ours(row: Row) -> bool:
    """repom as it comes, and one SELECT of requests that only read."""
    return row.contender == REPOM or _case(row) == READ


def _case(row: Row) -> str:
    is_read = row.contender == READ_ONLY.name and row.case == "select"
    return READ if is_read else row.case


def _title(row: Row) -> str:
    return title(row) + ", `read_only`" * (_case(row) == READ)


def _baseline(results: Results, row: Row) -> Row:
    return next(
        other
        for other in results.rows
        if other.contender == HAND_WRITTEN
        and not other.again
        and (other.case, other.database, other.host, other.environment, other.concurrency)
        == (row.case, row.database, row.host, row.environment, row.concurrency)
    )


def _allowed(row: Row) -> str:
    found = BUDGET.get((_case(row), row.database))
    if found is None:
        return ""
    if row.case == "nothing":
        return f"+{found.at_most * 1e6:.0f} µs (+{found.aim * 1e6:.0f} µs)"
    return f"{found.at_most:.2f}" + f" ({found.aim:.2f})" * (found.aim < found.at_most)


def _verdict(row: Row, hand: Row) -> str:
    """Whether the budget is kept, as far as that can be told."""
    name = "peak" if row.case.startswith("memory") else "cpu"
    found = BUDGET.get((_case(row), row.database))
    if found is None:
        return ""
    cost, doubt = row.ratios[name].median, row.doubt(name)
    if row.case == "nothing":
        cost, doubt = (cost - 1) * hand.values[name], doubt * hand.values[name]
    if not row.is_known(name):
        return "undecided"
    if cost > found.at_most + doubt:
        return "**too much**"
    if cost > found.at_most - doubt and doubt:
        return "undecided"
    return "aim reached" if cost <= found.aim - doubt else "met"


def _counted(results: Results, row: Row, what: str) -> str:
    for other in results.rows:
        if (
            other.case == f"instructions {_case(row)}"
            and (other.database, other.contender) == (row.database, REPOM)
            and what in other.ratios
        ):
            return f"{other.ratios[what].median:.3f}"
    return ""
