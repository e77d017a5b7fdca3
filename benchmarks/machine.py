"""Machine instructions of a request, counted by Valgrind: `python -m benchmarks.machine`.

They are those of all code and all threads, and hardly differ from run to run, whatever else the
machine is doing. What counts is the difference between a run of many requests and one of few, so
that starting and stopping cost nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import shutil
import sys
from contextlib import AsyncExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks import databases
from benchmarks.client import run_requests, started
from benchmarks.contenders import Contender
from benchmarks.cost import COMPARED

#: How many requests are few, and how many are many. Without a database they are cheap.
_COUNTS = {"nothing": (200, 2200)}
_DATABASE_COUNTS = (20, 120)


def is_there() -> bool:
    """Whether Valgrind is installed."""
    return shutil.which("valgrind") is not None


async def instructions(python: Path, contender: Contender, url: str, case: str) -> float:
    """Of one request, by the interpreter `python`."""
    few, many = _COUNTS.get(case, _DATABASE_COUNTS)
    totals = [await _total(python, contender, url, case, count) for count in (few, many)]
    return (totals[1] - totals[0]) / (many - few)


async def _total(python: Path, contender: Contender, url: str, case: str, count: int) -> int:
    with TemporaryDirectory() as folder:
        out = Path(folder) / "callgrind.out"
        valgrind = await asyncio.create_subprocess_exec(
            *("valgrind", "--tool=callgrind", f"--callgrind-out-file={out}", "--quiet"),
            *(python, "-m", "benchmarks.machine"),
            *("--run", json.dumps(contender), url, case, str(count)),
            env={**os.environ, "PYTHONHASHSEED": "0"},
        )
        if await valgrind.wait():
            raise RuntimeError(f"{contender.name} ended with {valgrind.returncode} in Valgrind")
        found = re.search(r"^(?:totals|summary): (\d+)", out.read_text(), re.M)
    assert found is not None
    return int(found.group(1))


async def _run(contender: Contender, url: str, case: str, count: int) -> None:
    async with AsyncExitStack() as stack:
        app = contender.app(url, {})
        state = await stack.enter_async_context(started(app))
        await run_requests(app, case, count, 1, state)


async def main() -> None:
    """Print the counts of the hand-written code and of repom."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.machine", description=__doc__)
    parser.add_argument("--run", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--case", action="append", choices=("nothing", "select", "insert"))
    parser.add_argument("--database", action="append", choices=databases.KINDS)
    options = parser.parse_args()
    if options.run:
        contender, url, case, count = options.run
        await _run(Contender(*json.loads(contender)), url, case, int(count))
        return
    if not is_there():
        sys.exit("Valgrind is not installed (Debian: apt install valgrind).")
    for kind in options.database or databases.KINDS:
        async with databases.filled(kind) as url:
            for case in options.case or ("nothing", "select", "insert"):
                hand, repom = [
                    await instructions(Path(sys.executable), contender, url, case)
                    for contender in COMPARED
                ]
                print(
                    f"{kind:10} {case:8} hand-written {hand / 1000:8.1f} k, "
                    f"repom {repom / 1000:8.1f} k instructions, x{repom / hand:.3f}",
                    flush=True,
                )


if __name__ == "__main__":
    asyncio.run(main())
