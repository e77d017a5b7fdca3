"""Hand-written code and repom in one process: `python -m benchmarks`."""

import argparse
import asyncio
import random
import sys
from statistics import median

from benchmarks import compare, databases
from benchmarks.compare import NULL, Entrant
from benchmarks.contenders import CONTENDERS
from benchmarks.statistics import is_result, ratio, spread

ENGINE = {"pool_size": 10, "max_overflow": 0}


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--case", action="append")
    parser.add_argument("--database", action="append")
    parser.add_argument("--host", action="append")
    options = parser.parse_args()
    for kind in options.database or databases.KINDS:
        for host in options.host or ("asgi", "fastapi"):
            async with databases.filled(kind) as url, compare.worker(sys.executable) as remote:
                mine = [contender for contender in CONTENDERS if contender.host == host]
                names = [
                    (NULL if i else c.name, c)
                    for c in mine
                    for i in range(1 + (c.name == "hand-written"))
                ]
                for name, c in names:
                    await remote.ask(
                        "load", app=name, contender=c.build, url=url, engine_kwargs=ENGINE
                    )
                for case in options.case or ("nothing", "select", "insert", "mixed", "service"):
                    entrants = [Entrant(name, remote, name) for name, _ in names]
                    await compare.rounds(
                        entrants,
                        case,
                        rounds=8 if options.quick else 40,
                        seconds=0.05 if options.quick else 0.2,
                        concurrency=1,
                        random_=random.Random(),
                    )
                    hand = entrants[0].cpu
                    null = ratio(entrants[1].cpu, hand)
                    for e in entrants:
                        r = ratio(e.cpu, hand)
                        print(
                            f"{kind:10} {host:8} {case:8} {e.name:20} cpu {median(e.cpu) * 1e6:8.1f} us"
                            f" wall {median(e.wall) * 1e6:8.1f} us   x{r.median:.3f} [{r.low:.3f}, {r.high:.3f}]"
                            f" {'' if is_result(r, null) else f'(inside the null: {spread(null):.3f})'}"
                        )


asyncio.run(main())
