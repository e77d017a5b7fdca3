"""Runs the suites in the folder `inner` as an application has them: in a pytest of their own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

INNER = Path(__file__).parent / "inner"
ROOT = Path(__file__).parents[2]


@dataclass
class Run:
    """How a run of pytest has ended.

    Attributes:
        output: all that was printed.
        outcomes: how many tests there were of each outcome.
    """

    output: str
    outcomes: dict[str, int]

    def assert_passed(self) -> None:
        """All tests have passed, or were skipped, and nothing else is to be said."""
        assert self.outcomes.keys() <= {"passed", "skipped", "warning"}, self.output
        assert self.outcomes.get("passed"), self.output
        assert "Traceback" not in self.output, self.output


def source(name: str) -> str:
    """The text of a file in `inner`."""
    return (INNER / f"{name}.py").read_text()


#: Settings of pytest-asyncio, one of which it warns about if it is missing.
ASYNCIO = {"asyncio_mode": "auto", "asyncio_default_fixture_loop_scope": "function"}


def write(folder: Path, *suites: str, ini: Mapping[str, str] = ASYNCIO, **files: str) -> None:
    """Put tests into `folder`, and a `conftest.py`.

    Args:
        folder: where it can be run.
        suites: names of files in `inner`.
        ini: for `pytest.ini`.
        files: further files, or others in place of those; by name, without ".py".
    """
    files.setdefault("conftest", source("fixtures"))
    files |= {f"test_{suite}": source(suite) for suite in suites}
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
    lines = [f"{name} = {value}" for name, value in {"filterwarnings": "error", **ini}.items()]
    (folder / "pytest.ini").write_text("\n".join(["[pytest]", *lines]) + "\n")


def run(folder: Path, url: str, *args: str) -> Run:
    """Run pytest in `folder`, with `url` as the configured database."""
    environ = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--color=no", *args],
        cwd=folder,
        env=environ | {"REPOM_DATABASE_URL": url, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    output = result.stdout + result.stderr
    summary = result.stdout.splitlines()[-1] if result.stdout else ""
    found = re.findall(r"(\d+) (passed|skipped|failed|error|warning|xfailed)", summary)
    return Run(output, {kind: int(number) for number, kind in found})
