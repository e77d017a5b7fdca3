"""Python's own instructions for a request, counted: `python -m benchmarks.cost`.

The count is exact: the same code gives the same number each time, on every machine. So a test can
hold it against the ratios in `cost.json`, which is written by `python -m benchmarks.cost --update`.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import sys
from asyncio import base_events
from collections import Counter
from contextlib import AsyncExitStack
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import sqlalchemy

from benchmarks import databases
from benchmarks.client import Request, started
from benchmarks.contenders import CONTENDERS, HAND_WRITTEN, hand_written
from benchmarks.hosts import ASGIApp

#: Hand-written code and repom, on the bare host: nothing else is in the count.
REPOM = "repom"
COMPARED = (
    hand_written("repom", "asgi"),
    next(found for found in CONTENDERS if found.name == REPOM and found.host == "asgi"),
)
CASES = ("nothing", "select", "insert")

#: The same, but that its GET requests only read; what is written down of it is its `select`.
READ_ONLY = next(found for found in CONTENDERS if found.name == "repom, read_only")
READ = "select, read_only"

STORED = Path(__file__).with_name("cost.json")

#: Requests before anything is counted: caches are filled, and the pool has its connection.
_WARM_UP = 20
_COUNTED = 5

_ONE_TURN: CodeType = base_events.BaseEventLoop._run_once.__code__  # type: ignore[attr-defined]


class Cost:
    """What one request takes, counted inside `with`.

    Attributes:
        by_function: the instructions of this thread. What the database's driver does in C, or
            in a thread of its own, is not in them.
        turns: of the event loop: how often the request waits for the driver.
    """

    def __init__(self) -> None:
        self.by_function: Counter[CodeType] = Counter()
        self.turns = 0
        self._other: Any = None

    @property
    def instructions(self) -> int:
        """Of all functions."""
        return self.by_function.total()

    def __enter__(self) -> Cost:
        self._other = sys.gettrace()  # of a debugger, or of coverage
        sys.settrace(self._enter)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._other)

    def _enter(self, frame: FrameType, event: str, argument: object) -> Any:
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        self.turns += frame.f_code is _ONE_TURN
        return self._count

    def _count(self, frame: FrameType, event: str, argument: object) -> Any:
        if event == "opcode":
            self.by_function[frame.f_code] += 1
        return self._count


async def cost(app: ASGIApp, endpoint: str, state: dict[str, Any]) -> Cost:
    """The cost of one request to an application that is warm."""
    costs: list[Cost] = []
    gc.collect()
    gc.disable()  # finalizers of what others have left would be counted
    try:
        for number in range(_WARM_UP + _COUNTED):
            request = Request(endpoint, number, state)
            # From the first on: what tracing itself instruments is instrumented then.
            with Cost() as counted:
                await request.run(app)
            costs.append(counted)
    finally:
        gc.enable()
    return sorted(costs[-_COUNTED:], key=lambda cost: cost.instructions)[_COUNTED // 2]


async def costs(url: str) -> dict[str, dict[str, Cost]]:
    """By case and contender, for the filled database at `url`."""
    found: dict[str, dict[str, Cost]] = {case: {} for case in CASES}
    async with AsyncExitStack() as stack:
        for contender in COMPARED:
            app = contender.app(url, {})
            state = await stack.enter_async_context(started(app))
            for case in CASES:
                found[case][contender.name] = await cost(app, case, state)
        app = READ_ONLY.app(url, {})
        state = await stack.enter_async_context(started(app))
        read = await cost(app, "select", state)
    return {**found, READ: {HAND_WRITTEN: found["select"][HAND_WRITTEN], REPOM: read}}


def where(cost: Cost, baseline: Cost) -> list[tuple[str, int]]:
    """The functions, and their instructions more than in the baseline; the largest first."""
    more = Counter(cost.by_function)
    more.subtract(baseline.by_function)
    return [
        (f"{code.co_qualname}  {'/'.join(Path(code.co_filename).parts[-3:])}", difference)
        for code, difference in sorted(more.items(), key=lambda item: -abs(item[1]))
        if difference
    ]


#: What the modules of repom do for a request.
_PARTS = {
    "the response: message by message": ("exchange", "so_far", "response", "policy", "session"),
    "the unit of work, and its session": (
        *("scope", "participant", "registry", "database", "current", "loops", "callbacks"),
        *("context", "sessionmakers", "engine_factory", "begin", "session_events", "awaited_pool"),
    ),
    "one task at a time": (
        *("gate", "operations", "blocks", "savepoints", "connection", "cursors", "turn"),
        "managed",
    ),
    "changes that a sibling would lose": ("lost_changes",),
    "COMMIT, whatever happens meanwhile": ("finish", "ending", "shield", "limit", "deferred"),
    "greenlets that are used again": ("greenlets",),
    "fewer round trips and steps of threads": ("pipelined_begin", "aiosqlite_cursor"),
    "what the database really did": ("base", "postgresql", "mysql", "sqlite", "write_queue"),
}


def part_of(code: CodeType) -> str:
    """What a function is a part of: one of repom, or whose it is."""
    path = Path(code.co_filename)
    if path.parent.name in ("contenders", "benchmarks"):
        return "the application"
    if {"repom", "middleware"} & set(path.parts[-3:-1]) and "site-packages" not in path.parts:
        return next(
            (f"repom: {part}" for part, names in _PARTS.items() if path.stem in names),
            "repom: other",
        )
    if "sqlalchemy" in path.parts or "greenlet" in path.parts or path.name == "<string>":
        return "SQLAlchemy"
    return "asyncio" if "asyncio" in path.parts or path.stem == "selectors" else "driver, other"


def parts(cost: Cost) -> Counter[str]:
    """The instructions of a request by what they are for."""
    found: Counter[str] = Counter()
    for code, count in cost.by_function.items():
        found[part_of(code)] += count
    return found


def ratios(found: dict[str, dict[str, Cost]]) -> dict[str, dict[str, float]]:
    """repom's cost in hand-written requests: instructions, and turns where there are any."""
    return {
        case: {
            what: round(getattr(by[REPOM], what) / getattr(by[HAND_WRITTEN], what), 3)
            for what in ("instructions", "turns")
            if getattr(by[HAND_WRITTEN], what)
        }
        for case, by in found.items()
    }


