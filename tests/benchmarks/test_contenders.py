"""The contenders of the benchmarks do the same work, or their times mean nothing.

Those of the peers run in environments of their own; `make bench` checks them in the same way.
"""

import sys
from pathlib import Path

import pytest

from benchmarks.contenders import CONTENDERS, HOSTS, Contender, hand_written
from benchmarks.databases import fill
from benchmarks.entrants import Entrant, check, load
from benchmarks.processes import worker
from repom.async_session import convert_to_async_uri

MINE = [
    *(hand_written("repom", host) for host in HOSTS),
    *(contender for contender in CONTENDERS if contender.environment == "repom"),
]


@pytest.mark.parametrize("contender", MINE, ids=lambda contender: contender.build)
async def test_it_answers_as_the_others_do_and_commits_first(
    contender: Contender, sqlite_url: str
) -> None:
    """Every case has its one right answer; the row is there before the client is told so."""
    url = convert_to_async_uri(sqlite_url)
    await fill(url)

    async with worker(Path(sys.executable)) as remote:
        entrant = Entrant(contender)
        entrant.remote = remote
        await load(entrant, url)
        await check(entrant, url)

    assert not entrant.answers_first
