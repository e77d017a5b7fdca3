"""What a run's results say, as tables and plots."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from benchmarks import budget
from benchmarks.databases import KINDS
from benchmarks.entrants import POOL_SIZE
from benchmarks.results import Results, Row
from benchmarks.tables import DATABASES, TITLES, lines, ratio, section

HOSTS = {"fastapi": "FastAPI", "asgi": "no framework"}


def text(results: Results) -> str:
    """Everything, as Markdown."""
    return "\n".join([about(results), *budget.table(results), *_comparison(results)])


def _comparison(results: Results) -> list[str]:
    return [
        *compared(results),
        *growth(results),
        *sockets(results),
        *memory(results),
        *resident(results),
        *failures(results),
    ]


def write(results: Results, docs: Path) -> None:
    """The tables for docs/benchmarks.md to include, and the plots that it shows.

    But for the decisive one, which a run with `--budget` knows better.
    """
    from benchmarks import plots  # the tables need no matplotlib

    folder = docs / "_benchmarks"
    folder.mkdir(exist_ok=True)
    (folder / "results.md").write_text("\n".join([about(results), *_comparison(results)]))
    plots.ratios(results, folder / "ratios.svg")
    plots.growth(results, folder / "concurrency.svg")


def write_budget(results: Results, docs: Path) -> None:
    """The decisive table of a run with `--budget`."""
    (docs / "_benchmarks" / "budget.md").write_text(
        "\n".join([about(results), *budget.table(results), *failures(results)])
    )


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
        _OF_EFFORT[results.about["effort"]]
        + f"Measured on {results.about['date']}: {results.about['machine']}; {versions}; {servers}."
        + (f" Peers: {peers}." if peers else "")
        + "\n"
    )


_OF_EFFORT = {
    "decisive": "",
    "full": "",
    "short": "A short run: the null says how much each number is worth.\n\n",
    "quick": "**A quick run: it shows that everything works, and not what it costs.**\n\n",
}


def compared(results: Results) -> list[str]:
    """CPU time and the clock, to the hand-written code of the same environment."""
    return _everywhere(
        results,
        "All of them",
        "CPU time / clock, to the hand-written code in the same environment. In brackets: "
        "in doubt, or of too few series to tell, so no difference was found. †: answers before it "
        "commits.",
        lambda row: row.case if row.case in TITLES else None,
        lambda row: f"{ratio(row, 'cpu')} / {ratio(row, 'wall')}",
    )


def growth(results: Results) -> list[str]:
    """Requests a second, by how many are in flight."""
    return _everywhere(
        results,
        "Requests in flight",
        f"One SELECT, a pool of {POOL_SIZE}: requests a second; clock and CPU time of a request, "
        "to those of the hand-written code.",
        lambda row: row.concurrency if row.case == "growth" else None,
        lambda row: f"{1 / row.values['wall']:.0f}/s, {ratio(row, 'wall')}, {ratio(row, 'cpu')}",
    )


def sockets(results: Results) -> list[str]:
    """What a client sees."""
    return _everywhere(
        results,
        "Over sockets, uvicorn",
        "Requests a second; median and 99th percentile of the time to the answer, in ms; the "
        "server's CPU time, to that of the hand-written code.",
        lambda row: _endpoint(row, "sockets"),
        lambda row: (
            f"{1 / row.values['wall']:.0f}/s, {row.values['p50'] * 1e3:.1f}, "
            f"{row.values['p99'] * 1e3:.1f}, {ratio(row, 'cpu')}"
        ),
    )


def memory(results: Results) -> list[str]:
    """What one request takes and leaves."""
    return _everywhere(
        results,
        "Memory of a request",
        "The most that it has at a time in KiB, and to that of the hand-written code; what it "
        "leaves behind in bytes.",
        lambda row: _endpoint(row, "memory"),
        lambda row: (
            f"{row.values['peak'] / 1024:.1f}, {ratio(row, 'peak')}, {row.values['left']:.0f}"
        ),
    )


def resident(results: Results) -> list[str]:
    """Does it leak?"""
    return section(
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
    return section(
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


def _endpoint(row: Row, case: str) -> str | None:
    return row.case.split()[1] if row.case.startswith(f"{case} ") else None


def _everywhere(
    results: Results,
    name: str,
    what: str,
    column: Callable[[Row], str | int | None],
    cell: Callable[[Row], str],
) -> list[str]:
    """A table for each host and database; rows whose column is None are not in it."""
    parts = []
    for host, host_name in HOSTS.items():
        for database in KINDS:
            rows = [
                row
                for row in results.rows
                if (row.host, row.database) == (host, database) and column(row) is not None
            ]
            columns = list(dict.fromkeys(column(row) for row in rows))
            parts += section(
                f"{name}: {host_name}, {DATABASES[database]}",
                what,
                f"| | {' | '.join(TITLES.get(str(c), str(c)) for c in columns)} |",
                lines(rows, columns, column, cell),
            )
    return parts
