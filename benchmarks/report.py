"""The tables and the plots that a run's results make."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from benchmarks.contenders import HAND_WRITTEN
from benchmarks.cost import REPOM
from benchmarks.databases import KINDS
from benchmarks.measure import IN_FLIGHT, LEVELS, POOL_SIZE
from benchmarks.results import Results, Row
from benchmarks.statistics import spread

TITLES = {
    "nothing": "no database",
    "select": "one SELECT",
    "insert": "one INSERT",
    "mixed": "ten statements",
    "service": "20 calls of `current_session()`",
    "pool": f"{IN_FLIGHT} in flight, pool of {POOL_SIZE}",
}
DATABASES = {"sqlite": "SQLite", "postgresql": "PostgreSQL", "mariadb": "MariaDB"}


class Budget(NamedTuple):
    """What repom may cost more than hand-written code: a factor, or seconds on top."""

    at_most: float
    aim: float


#: What repom promises itself. Seconds where there is no database, else the ratio.
BUDGET = {
    ("nothing", "sqlite"): Budget(6e-6, 4e-6),
    **{("select", database): Budget(0.98, 0.90) for database in ("sqlite", "postgresql")},
    **{("insert", database): Budget(1.00, 0.92) for database in KINDS},
}


def text(results: Results) -> str:
    """Everything, as Markdown."""
    parts = [
        about(results),
        *budget(results),
        *compared(results),
        *growth(results),
        *sockets(results),
        *memory(results),
        *resident(results),
        *failures(results),
    ]
    return "\n".join(parts)


def write(results: Results, docs: Path) -> None:
    """The tables for docs/benchmarks.md to include, and the plots that it shows."""
    from benchmarks import plots  # the tables need no matplotlib

    folder = docs / "_benchmarks"
    folder.mkdir(exist_ok=True)
    (folder / "results.md").write_text(text(results))
    plots.ratios(results, folder / "ratios.svg")
    plots.growth(results, folder / "concurrency.svg")


def about(results: Results) -> str:
    """When, where, with what."""
    common = dict(results.environments.get("repom", {}))
    names = ("python", "sqlalchemy", "fastapi", "aiosqlite", "asyncpg", "aiomysql", "uvicorn")
    versions = ", ".join(f"{name} {common[name]}" for name in names if name in common)
    servers = ", ".join(
        f"{DATABASES[kind]} {results.about[kind]}" for kind in KINDS if kind in results.about
    )
    peers = ", ".join(
        f"{name} {versions.get(name) or versions[name.replace('-', '_')]}"
        + (f" (with fastapi {versions['fastapi']})" * (versions["fastapi"] != common["fastapi"]))
        for name, versions in results.environments.items()
        if name != "repom"
    )
    return (
        f"Measured on {results.about['date']}: {results.about['machine']}; {versions}; {servers}."
        + (f" Peers: {peers}." if peers else "")
        + "\n"
    )


# --- repom and hand-written code


def budget(results: Results) -> list[str]:
    """The decisive table: both in one process, on the bare host, against what is promised."""
    lines = [
        f"| {TITLES[row.case]}{_where(row)} | {_us(_baseline(results, row))} | {_us(row)} "
        f"| {_ratio(row, 'cpu')} | {_ratio(row, 'wall')} | ±{spread(row.null['cpu']):.3f} "
        f"| {_instructions(results, row)} | {_allowed(row)} | {_verdict(results, row)} |"
        for row in results.rows
        if row.contender == REPOM and row.host == "asgi" and row.case in TITLES and not row.error
    ]
    return _section(
        "repom and the same code by hand, without a framework",
        "CPU time of one request; the ratio of each round, and the median of them.",
        "| | by hand | repom | CPU | clock | null | instructions | at most (aim) | |",
        lines,
    )


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
    found = BUDGET.get((row.case, row.database))
    if found is None:
        return ""
    if row.case == "nothing":
        return f"+{found.at_most * 1e6:.0f} µs (+{found.aim * 1e6:.0f} µs)"
    return f"{found.at_most:.2f} ({found.aim:.2f})"


def _verdict(results: Results, row: Row) -> str:
    found = BUDGET.get((row.case, row.database))
    if found is None:
        return "" if row.is_result("cpu") else "no difference"
    baseline = _baseline(results, row).values["cpu"]
    if row.case == "nothing":
        cost, doubt = row.values["cpu"] - baseline, spread(row.null["cpu"]) * baseline
    else:
        cost, doubt = row.ratios["cpu"].median, spread(row.null["cpu"])
    if abs(cost - found.at_most) <= doubt and cost > found.at_most:
        return "undecided"
    if cost > found.at_most:
        return "**too much**"
    return "aim reached" if cost <= found.aim else "met"


def _instructions(results: Results, row: Row) -> str:
    counted = [
        other.ratios["instructions"].median
        for other in results.rows
        if other.case == f"instructions {row.case}"
        and (other.database, other.contender) == (row.database, row.contender)
    ]
    return f"{counted[0]:.3f}" if counted else ""


# --- all contenders


def compared(results: Results) -> list[str]:
    """CPU time and the clock, to the hand-written code of the same process."""
    parts = []
    for host, name in (("fastapi", "FastAPI"), ("asgi", "the bare host")):
        for database in KINDS:
            rows = [
                row
                for row in results.rows
                if row.host == host and row.database == database and row.case in TITLES
            ]
            cases = [case for case in TITLES if any(row.case == case for row in rows)]
            parts += _section(
                f"All of them on {name}, {DATABASES[database]}",
                "CPU time / clock, to the hand-written code in the same process. "
                "In brackets: inside the null, so no difference was found.",
                f"| | {' | '.join(TITLES[case] for case in cases)} |",
                _lines(
                    rows,
                    cases,
                    lambda row: row.case,
                    lambda row: f"{_ratio(row, 'cpu')} / {_ratio(row, 'wall')}",
                ),
            )
    return parts


def growth(results: Results) -> list[str]:
    """Requests a second, by how many are in flight."""
    parts = []
    for host, name in (("asgi", "without a framework"), ("fastapi", "on FastAPI")):
        for database in KINDS:
            rows = [
                row
                for row in results.rows
                if (row.case, row.host, row.database) == ("growth", host, database)
            ]
            parts += _section(
                f"Requests in flight, {name}, {DATABASES[database]}",
                f"One SELECT, a pool of {POOL_SIZE}: requests a second, and their number to that "
                "of the hand-written code.",
                f"| | {' | '.join(str(level) for level in LEVELS)} |",
                _lines(
                    rows,
                    LEVELS,
                    lambda row: row.concurrency,
                    lambda row: (
                        f"{1 / row.values['wall']:.0f} ({1 / row.ratios['wall'].median:.2f})"
                    ),
                ),
            )
    return parts


def sockets(results: Results) -> list[str]:
    """What a client sees."""
    parts = []
    for host, name in (("asgi", "without a framework"), ("fastapi", "FastAPI")):
        for database in KINDS:
            rows = [
                row
                for row in results.rows
                if row.case.startswith("sockets") and (row.host, row.database) == (host, database)
            ]
            cases = [f"sockets {case}" for case in TITLES]
            cases = [case for case in cases if any(row.case == case for row in rows)]
            parts += _section(
                f"Over sockets: uvicorn, {name}, {DATABASES[database]}",
                "Requests a second, median and 99th percentile of their time in ms, the server's "
                "CPU time to that of the hand-written code.",
                f"| | {' | '.join(TITLES[case.split()[1]] for case in cases)} |",
                _lines(
                    rows,
                    cases,
                    lambda row: row.case,
                    lambda row: (
                        f"{1 / row.values['wall']:.0f}/s, {row.values['p50'] * 1e3:.1f}, "
                        f"{row.values['p99'] * 1e3:.1f}, {_ratio(row, 'cpu')}"
                    ),
                ),
            )
    return parts


def memory(results: Results) -> list[str]:
    """What one request takes and leaves."""
    parts = []
    for host, name in (("asgi", "without a framework"), ("fastapi", "FastAPI")):
        for database in KINDS:
            rows = [
                row
                for row in results.rows
                if row.case.startswith("memory") and (row.host, row.database) == (host, database)
            ]
            cases = [f"memory {case}" for case in TITLES]
            cases = [case for case in cases if any(row.case == case for row in rows)]
            parts += _section(
                f"Memory of a request, {name}, {DATABASES[database]}",
                "The most that it has at a time in KiB, to that of the hand-written code; "
                "and what it leaves behind in bytes.",
                f"| | {' | '.join(TITLES[case.split()[1]] for case in cases)} |",
                _lines(
                    rows,
                    cases,
                    lambda row: row.case,
                    lambda row: (
                        f"{row.values['peak'] / 1024:.1f} ({_ratio(row, 'peak')}), "
                        f"{row.values['left']:.0f}"
                    ),
                ),
            )
    return parts


def resident(results: Results) -> list[str]:
    """Does it leak?"""
    return _section(
        "Memory of the process, FastAPI",
        "MiB after a tenth of the requests, and after all of them (100,000 in a full run).",
        "| | early | late |",
        [
            f"| {row.contender} | {row.values['early'] / 2**20:.1f} "
            f"| {row.values['late'] / 2**20:.1f} |"
            for row in results.rows
            if row.case == "resident" and not row.error
        ],
    )


def failures(results: Results) -> list[str]:
    """Who could not do it, in which case, and what was raised."""
    return _section(
        "Not measured",
        "What a contender raised.",
        "| | case | error |",
        [
            f"| {row.contender} | {row.case}, {DATABASES[row.database]}, {row.concurrency} in "
            f"flight | {' '.join(row.error.split())[:200].replace('|', ' ')} |"
            for row in results.rows
            if row.error
        ],
    )


# --- Markdown


def _section(title: str, what: str, head: str, lines: Iterable[str]) -> list[str]:
    lines = list(lines)
    if not lines:
        return []
    rule = "|---" * (head.count("|") - 1) + "|"
    return [f"### {title}\n", f"{what}\n", head, rule, *lines, ""]


def _lines(
    rows: list[Row],
    columns: Iterable[object],
    column: Callable[[Row], object],
    cell: Callable[[Row], str],
) -> list[str]:
    """A line for each contender, and for the hand-written code that runs beside repom."""
    shown = [
        row
        for row in rows
        if row.contender != HAND_WRITTEN or (row.environment == REPOM and not row.again)
    ]
    columns = list(columns)
    lines = []
    for contender in dict.fromkeys(row.contender for row in shown):
        cells = {
            column(row): "failed" if row.error else cell(row)
            for row in shown
            if row.contender == contender
        }
        lines.append(f"| {contender} | {' | '.join(cells.get(c, '') for c in columns)} |")
    return lines


def _where(row: Row) -> str:
    return "" if row.case == "nothing" else f", {DATABASES[row.database]}"


def _us(row: Row) -> str:
    return f"{row.values['cpu'] * 1e6:.1f} µs"


def _ratio(row: Row, name: str) -> str:
    if row.contender == HAND_WRITTEN:
        return "1"
    found = f"{row.ratios[name].median:.2f}"
    return found if row.is_result(name) else f"({found})"
