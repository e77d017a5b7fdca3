"""Waiting for what happens elsewhere, in another thread, process or server."""

import asyncio
import time
from collections.abc import Callable

DEADLINE = 10.0  # seconds
PAUSE = 0.002


async def until(condition: Callable[[], bool]) -> None:
    """Wait until `condition` holds; fail the test if it never does."""
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end, "it never happened"
        await asyncio.sleep(PAUSE)


def block_until(condition: Callable[[], bool]) -> None:
    """The same, where no loop runs or none shall run meanwhile."""
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(PAUSE)
