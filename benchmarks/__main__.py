"""The whole comparison: `make bench`, or `.venv-bench-runner/bin/python -m benchmarks`."""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import random
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

from benchmarks import budget, cases, databases, environments, report
from benchmarks.cases import APART, TOGETHER, Conditions
from benchmarks.contenders import CONTENDERS, HOSTS, Contender
from benchmarks.entrants import Entrant, Heading, entrants, rows, running
from benchmarks.environments import python_of
from benchmarks.processes import worker
from benchmarks.results import Results

RESULTS = Path(__file__).with_name("results.json")
BUDGET = Path(__file__).with_name("budget.json")
DOCS = environments.ROOT / "docs"


async def run(options: argparse.Namespace) -> Results:
    """Measure everything that was asked for."""
    contenders = [
        contender
        for contender in CONTENDERS
        if environments.is_there(contender.environment) and _is_wanted(contender, options)
    ]
    names = list(dict.fromkeys(contender.environment for contender in contenders))
    results = Results(about() | {"effort": options.effort}, {})
    for name in names:
        async with worker(python_of(name)) as remote:
            results.environments[name] = await remote.ask("versions")
    effort = cases.EFFORTS[options.effort]
    for database in options.database:
        async with databases.filled(database) as url, worker(Path(sys.executable)) as load:
            results.about[database] = await databases.version(url)
            conditions = Conditions(effort, random.Random(options.seed), load)
            for host in options.host:
                mine = [contender for contender in contenders if contender.host == host]
                alone = [[c for c in mine if c.environment == name] for name in names]
                for group, compared, series in (
                    (mine, TOGETHER, effort.series[host]),
                    *((group, APART, effort.repeats) for group in alone),
                ):
                    wanted = [case for case in compared if _is_asked_for(case, database, options)]
                    if not group or not wanted:
                        continue
                    ready = entrants(group)
                    for number in range(series):
                        tell(
                            f"{database}, {host}: {', '.join(wanted)} of {len(ready)} "
                            f"applications, {number + 1} of {series}"
                        )
                        async with running(ready, url, number, conditions.shuffle):
                            for case in wanted:
                                await compared[case](ready, case, conditions)
                    for heading in headings(ready) or map(Heading, wanted):
                        results.rows += rows(ready, heading, database)
                    save(results, options)
            if _is_asked_for("instructions", database, options):
                tell(f"{database}: instructions")
                results.rows += await cases.instructions(url, database, effort)
            if _is_asked_for("resident", database, options):
                tell(f"{database}: resident")
                results.rows += await cases.resident(contenders, url, database, effort)
            save(results, options)
    return results


def headings(ready: list[Entrant]) -> list[Heading]:
    """Everything that was measured, or has failed."""
    return list(dict.fromkeys(h for each in ready for h in (*each.values, *each.errors)))


def _is_asked_for(case: str, database: str, options: argparse.Namespace) -> bool:
    # One database tells how an endpoint without any, and the memory of a process, are doing.
    once = case in ("nothing", "resident") and database != options.database[0]
    return case in options.case and not once


def save(results: Results, options: argparse.Namespace) -> None:
    """Keep what there is, of each database and host: a run takes three hours."""
    if options.to is not None:
        results.write(options.to)


def _is_wanted(contender: Contender, options: argparse.Namespace) -> bool:
    wanted: list[str] = options.contender
    return not wanted or any(word.lower() in contender.name.lower() for word in wanted)


def about() -> dict[str, str]:
    """When and where."""
    processor = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as lines:
            processor = next(
                (line.split(":")[1].strip() for line in lines if line.startswith("model name")),
                processor,
            )
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": f"{processor}, {os.cpu_count()} cores, {platform.system()}",
    }


def tell(what: str) -> None:
    """Say where the run is."""
    print(f"{time.strftime('%H:%M:%S')}  {what}", file=sys.stderr, flush=True)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    efforts = parser.add_mutually_exclusive_group()
    for effort, help_text in (
        ("quick", "does it work? measures little"),
        ("short", "a third of the time; the null says what the numbers are worth"),
    ):
        efforts.add_argument(
            f"--{effort}", dest="effort", action="store_const", const=effort, help=help_text
        )
    parser.set_defaults(effort="full")
    parser.add_argument(
        "--budget",
        action="store_true",
        help="only what decides, repom and the code by hand on the bare host: with more time",
    )
    parser.add_argument("--case", action="append", choices=cases.CASES)
    parser.add_argument("--database", action="append", choices=databases.KINDS)
    parser.add_argument("--host", action="append", choices=HOSTS)
    parser.add_argument("--contender", action="append", help="a part of its name")
    parser.add_argument("--seed", type=int, default=0, help="of the order in the rounds")
    parser.add_argument("--report", action="store_true", help="only write the report again")
    options = parser.parse_args()
    # What has measured everything, with time, is written to docs/.
    options.to = RESULTS
    if options.case or options.database or options.host or options.contender:
        options.to = None
    elif options.budget:
        options.to = BUDGET if options.effort == "full" else None
    if options.budget:
        options.case = options.case or list(budget.CASES)
        options.host, options.contender = ["asgi"], ["repom"]
        options.effort = "decisive" if options.effort == "full" else options.effort
    if options.effort == "quick":
        options.to = None
    options.case = options.case or cases.CASES
    options.database = options.database or databases.KINDS
    options.host = options.host or HOSTS
    return options


def main() -> None:
    """Run, print the tables, and write them to docs/ if nothing was left out."""
    options = arguments()
    results = Results.read(options.to or RESULTS) if options.report else asyncio.run(run(options))
    print(report.text(results))
    if options.to == RESULTS:
        report.write(results, DOCS)
    elif options.to == BUDGET:
        report.write_budget(results, DOCS)


if __name__ == "__main__":
    main()
