"""The fixtures of `repom.testing`, used as an application's own tests use them.

Each test here is a run of pytest, and the behaviours are the tests of that: see the folder
`inner`, whose files begin with what they are about. All of them run on each kind of database.

More of this: test_untidy.py (tests that leave something behind), test_loops.py (plugins and event
loops), test_workers.py (pytest-xdist), test_drivers.py.
"""

from pathlib import Path

import pytest

from tests.support.reader import rows
from tests.testing.suites import run, write


@pytest.mark.parametrize("suite", ["requests", "units", "read_only"])
def test_suite(tmp_path: Path, tested_url: str, suite: str) -> None:
    """All its tests pass, and none has left a row."""
    write(tmp_path, suite)
    run(tmp_path, tested_url).assert_passed()
    if tested_url != "sqlite://":
        assert rows(tested_url, "SELECT * FROM users") == []
        assert rows(tested_url, "SELECT * FROM orders") == []
