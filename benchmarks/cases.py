"""The cases: what is asked of the workers, and in how many rounds."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from benchmarks import cost, machine
from benchmarks.contenders import HAND_WRITTEN, Contender, hand_written
from benchmarks.entrants import Entrant, Heading, Measure, Values, load, rounds
from benchmarks.environments import python_of
from benchmarks.processes import Remote, WorkerError, worker
from benchmarks.results import Row
from benchmarks.statistics import exactly

#: One request after the other, in process: the endpoint has the case's name.
SEQUENTIAL = ("nothing", "select", "insert", "mixed", "service")
CASES = (*SEQUENTIAL, "pool", "growth", "memory", "sockets", "instructions", "resident")

IN_FLIGHT = 500  # requests of the case `pool`
CONNECTIONS = 32  # of the case `sockets`


@dataclass(frozen=True)
class Effort:
    """How long a run takes.

    Attributes:
        series: of the sequential cases, by host: each in new processes. On the bare host are few
            contenders, and the budget is decided there.
        rounds: in each of these series.
        seconds: for which the hand-written code runs in each round, and as long before it counts.
            In the first 50 ms after a pause Linux has the application and its database server on
            one core, where a round trip costs half of what it does when both are busy.
        repeats: series of the other cases, which take longer, and have one round each.
        requests: after which the memory is looked at again.
        traced: requests whose memory is traced.
        levels: requests in flight in the case `growth`.
        machine: whether machine instructions are counted too, which takes minutes.
    """

    series: Mapping[str, int]
    rounds: int
    seconds: float
    repeats: int
    requests: int
    traced: int
    levels: tuple[int, ...]
    machine: bool


FULL = Effort(
    {"asgi": 16, "fastapi": 6},
    1,
    0.3,
    6,
    100_000,
    100,
    (1, 10, 100, 500, 2000),
    machine=True,
)
SHORT = Effort(
    {"asgi": 6, "fastapi": 6}, 1, 0.1, 1, 10_000, 20, (1, 10, 100, 500, 2000), machine=False
)
QUICK = Effort({"asgi": 2, "fastapi": 2}, 1, 0.02, 1, 1_000, 8, (1, 500), machine=False)
#: For the two contenders that the budget is about.
DECISIVE = replace(FULL, series={"asgi": 40})
EFFORTS = {"decisive": DECISIVE, "full": FULL, "short": SHORT, "quick": QUICK}


@dataclass(frozen=True)
class Conditions:
    """What the cases need to know besides their entrants."""

    effort: Effort
    shuffle: random.Random
    load: Remote

    async def compare(
        self,
        ready: list[Entrant],
        heading: Heading,
        measure: Measure,
        repeat: int = 1,
    ) -> None:
        """Measure, in `repeat` rounds."""
        await rounds(ready, heading, measure, repeat=repeat, shuffle=self.shuffle)

    async def count(self, ready: list[Entrant], endpoint: str) -> int:
        """How many requests the hand-written code answers in the seconds of a round.

        All of them answer as many meanwhile, so that nobody has had more to get warm.
        """
        found = []
        for entrant in ready:
            if not entrant.broken:
                try:
                    found.append(await run(endpoint, 100, before=20)(entrant))
                except WorkerError:
                    continue  # the rounds will meet it, too, and say so
        return max(10, round(self.effort.seconds / found[0]["wall"])) if found else 10


def run(endpoint: str, count: int, concurrency: int = 1, *, before: int | None = None) -> Measure:
    """In process, without HTTP; `before`, and else as many again, do not count."""

    async def measure(entrant: Entrant) -> Values:
        found: Values = await entrant.remote.ask(
            "run",
            app=entrant.app,
            endpoint=endpoint,
            count=count,
            concurrency=concurrency,
            before=count if before is None else before,
        )
        return found

    return measure


async def sequential(ready: list[Entrant], case: str, conditions: Conditions) -> None:
    """One request after the other; the case has the endpoint's name."""
    count = await conditions.count(ready, case)
    await conditions.compare(ready, Heading(case), run(case, count), conditions.effort.rounds)


async def pool(ready: list[Entrant], case: str, conditions: Conditions) -> None:
    """Fifty times as many requests in flight as there are connections."""
    measure = run("select", IN_FLIGHT, IN_FLIGHT)
    await conditions.compare(ready, Heading(case, IN_FLIGHT), measure)


