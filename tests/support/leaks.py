"""What a test must not leave behind: tasks, threads, connections, unclosed objects."""

import asyncio
import functools
import gc
import sys
import threading
import time
from collections.abc import AsyncIterator

import pytest
from asgiref.sync import SyncToAsync
from pytest_asyncio import is_async_test

from tests.support.databases import CLOSE_TIMEOUT, USED_URLS, leave_clean
from tests.support.reader import ServerConnection, is_postgres

THREAD_TIMEOUT = 1.0  # seconds in which a thread that was told to end has ended
LAST_TURNS = 10  # turns of the loop in which a cancelled or woken task can end


@pytest.fixture(autouse=True)
def nothing_left_behind(request: pytest.FixtureRequest) -> None:
    """Fail the test if something it has started is still there when everything has ended.

    First of the test's fixtures and therefore last to be undone: after its other fixtures, and
    after its event loop was closed, which may end connections and threads.
    """
    request.node.stash[USED_URLS] = []
    before = set(threading.enumerate())
    request.node.addfinalizer(functools.partial(_check, request.node, before))
    if is_async_test(request.node):
        request.getfixturevalue("no_task_left")


@pytest.fixture
async def no_task_left() -> AsyncIterator[None]:
    """Fail the test if a task that it has started is still running."""
    yield
    for _ in range(LAST_TURNS):
        await asyncio.sleep(0)
    if left := asyncio.all_tasks() - {asyncio.current_task()}:
        names = ", ".join(f"{task.get_name()} ({task.get_coro()!r})" for task in left)
        pytest.fail(f"the test left {len(left)} task(s) running: {names}", pytrace=False)


def _check(node: pytest.Item, threads_before: set[threading.Thread]) -> None:
    urls = node.stash[USED_URLS]
    may_stay = node.get_closest_marker("leaves_connections") is not None
    problems = []
    for url in urls:
        left = leave_clean(url, may_stay=may_stay)
        if left and not may_stay:
            problems.append(_describe(url, left))
    if threads := _left_threads(threads_before):
        names = ", ".join(thread.name for thread in threads)
        problems.append(f"{len(threads)} thread(s) running: {names}")
    if urls and (unclosed := _unclosed()):
        problems.append("unclosed objects: " + ", ".join(unclosed))
    if problems:
        pytest.fail(f"{node.nodeid} left " + "; and ".join(problems), pytrace=False)


def _unclosed() -> list[str]:
    """Collect the garbage; return the complaints of what was dropped without being closed."""
    complaints: list[str] = []
    # Not left to pytest's hook: after a failed teardown that blames the next test, and it keeps
    # the object alive, whose parts then blame the one after.
    pytests_hook = sys.unraisablehook
    sys.unraisablehook = lambda unraisable: complaints.append(str(unraisable.exc_value))
    try:
        gc.collect()
    finally:
        sys.unraisablehook = pytests_hook
    return complaints


def _describe(url: str, left: list[ServerConnection]) -> str:
    worst_first = sorted(left, key=lambda connection: not connection.in_transaction)
    each = ", ".join(f"{found.state} (last: {found.query!r})" for found in worst_first)
    server = "PostgreSQL" if is_postgres(url) else "MariaDB"
    return f"{len(left)} connection(s) to {server} open after {CLOSE_TIMEOUT} s: {each}"


def _left_threads(before: set[threading.Thread]) -> list[threading.Thread]:
    # asgiref keeps one idle thread for the life of the process.
    kept = before | SyncToAsync.single_thread_executor._threads
    started = [t for t in threading.enumerate() if t not in kept and not t.daemon]
    end = time.monotonic() + THREAD_TIMEOUT
    for thread in started:
        thread.join(max(0.0, end - time.monotonic()))
    return [thread for thread in started if thread.is_alive()]
