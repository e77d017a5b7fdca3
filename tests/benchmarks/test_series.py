"""What the benchmarks make of their rounds, and of the processes that they start anew."""

import asyncio
import random

from benchmarks.contenders import CONTENDERS
from benchmarks.entrants import Entrant, Heading, Values, entrants, rounds, rows
from benchmarks.processes import WorkerError

SELECT = Heading("select")


def field() -> list[Entrant]:
    """The hand-written code, once again, and repom, without a process."""
    return entrants([c for c in CONTENDERS if (c.name, c.host) == ("repom", "asgi")])


def run_series(field: list[Entrant], *given: dict[str, list[float]]) -> None:
    """One series after the other; `given` says by application what its rounds give in each."""

    def name(entrant: Entrant) -> str:
        return "again" if entrant.again else entrant.contender.name

    async def all_series() -> None:
        for series in given:
            left = {key: list(values) for key, values in series.items()}

            async def measure(entrant: Entrant) -> Values:
                if not (values := left[name(entrant)]):  # noqa: B023 - called at once
                    raise WorkerError("it died")
                return {"cpu": values.pop(0)}

            repeat = len(series["hand-written"])
            await rounds(field, SELECT, measure, repeat=repeat, shuffle=random.Random(0))

    asyncio.run(all_series())


def test_the_hand_written_code_comes_first_and_once_again() -> None:
    """Whatever stands beside it in its environment is compared with it."""
    assert [(e.contender.name, e.again) for e in field()] == [
        ("hand-written", False),
        ("hand-written", True),
        ("repom", False),
    ]


def test_a_process_counts_once_however_many_rounds_it_had() -> None:
    """One that is slow by chance, because of where its memory lies, is one of three."""
    found = field()
    usual: dict[str, list[float]] = {"hand-written": [2.0] * 9, "again": [2.0] * 9}

    once: dict[str, list[float]] = {"hand-written": [2.0], "again": [2.0]}

    run_series(found, {**once, "repom": [1.0]}, {**usual, "repom": [7.0] * 9})
    run_series(found, {**once, "repom": [1.0]})

    repom = rows(found, SELECT, "sqlite")[-1]
    assert repom.values == {"cpu": 1.0}
    assert repom.ratios["cpu"].median == 0.5
    assert repom.null["cpu"].median == 1.0


def test_one_that_fails_is_out_and_the_others_go_on() -> None:
    """Its row says why; without the hand-written code nobody would have a ratio."""
    found = field()

    run_series(found, {"hand-written": [2.0, 2.0], "again": [2.0, 2.0], "repom": [1.0]})
    run_series(found, {"hand-written": [2.0], "again": [2.0], "repom": [1.0]})

    hand, again, repom = rows(found, SELECT, "sqlite")
    assert repom.error == "it died"
    assert not repom.ratios
    assert hand.ratios["cpu"].median == again.ratios["cpu"].median == 1.0