async def growth(ready: list[Entrant], case: str, conditions: Conditions) -> None:
    """More and more requests in flight."""
    for level in conditions.effort.levels:
        measure = run("select", max(100, level), level)
        await conditions.compare(ready, Heading(case, level), measure)


async def memory(ready: list[Entrant], case: str, conditions: Conditions) -> None:
    """What one request allocates at the most, and what it leaves."""

    def allocate(endpoint: str) -> Measure:
        async def measure(entrant: Entrant) -> Values:
            found: Values = await entrant.remote.ask(
                "memory",
                app=entrant.app,
                endpoint=endpoint,
                count=conditions.effort.traced,
            )
            return found

        return measure

    for endpoint in ("nothing", "select", "insert"):
        await conditions.compare(ready, Heading(f"{case} {endpoint}"), allocate(endpoint))


async def sockets(ready: list[Entrant], case: str, conditions: Conditions) -> None:
    """uvicorn in the worker's process, and the load from another one."""

    def fire(endpoint: str, count: int) -> Measure:
        async def measure(entrant: Entrant) -> Values:
            if not entrant.port:
                entrant.port = await entrant.remote.ask("serve", app=entrant.app)
            for _ in range(2):  # the first time does not count
                before = await entrant.remote.ask("cpu")
                found: Values = await conditions.load.ask(
                    "fire",
                    port=entrant.port,
                    endpoint=endpoint,
                    count=count,
                    connections=CONNECTIONS,
                )
                cpu = (await entrant.remote.ask("cpu") - before) / count
            return {**found, "cpu": cpu}

        return measure

    for endpoint in ("nothing", "select", "insert"):
        count = min(2000, max(8 * CONNECTIONS, await conditions.count(ready, endpoint)))
        await conditions.compare(ready, Heading(f"{case} {endpoint}"), fire(endpoint, count))


async def instructions(url: str, database: str, effort: Effort) -> list[Row]:
    """Python's own instructions, and the machine's, for repom and the same code by hand."""
    async with worker(python_of("repom")) as remote:
        found = await remote.ask("instructions", url=url)
    counted = [
        Row(
            f"instructions {case}",
            database,
            "asgi",
            "repom",
            contender,
            values=values,
            ratios={
                name: exactly(value / by[HAND_WRITTEN][name])
                for name, value in values.items()
                if by[HAND_WRITTEN][name]
            },
        )
        for case, by in found.items()
        for contender, values in by.items()
    ]
    if effort.machine and machine.is_there():
        for hand, repom in zip(counted[::2], counted[1::2], strict=True):
            case = hand.case.removeprefix("instructions ")
            by_hand, ours_of_case = cost.COMPARED
            if case == cost.READ:
                case, ours_of_case = "select", cost.READ_ONLY
            first, again, ours = [
                await machine.instructions(python_of("repom"), contender, url, case)
                for contender in (by_hand, by_hand, ours_of_case)
            ]
            hand.values["machine"], repom.values["machine"] = first, ours
            repom.ratios["machine"] = exactly(ours / first)
            repom.null["machine"] = exactly(again / first)
    return counted


async def resident(
    contenders: Iterable[Contender], url: str, database: str, effort: Effort
) -> list[Row]:
    """The memory of a process that serves many requests; each contender has its own."""
    found = []
    for contender in (hand_written("repom", "fastapi"), *contenders):
        if contender.host != "fastapi":
            continue
        async with worker(python_of(contender.environment)) as remote:
            entrant = Entrant(contender)
            entrant.remote = remote
            row = Row("resident", database, "fastapi", contender.environment, contender.name)
            early = effort.requests // 10
            try:
                await load(entrant, url)
                await run("select", early, before=0)(entrant)
                row.values["early"] = await remote.ask("resident")
                await run("select", effort.requests - early, before=0)(entrant)
                row.values["late"] = await remote.ask("resident")
            except WorkerError as error:
                row.error = str(error)
            found.append(row)
    return found


#: Everybody takes part in each round, and there are many series.
TOGETHER = dict.fromkeys(SEQUENTIAL, sequential)

#: One environment at a time. Every entrant fills its pool here, and a database server has 100
#: connections, or 150, and not one for each of all the pools.
APART = {"pool": pool, "growth": growth, "memory": memory, "sockets": sockets}
