"""Thousands of requests of all kinds at the same time: the clients and the database agree.

A server process with small pools, a hundred clients of which many are impatient, slow or rude,
and an application that succeeds, fails, times out, streams, and starts tasks. Every request has a
number and writes its rows under it, so that at the end it can be asked of each whether what its
client knows is in the database. `make soak REQUESTS=10000` is a long one.

The kinds of requests are in `kinds.py`, the application in `app.py`, the clients in `client.py`.
What a soak has found has a test of its own where it belongs.
"""

import asyncio
import http.client
import itertools
import json
import os
import random
import re
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.soak.client import PATIENCE
from tests.soak.judgement import disagreements, surprises
from tests.soak.kinds import kinds_of
from tests.soak.load import Answer, choose, run
from tests.soak.server import REPORT
from tests.soak.tables import backend, broken_invariants, prepare, written, written_by
from tests.support.polling import block_until
from tests.support.reader import connect, connections, open_transactions
from tests.support.sockets import Process, free_port, serve_process

REQUESTS = int(os.environ.get("REPOM_SOAK_REQUESTS", "400"))
#: Chooses the requests. With the same one they are the same, though not their order in time.
SEED = int(os.environ.get("REPOM_SOAK_SEED") or random.SystemRandom().randrange(1, 10**6))

#: What Python, asyncio, SQLAlchemy and the drivers say of what was forgotten or went wrong.
COMPLAINTS = re.compile(
    r"UNEXPECTED|database is locked|\w*Warning\b|was never|was destroyed|garbage collector"
    r"|Exception ignored|unclosed|were terminated|Traceback"
)

#: What a server that nobody asks anything has exactly as much of as one that has just started.
AT_REST = ("connections checked out", "tasks", "open scopes", "open transactions")

#: Closed scopes and sessions that may still be referred to: by the contexts of pooled
#: connections, of idle threads, and of timers that asyncio has not thrown away yet.
KEPT = 250

#: How much more there may be after the last three quarters of the requests, however many they
#: are: caches fill, and threads start. Any object that a request left behind would have a
#: hundred others hanging on it.
OBJECTS, KIB = 12_000, 20_000

pytestmark = pytest.mark.timeout(60 + REQUESTS // 10)


class Server:
    """The process, as this one sees it."""

    def __init__(self, process: Process, url: str) -> None:
        self.process = process
        self.url = url

    def report(self) -> dict[str, Any]:
        """What there is in it; see `tests.soak.server`."""
        with closing(http.client.HTTPConnection(self.url.removeprefix("http://"))) as client:
            client.request("GET", REPORT)
            found: dict[str, Any] = json.loads(client.getresponse().read())
            return found

    def report_at_rest(self, idle: dict[str, Any]) -> dict[str, Any]:
        """The same, once it has ended what its clients have left behind, which must happen."""
        end = time.monotonic() + PATIENCE
        while True:
            found = self.report()
            if all(found[what] == idle[what] for what in AT_REST):
                return found
            assert time.monotonic() < end, f"seed {SEED}: it does not come to rest: {found}"
            time.sleep(0.1)


@contextmanager
def serving(url: str, *how: str) -> Iterator[Server]:
    port = free_port()
    base_url = f"http://127.0.0.1:{port}"
    args = ["-X", "dev", "-W", "error", "-m", "tests.soak.server", str(port), *how]
    env = {"REPOM_DATABASE_URL": url, "PYTHONPATH": str(Path(__file__).parents[2])}
    with serve_process(args, env, ready_url=f"{base_url}/nothing/0", deadline=60) as process:
        yield Server(process, base_url)


def test_clients_and_database_agree(database_url: str) -> None:
    """What a client was told is in the database, at once and at the end; nothing is left open,
    in the server and in the database; memory does not grow; the log has no surprises."""
    prepare(database_url)
    chance = random.Random(SEED)
    how = chance.choice(["asyncio", "uvloop"]), chance.choice(["h11", "httptools"])
    requests = choose(kinds_of(backend(database_url)), REQUESTS, chance)
    problems: list[str] = []
    with closing(connect(database_url)) as reader, serving(database_url, *how) as server:

        def look(answer: Answer) -> None:
            problems.extend(surprises(answer))
            if answer.seen.complete:
                found = written_by(reader, answer.request.number)
                problems.extend(disagreements(answer, found, at_once=True))

        idle = server.report()
        begun = time.monotonic()
        answers = asyncio.run(run(server.url, itertools.islice(requests, REQUESTS // 4), look))
        warm = server.report_at_rest(idle)
        answers += asyncio.run(run(server.url, requests, look))
        seconds = time.monotonic() - begun
        end = server.report_at_rest(idle)
        if backend(database_url) != "sqlite":
            assert open_transactions(database_url) == 0
    output = server.process.output()
    problems += _at_the_end(answers, database_url)
    _tell(database_url, how, answers, seconds, warm, end, problems)
    assert problems == [], f"seed {SEED}"
    assert COMPLAINTS.search(output) is None, f"seed {SEED}: {output}"
    assert end["unexpected in the log"] == 0
    assert end["scopes"] <= KEPT
    assert end["sessions"] <= KEPT
    assert end["objects"] - warm["objects"] < OBJECTS
    assert end["KiB"] - warm["KiB"] < KIB
    if backend(database_url) != "sqlite":
        block_until(lambda: not connections(database_url))


def _at_the_end(answers: list[Answer], url: str) -> list[str]:
    """What is wrong in the database, now that nobody writes any more."""
    found: dict[int, dict[str, int]] = {}
    for (request, part), count in written(url).items():
        found.setdefault(request, {})[part] = count
    problems = broken_invariants(url)
    for answer in answers:
        problems += disagreements(answer, found.pop(answer.request.number, {}))
    return problems + [f"nobody has asked for {rows}" for rows in found.items()]


def _tell(
    url: str,
    how: tuple[str, ...],
    answers: list[Answer],
    seconds: float,
    warm: dict[str, Any],
    end: dict[str, Any],
    problems: list[str],
) -> None:
    """Print what has happened: pytest shows it where a test fails, `make soak` always."""
    print(f"\n{backend(url)}, uvicorn with {' and '.join(how)}, seed {SEED}")
    print(f"{len(answers)} requests in {seconds:.0f} s, {len(problems)} problem(s)")
    outcomes = Counter(str(answer.seen) for answer in answers)
    print(", ".join(f"{outcome}: {count}" for outcome, count in sorted(outcomes.items())))
    for what in ("objects", "KiB", "scopes", "sessions", "threads"):
        print(f"{what}: {warm[what]} after a quarter of them, {end[what]} at the end")
    for pattern, count in end["expected in the log"].items():
        print(f"{count:6} x {pattern}")
    print("\n".join(problems[:30]))
