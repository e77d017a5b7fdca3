"""Makes the virtual environments: `python -m benchmarks.environments`.

There is one for each file in requirements/, `.venv-bench-<name>` at the repository's top. Made
with the newest Python that is found, or with the one that `BENCH_PYTHON` names; made again when
the file or the Python changes. Uses the standard library alone, since it runs before anything is
installed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
REQUIREMENTS = Path(__file__).parent / "requirements"

#: Has what draws and reports, and no contender.
RUNNER = "runner"

_VERSIONS = ("3.13", "3.12", "3.11")


def names() -> list[str]:
    """Of all environments."""
    return sorted(path.stem for path in REQUIREMENTS.glob("*.txt") if path.stem != "common")


def python_of(name: str) -> Path:
    """The interpreter of an environment."""
    return ROOT / f".venv-bench-{name}" / "bin" / "python"


def is_there(name: str) -> bool:
    """Whether the environment could be made."""
    return (python_of(name).parent.parent / "complete").exists()


def make(name: str, python: str) -> bool:
    """Make the environment unless it is there already; whether it can be used."""
    folder = python_of(name).parent.parent
    complete = folder / "complete"
    files = [REQUIREMENTS / f"{file}.txt" for file in ("common", name)]
    wanted = "\n".join([_version(python), *(file.read_text() for file in files)])
    if complete.exists() and complete.read_text() == wanted:
        return True
    print(f"Installing benchmarks/requirements/{name}.txt into {folder.name} ...", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([python, "-m", "venv", folder], check=True)
    pip = [str(python_of(name)), "-m", "pip", "--disable-pip-version-check", "--quiet"]
    pins = ["--requirement", str(REQUIREMENTS / f"{name}.txt")]
    if subprocess.run([*pip, "install", *pins]).returncode:
        return False
    complete.write_text(wanted)
    return True


def _interpreters() -> Iterator[str]:
    """Of the PATH, then those that pyenv has installed; what does not run is left out."""
    if given := os.environ.get("BENCH_PYTHON"):
        yield given
        return
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    for version in _VERSIONS:
        if found := shutil.which(f"python{version}"):
            yield found
        yield from map(str, sorted(pyenv.glob(f"{version}.*/bin/python"), reverse=True))
    yield sys.executable


def _version(python: str) -> str:
    """`python`'s version, or an empty text if it does not run."""
    code = "import ensurepip, sys, venv; print(sys.version)"
    try:
        run = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return run.stdout.strip()


def main() -> None:
    """Make all environments. A contender whose own cannot be made is left out of the run."""
    python = next((python for python in _interpreters() if _version(python)), None)
    if python is None:
        sys.exit("No Python 3.11 or newer with venv was found; name one in BENCH_PYTHON.")
    for name in names():
        if not make(name, python):
            if name in (RUNNER, "repom"):
                sys.exit(f"benchmarks/requirements/{name}.txt cannot be installed.")
            print(f"{name} cannot be installed with {_version(python)}, and is left out.")


if __name__ == "__main__":
    main()
