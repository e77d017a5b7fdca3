"""Tables in Markdown, and what their columns and lines are called."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from benchmarks.cases import IN_FLIGHT
from benchmarks.contenders import HAND_WRITTEN
from benchmarks.cost import REPOM
from benchmarks.entrants import POOL_SIZE
from benchmarks.results import Row

TITLES = {
    "nothing": "no database",
    "select": "one SELECT",
    "insert": "one INSERT",
    "mixed": "ten statements",
    "service": "20 calls of `current_session()`",
    "pool": f"{IN_FLIGHT} in flight, pool of {POOL_SIZE}",
}
DATABASES = {"sqlite": "SQLite", "postgresql": "PostgreSQL", "mariadb": "MariaDB"}


def section(title: str, what: str, head: str, body: Iterable[str]) -> list[str]:
    """A heading, what the numbers are, and the table; nothing at all without a body."""
    body = list(body)
    if not body:
        return []
    rule = "|---" * (head.count("|") - 1) + "|"
    return [f"### {title}\n", f"{what}\n", head, rule, *body, ""]


def lines(
    rows: list[Row],
    columns: Iterable[object],
    column: Callable[[Row], object],
    cell: Callable[[Row], str],
) -> list[str]:
    """A line for each contender, and for the hand-written code that runs beside repom.

    Args:
        column: where a row belongs.
        cell: what is there to be read of it.
    """
    shown = [
        row
        for row in rows
        if row.contender != HAND_WRITTEN or (row.environment == REPOM and not row.again)
    ]
    columns = list(columns)
    found = []
    for contender in dict.fromkeys(row.contender for row in shown):
        cells = {
            column(row): "failed" if row.error else cell(row)
            for row in shown
            if row.contender == contender
        }
        early = any(row.answers_first for row in shown if row.contender == contender)
        found.append(
            f"| {contender}{' †' * early} | {' | '.join(cells.get(c, '') for c in columns)} |"
        )
    return found


def title(row: Row) -> str:
    """The case, and the database if it has one."""
    case = row.case.split()[-1]
    return TITLES[case] if case == "nothing" else f"{TITLES[case]}, {DATABASES[row.database]}"


def ratio(row: Row, name: str) -> str:
    """To the hand-written code; in brackets if that is no result."""
    if row.contender == HAND_WRITTEN:
        return "1"
    found = f"{row.ratios[name].median:.2f}"
    return found if row.is_result(name) else f"({found})"
