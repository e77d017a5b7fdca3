"""Machine instructions of a request, counted by Valgrind: `python -m benchmarks.instructions`.

Repeatable to a fraction of a percent, whatever else the machine is doing. What is printed is the
difference between a run of many requests and one of few, so that starting counts for nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import subprocess
import sys
from contextlib import AsyncExitStack
from tempfile import TemporaryDirectory

from benchmarks import databases
from benchmarks.contenders import CONTENDERS, hand_written
from benchmarks.worker import Worker

_FEW, _MANY = 50, 150

_CONTENDERS = {
    contender.name: contender
    for contender in (hand_written("repom", "asgi"), *CONTENDERS)
    if contender.environment == "repom" and contender.host == "asgi"
}


async def _run(contender: str, url: str, case: str, count: int) -> None:
    async with AsyncExitStack() as stack:
        worker = Worker(stack)
        await worker.load("app", list(_CONTENDERS[contender]), url, {})
        await worker.run("app", case, count)


def _instructions(contender: str, url: str, case: str, count: int) -> int:
    with TemporaryDirectory() as folder:
        out = os.path.join(folder, "callgrind.out")
        subprocess.run(
            [
                *("valgrind", "--tool=callgrind", f"--callgrind-out-file={out}", "--quiet"),
                *(sys.executable, "-m", "benchmarks.instructions"),
                *("--run", contender, url, case, str(count)),
            ],
            check=True,
            env={**os.environ, "PYTHONHASHSEED": "0"},
        )
        with open(out) as lines:
            (total,) = re.findall(r"^(?:totals|summary): (\d+)", lines.read(), re.M)[:1]
    return int(total)


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--run", nargs=4)
    parser.add_argument("--case", action="append")
    parser.add_argument("--database", action="append")
    options = parser.parse_args()
    if options.run:
        contender, url, case, count = options.run
        await _run(contender, url, case, int(count))
        return
    for kind in options.database or ("sqlite", "postgresql"):
        async with databases.filled(kind) as url:
            for case in options.case or ("nothing", "select", "insert"):
                found = []
                for contender in _CONTENDERS:
                    few, many = (
                        _instructions(contender, url, case, count) for count in (_FEW, _MANY)
                    )
                    found.append((many - few) / (_MANY - _FEW))
                hand, repom = found
                print(
                    f"{kind:10} {case:8} hand-written {hand / 1000:8.1f} k, "
                    f"repom {repom / 1000:8.1f} k instructions, x{repom / hand:.3f}",
                    flush=True,
                )


if __name__ == "__main__":
    asyncio.run(main())