def versions() -> str:
    """What the ratios depend on: Python and SQLAlchemy, without their patch releases."""
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    return f"{python}-{'.'.join(sqlalchemy.__version__.split('.')[:2])}"


def stored() -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    """The ratios of `cost.json`: by versions, database and case."""
    known: dict[str, dict[str, dict[str, dict[str, float]]]] = json.loads(STORED.read_text())
    return known


async def main() -> None:
    """Print the costs; write the ratios down if that is asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cost", description=__doc__)
    parser.add_argument("--database", action="append", choices=databases.KINDS)
    parser.add_argument("--url", help="only this database, which is empty; prints the ratios")
    parser.add_argument("--update", action="store_true", help="write the ratios to cost.json")
    parser.add_argument("--parts", action="store_true", help="a table of what they are for")
    parser.add_argument(
        "--where", type=int, default=0, metavar="N", help="the N functions that differ most"
    )
    options = parser.parse_args()
    if options.url:
        from repom.async_session import convert_to_async_uri

        url = convert_to_async_uri(options.url)
        await databases.fill(url)
        print(json.dumps(ratios(await costs(url))))
        return
    new: dict[str, dict[str, dict[str, float]]] = {}
    for kind in options.database or databases.KINDS:
        async with databases.filled(kind) as url:
            found = await costs(url)
        new[kind] = ratios(found)
        for case, by in found.items():
            hand, repom = by[HAND_WRITTEN], by[REPOM]
            print(
                f"{kind:10} {case:17} hand-written {hand.instructions:6.0f} instructions,"
                f" {hand.turns:2.0f} turns; repom {repom.instructions:6.0f},"
                f" {repom.turns:2.0f}; x{new[kind][case]['instructions']:.3f}"
            )
            if options.parts:
                by_hand, ours = parts(hand), parts(repom)
                for part in sorted(by_hand | ours):
                    print(f"    {by_hand[part]:6} {ours[part]:6}  {part}")
            for function, difference in where(repom, hand)[: options.where]:
                print(f"    {difference:+6} {function}")
    if options.update:
        known = stored() if STORED.exists() else {}
        known.setdefault(versions(), {}).update(new)
        STORED.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    asyncio.run(main())
