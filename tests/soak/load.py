"""Many requests at the same time, chosen by a seed, and what their clients know at the end."""

import asyncio
import random
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from tests.soak.client import Client, Manners, Request
from tests.soak.kinds import Kind, Seen
from tests.soak.layers import LIMIT, WHEN_GONE
from tests.soak.tables import ACCOUNTS

#: Clients at the same time.
CONCURRENCY = 100


class Answer(NamedTuple):
    """A request, and what its client has seen of the response."""

    request: Request
    seen: Seen


def choose(kinds: Sequence[Kind], count: int, chance: random.Random) -> Iterator[Request]:
    """Choose requests; each kind comes as often as its share says, in a random order."""
    deck: list[Kind] = []
    for number in range(count):
        if not deck:
            deck = [kind for kind in kinds for _ in range(kind.share)]
            chance.shuffle(deck)
        kind = deck.pop()
        headers = _headers(chance)
        yield Request(
            number, kind, _query(kind, chance), headers, _body(kind, chance), _manners(kind, chance)
        )


def _query(kind: Kind, chance: random.Random) -> str:
    values: dict[str, object] = {
        name: round(most * chance.random() ** 2, 4) for name, most in kind.query.items()
    }
    if kind.name == "transfer":
        source, target = chance.sample(range(1, ACCOUNTS + 1), 2)
        if chance.random() < 0.95:  # and the others can meet in a deadlock
            source, target = sorted((source, target))
        values = {"source": source, "target": target, "amount": chance.randint(-99, 99)}
    return "&".join(f"{name}={value}" for name, value in values.items())


def _headers(chance: random.Random) -> dict[str, str]:
    return chance.choices(
        [
            {},
            {LIMIT: f"{0.1 * chance.random() ** 2:.4f}"},
            {WHEN_GONE: str(chance.randint(1, 3))},
        ],
        weights=[5, 1, 4],
    )[0]


def _body(kind: Kind, chance: random.Random) -> bytes:
    return b"" if kind.method == "GET" else b"x" * chance.choice((0, 10, 1000, 20_000))


def _manners(kind: Kind, chance: random.Random) -> Manners:
    rudely = chance.random() < 0.5
    moment = 0.2 * chance.random() ** 2
    leaving = [
        Manners(sends=chance.random(), waits=moment, rudely=rudely),
        Manners(waits=moment, rudely=rudely),
        Manners(reads=0, rudely=rudely),
        Manners(reads=chance.choice((1, 150, 5000)), rudely=rudely),
    ]
    if kind.endless:
        return chance.choice(leaving[1:])
    staying = [Manners(), Manners(rudely=True), Manners(slowly=True)]
    return chance.choices([*staying, *leaving], weights=[60, 4, 6, 5, 10, 5, 5])[0]


async def run(
    base_url: str, orders: Iterator[Request], look: Callable[[Answer], None]
) -> list[Answer]:
    """Send them all; `look` is called with each answer as soon as it is there."""
    answers: list[Answer] = []

    async def work() -> None:
        client = Client(base_url)
        try:
            for request in orders:
                answer = Answer(request, await client.ask(request))
                answers.append(answer)
                look(answer)
        finally:
            await client.close(rudely=True)

    async with asyncio.TaskGroup() as workers:
        for _ in range(CONCURRENCY):
            workers.create_task(work())
    return answers
