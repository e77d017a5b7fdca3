"""The applications that are compared: started, checked, measured in rounds of random order."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from itertools import groupby
from statistics import median

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


@dataclass
class Entrant:
    """An application in a worker, and what its rounds have given."""

    contender: Contender
    again: bool
    remote: Remote
    values: dict[str, list[float]] = field(default_factory=dict)
    error: str = ""  # in this case
    broken: str = ""  # did not even start
    answers_first: bool = False  # and commits then
    port: int = 0

    @property
    def app(self) -> str:
        """What the worker calls it."""
        return f"{self.contender.build}{' again' * self.again}"


Values = dict[str, float]
Measure = Callable[[Entrant], Awaitable[Values]]


@asynccontextmanager
async def entrants(
    contenders: Iterable[Contender], host: str, url: str
) -> AsyncIterator[list[Entrant]]:
    """All of one host, each in a process of its own, started and ready.

    In each environment the hand-written code comes first, and its second copy. In one process
    they would be what no application is: Python learns which types a place in SQLAlchemy's code
    meets, and would unlearn it with every change from one to the other.
    """
    mine = [contender for contender in contenders if contender.host == host]
    async with AsyncExitStack() as stack:
        ready = []
        for environment, group in groupby(mine, lambda contender: contender.environment):
            baseline = hand_written(environment, host)
            for contender, again in [
                (baseline, False),
                (baseline, True),
                *((contender, False) for contender in group),
            ]:
                remote = await stack.enter_async_context(worker(python_of(environment)))
                entrant = Entrant(contender, again, remote)
                await _try(entrant, load(entrant, url))
                await _try(entrant, check(entrant, url))
                entrant.broken = entrant.error
                ready.append(entrant)
        yield ready


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


async def _try(entrant: Entrant, doing: Awaitable[Values | None]) -> Values:
    """What it gives, or nothing: one that fails is out, and the others go on."""
    try:
        return await doing or {}
    except WorkerError as error:
        entrant.error = str(error)
        return {}


async def rounds(
    ready: list[Entrant], measure: Measure, *, repeat: int, shuffle: random.Random
) -> None:
    """Measure all entrants in random order, again and again; the first round does not count."""
    for entrant in ready:
        entrant.values.clear()
        entrant.error = entrant.broken
    for number in range(repeat + 1):
        for entrant in shuffle.sample(ready, len(ready)):
            if not entrant.error:
                found = await _try(entrant, measure(entrant))
                for name, value in found.items() if number else ():
                    entrant.values.setdefault(name, []).append(value)


def rows(ready: list[Entrant], case: str, database: str, concurrency: int = 1) -> list[Row]:
    """What the rounds of all entrants say, each against the hand-written code beside it."""
    found = []
    for environment, group in groupby(ready, lambda entrant: entrant.contender.environment):
        baseline, again, *others = group
        for entrant in (baseline, again, *others):
            row = Row(
                case,
                database,
                entrant.contender.host,
                environment,
                entrant.contender.name,
                concurrency,
                entrant.again,
                entrant.answers_first,
                {name: median(values) for name, values in entrant.values.items()},
                error=entrant.error or baseline.error or again.error,
            )
            # What is left behind is nothing, or nearly, and has no ratio.
            for name in () if row.error else row.values.keys() - {"left"}:
                row.ratios[name], row.null[name] = (
                    ratio(one.values[name], baseline.values[name]) for one in (entrant, again)
                )
            found.append(row)
    return found
