"""The tables and the plots that a run's results make."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from benchmarks.contenders import HAND_WRITTEN
from benchmarks.cost import REPOM
from benchmarks.databases import KINDS
from benchmarks.measure import IN_FLIGHT, POOL_SIZE
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
    **{("insert", database): Budget(1.00, 0.92) for database in ("sqlite", "postgresql")},
    **{
        (f"memory {case}", database): Budget(1.00, 1.00)
        for case in ("select", "insert")
        for database in KINDS
    },
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
    quick = "**A quick run: it shows that everything works, and not what it costs.**\n\n"
    return (
        quick * (results.about["effort"] == "quick")
        + f"Measured on {results.about['date']}: {results.about['machine']}; {versions}; {servers}."
        + (f" Peers: {peers}." if peers else "")
        + "\n"
    )


# --- repom and hand-written code


def budget(results: Results) -> list[str]:
    """The decisive table: both in one process, on the bare host, against what is promised."""
    lines = []
    for row in results.rows:
        if row.contender != REPOM or row.host != "asgi" or row.error or row.concurrency > 1:
            continue
        if row.case in TITLES:
            hand = _baseline(results, row)
            lines.append(
                f"| {_title(row)} | {hand.values['cpu'] * 1e6:.1f} µs "
                f"| {row.values['cpu'] * 1e6:.1f} µs | {_ratio(row, 'cpu')} "
                f"| ±{spread(row.null['cpu']):.3f} | {_ratio(row, 'wall')} "
                f"| {_counted(results, row, 'machine')} | {_counted(results, row, 'instructions')} "
                f"| {_allowed(row)} | {_verdict(row, hand)} |"
            )
        elif row.case.startswith("memory"):
            hand = _baseline(results, row)
            lines.append(
                f"| memory, {_title(row)} | {hand.values['peak'] / 1024:.1f} KiB "
                f"| {row.values['peak'] / 1024:.1f} KiB | {_ratio(row, 'peak')} "
                f"| ±{spread(row.null['peak']):.3f} | | | "
                f"| {_allowed(row)} | {_verdict(row, hand)} |"
            )
    return _section(
        "repom and the same code by hand, without a framework",
        "CPU time of one request; then ratios to the code by hand: of CPU time, how far its second "
        "copy differs from it, of the clock, of machine instructions, of Python's own.",
        "| | by hand | repom | CPU | null | clock | machine | Python | at most (aim) | |",
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
    return f"{found.at_most:.2f}" + f" ({found.aim:.2f})" * (found.aim < found.at_most)


def _verdict(row: Row, hand: Row) -> str:
    """Whether the budget is kept, as far as the null lets that be seen."""
    name = "peak" if row.case.startswith("memory") else "cpu"
    found = BUDGET.get((row.case, row.database))
    if found is None:
        return ""
    cost, doubt = row.ratios[name].median, spread(row.null[name])
    if row.case == "nothing":
        cost, doubt = row.values[name] - hand.values[name], doubt * hand.values[name]
    if cost > found.at_most + doubt:
        return "**too much**"
    if cost > found.at_most - doubt and doubt:
        return "undecided"
    return "aim reached" if cost <= found.aim - doubt else "met"


def _counted(results: Results, row: Row, what: str) -> str:
    for other in results.rows:
        if (
            other.case == f"instructions {row.case}"
            and (other.database, other.contender) == (row.database, row.contender)
            and what in other.ratios
        ):
            return f"{other.ratios[what].median:.3f}"
    return ""


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
            levels = sorted({row.concurrency for row in rows})
            parts += _section(
                f"Requests in flight, {name}, {DATABASES[database]}",
                f"One SELECT, a pool of {POOL_SIZE}: requests a second; the clock and the CPU time "
                "of a request, to the hand-written code.",
                f"| | {' | '.join(str(level) for level in levels)} |",
                _lines(
                    rows,
                    levels,
                    lambda row: row.concurrency,
                    lambda row: (
                        f"{1 / row.values['wall']:.0f}/s, {_ratio(row, 'wall')}, "
                        f"{_ratio(row, 'cpu')}"
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


def _title(row: Row) -> str:
    case = row.case.split()[-1]
    return TITLES[case] if case == "nothing" else f"{TITLES[case]}, {DATABASES[row.database]}"


def _ratio(row: Row, name: str) -> str:
    if row.contender == HAND_WRITTEN:
        return "1"
    found = f"{row.ratios[name].median:.2f}"
    return found if row.is_result(name) else f"({found})"
