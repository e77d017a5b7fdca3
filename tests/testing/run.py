"""Runs a suite of tests as an application has it, in a pytest of its own."""

import os
import subprocess
import sys
from pathlib import Path

INNER = Path(__file__).parent / "inner"


def run_suite(folder, suite, url, *args, ini="", env=()):
    for name in ("app", "conftest"):
        (folder / f"{name}.py").write_text((INNER / f"{name}.py").read_text())
    (folder / f"test_{suite}.py").write_text((INNER / f"{suite}.py").read_text())
    (folder / "pytest.ini").write_text(
        "[pytest]\nasyncio_mode=auto\nasyncio_default_fixture_loop_scope=function\nfilterwarnings=error\n" + ini
    )
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *args],
        cwd=folder,
        env={"PATH": "", "REPOM_DATABASE_URL": url, **dict(env)},
        capture_output=True,
        text=True,
    )
