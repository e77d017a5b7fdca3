"""The applications that are compared: started, checked, measured in rounds of random order.

Again and again, each time in new processes: a series. Two processes of one application do not take
the same time, since what they use lies elsewhere in memory, and no number of rounds in one process
would say so.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from itertools import groupby
from statistics import median
from typing import NamedTuple

from benchmarks.contenders import Contender, hand_written
from benchmarks.environments import python_of
from benchmarks.processes import Remote, WorkerError, worker
from benchmarks.results import Row
from benchmarks.statistics import ratio

POOL_SIZE = 10

#: What every contender has to answer to its first requests, but for the new row's id.
EXPECTED = {
    "nothing": {"id": 1},
    "select": {"id": 1, "name": "item 1"},
    "insert": {"name": "new 1"},
    "mixed": {"names": 10, "count": 10},
    "service": {"id": 1, "name": "item 1"},
}

#: `pool` and `growth` have more requests than connections, and they wait for their turn.
ENGINE = {"pool_size": POOL_SIZE, "max_overflow": 0, "pool_timeout": 60}


class Heading(NamedTuple):
    """What is measured: a case, and how many requests are in flight."""

    case: str
    concurrency: int = 1


@dataclass
class Entrant:
    """An application, and what its series have given.

    Attributes:
        values: by heading and name, the median of the rounds of each series.
        errors: by heading, why there is nothing else.
        broken: why it did not even start. It is not started again.
        answers_first: whether it commits after it has answered.
        remote: the process in which it runs.
        port: on which it is served there.
    """

    contender: Contender
    again: bool = False
    values: dict[Heading, dict[str, list[float]]] = field(default_factory=dict)
    errors: dict[Heading, str] = field(default_factory=dict)
    broken: str = ""
    answers_first: bool = False
    remote: Remote = field(init=False)
    port: int = 0

    @property
    def app(self) -> str:
        """What the worker calls it."""
        return self.contender.build

    def error(self, heading: Heading) -> str:
        """Why it has no values there, if so it is."""
        return self.broken or self.errors.get(heading, "")


Values = dict[str, float]
Measure = Callable[[Entrant], Awaitable[Values]]


def entrants(contenders: Iterable[Contender]) -> list[Entrant]:
    """All of one host; in each environment the hand-written code comes first, and once again."""
    found = []
    for environment, group in groupby(contenders, lambda contender: contender.environment):
        mine = list(group)
        baseline = hand_written(environment, mine[0].host)
        found += [Entrant(baseline), Entrant(baseline, again=True), *map(Entrant, mine)]
    return found


@asynccontextmanager
async def running(
    entrants: list[Entrant], url: str, series: int, shuffle: random.Random
) -> AsyncIterator[None]:
    """All of them, each in a process of its own, started and ready.

    In one process they would be what no application is: Python learns which types a place in
    SQLAlchemy's code meets, and would unlearn it with every change from one to the other. They
    start in random order, since those that a machine has started first can be slower for long.

    Args:
        series: the how-manieth time, which is the seed of Python's hashes.
    """
    async with AsyncExitStack() as stack:
        for entrant in shuffle.sample(entrants, len(entrants)):
            if entrant.broken:
                continue
            python = python_of(entrant.contender.environment)
            entrant.remote = await stack.enter_async_context(worker(python, series))
            entrant.port = 0
            try:
                await load(entrant, url)
                await check(entrant, url)
            except WorkerError as error:
                entrant.broken = str(error)
        yield


async def load(entrant: Entrant, url: str) -> None:
    """Have the entrant's application started."""
    await entrant.remote.ask(
        "load",
        app=entrant.app,
        contender=list(entrant.contender),
        url=url,
        engine_kwargs=ENGINE,
    )


async def check(entrant: Entrant, url: str) -> None:
    """Have it answer each case once: all of them do the same work, and what they write is there.

    Raises:
        WorkerError: it is not what is to be measured.
    """
    answers, at_start, after = await entrant.remote.ask("answers", app=entrant.app, url=url)
    answers["insert"].pop("id")
    if answers != EXPECTED:
        raise WorkerError(f"answered {answers}, and not {EXPECTED}")
    if after != 1:
        raise WorkerError(f"has inserted {after} rows instead of one")
    entrant.answers_first = at_start == 0


async def rounds(
    entrants: list[Entrant],
    heading: Heading,
    measure: Measure,
    *,
    repeat: int,
    shuffle: random.Random,
) -> None:
    """Measure all in random order, again and again. One that fails is out, the others go on."""
    found: dict[int, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for _ in range(repeat):
        for place in shuffle.sample(range(len(entrants)), len(entrants)):
            entrant = entrants[place]
            if entrant.error(heading):
                continue
            try:
                values = await measure(entrant)
            except WorkerError as error:
                entrant.errors[heading] = str(error)
                continue
            for name, value in values.items():
                found[place][name].append(value)
    for place, by_name in found.items():
        series = entrants[place].values.setdefault(heading, {})
        for name, each in by_name.items():
            series.setdefault(name, []).append(median(each))


def rows(entrants: list[Entrant], heading: Heading, database: str) -> list[Row]:
    """What all series say, each entrant against the hand-written code beside it."""
    found = []
    for environment, group in groupby(entrants, lambda entrant: entrant.contender.environment):
        baseline, again, *others = group
        for entrant in (baseline, again, *others):
            values = entrant.values.get(heading, {})
            row = Row(
                heading.case,
                database,
                entrant.contender.host,
                environment,
                entrant.contender.name,
                heading.concurrency,
                entrant.again,
                entrant.answers_first,
                max((len(series) for series in values.values()), default=0),
                {name: median(series) for name, series in values.items()},
                error=entrant.error(heading) or baseline.error(heading) or again.error(heading),
            )
            # What is left behind is nothing, or nearly, and has no ratio.
            for name in () if row.error else row.values.keys() - {"left"}:
                row.ratios[name], row.null[name] = (
                    ratio(one.values[heading][name], baseline.values[heading][name])
                    for one in (entrant, again)
                )
            found.append(row)
    return found
