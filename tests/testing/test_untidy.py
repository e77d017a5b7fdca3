"""Tests that leave something behind, or do away with the connection: see `inner/untidy.py`.

The test that does so fails, and says which line of its own is to blame. The next one is as if
nothing had been.
"""

import re
from pathlib import Path

from tests.testing.suites import ASYNCIO, Run, run, source, write

LEAKS = {
    "test_leaks_an_async_session": 1,
    "test_leaks_a_sync_session": 2,
    "test_leaks_a_connection": 3,
    "test_leaks_a_connection_of_which_nobody_knows": 4,
    "test_leaves_a_task_running": 5,
}


def said_of(test: str, done: Run) -> str:
    """What was said when `test` was torn down."""
    pattern = rf"_ ERROR at teardown of {test} _+\n(.*?)\n(?:_____|=====)"
    found = re.search(pattern, done.output, re.DOTALL)
    return found.group(1) if found else ""


def test_tests_that_leave_something_behind(tmp_path: Path, tested_url: str) -> None:
    """They are the only ones that fail, with the place where each leak was opened."""
    write(tmp_path, "untidy")
    done = run(tmp_path, tested_url)
    lines = source("untidy").splitlines()
    for test, number in LEAKS.items():
        line = next(n for n, text in enumerate(lines, 1) if text.endswith(f"# leak {number}"))
        said = said_of(test, done)
        assert f"{test} left 1 session(s) or connection(s) open" in said, done.output
        assert re.search(rf"^  test_untidy.py:{line}$", said, re.MULTILINE), said
    lost = ["test_ends_the_transaction_by_the_driver", "test_closes_the_connection"]
    if tested_url.startswith("sqlite"):
        lost.append("test_rolls_back_by_a_statement")
    for test in lost:
        said = said_of(test, done)
        assert f"{test} has closed its connection, or ended the transaction" in said, done.output
    assert done.outcomes["error"] == len(LEAKS) + len(lost), done.output
    assert "failed" not in done.outcomes, done.output


def test_what_is_different_is_said(tmp_path: Path, tested_url: str) -> None:
    """Work that would have stayed with a connection for each unit of work: a warning names the
    places of both. Where nothing is different, there is none."""
    write(tmp_path, "differences", ini=ASYNCIO | {"filterwarnings": "default"})
    done = run(tmp_path, tested_url, "-W", "error::DeprecationWarning")
    lines = source("differences").splitlines()
    said = re.findall(r"test_differences.py:(\d+).*test_differences.py:(\d+)", done.output)
    expected = []
    for number in (3,) if tested_url.startswith("sqlite") else (1, 2, 3, 4):
        inner, outer = (
            next(str(n) for n, text in enumerate(lines, 1) if text.endswith(f"# {kind} {number}"))
            for kind in ("inner", "outer")
        )
        expected.append((inner, outer))
    assert sorted(said) == sorted(expected), done.output
    assert done.output.count("SharedConnectionWarning: test_differences.py::") == len(expected)
    assert not done.outcomes.keys() & {"failed", "error"}, done.output
