"""What is installed is what was written, under the names that are documented."""

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MAPPED = PYPROJECT["tool"]["setuptools"]["package-dir"]


def packages_on_disk() -> set[str]:
    """Every folder with Python files, by the name it must have once installed."""
    found = set()
    for package, folder in MAPPED.items():
        for path in (ROOT / folder).rglob("*.py"):
            if not any(parent.is_symlink() for parent in path.relative_to(ROOT).parents):
                inner = path.parent.relative_to(ROOT / folder).parts
                if "middleware" not in inner:
                    found.add(".".join([package, *inner]))
    return found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The names of the files in the wheel, which is built from the sdist."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    (path,) = folder.glob("repom-*.whl")
    with zipfile.ZipFile(path) as archive:
        return set(archive.namelist())


def test_every_package_is_listed() -> None:
    """A new sub-package that pyproject.toml does not list would be missing once installed."""
    assert set(PYPROJECT["tool"]["setuptools"]["packages"]) == packages_on_disk()


def test_wheel_has_the_middleware_as_a_sub_package_only(wheel: set[str]) -> None:
    """An application's own `middleware.py` must not be shadowed by ours."""
    assert "repom/middleware/session.py" in wheel
    assert {name.split("/")[0] for name in wheel if ".dist-info" not in name} == {"repom"}


def test_wheel_holds_every_module_and_the_type_marker(wheel: set[str]) -> None:
    """Nothing that a checkout can import is missing from what users install."""
    modules = {
        "/".join([*package.split("."), path.name])
        for package in packages_on_disk()
        for path in (ROOT / MAPPED.get(package, package.replace(".", "/"))).glob("*.py")
    }
    assert modules <= wheel
    assert "repom/py.typed" in wheel


def test_an_application_with_its_own_middleware_module_works(tmp_path: Path) -> None:
    """`import middleware` beside the application finds the application's."""
    (tmp_path / "middleware.py").write_text("MINE = True\n")
    script = (
        "import middleware, repom.middleware\n"
        "assert middleware.MINE\n"
        "assert repom.middleware.DatabaseSessionMiddleware\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True)


def test_core_imports_no_framework_and_no_driver(tmp_path: Path) -> None:
    """A face of a framework, or a driver, is imported only when it is used."""
    script = (
        "import sys, repom, repom.middleware, repom.async_session, repom.session, repom.models\n"
        "extra = {'starlette', 'fastapi', 'litestar', 'quart', 'falcon', 'django', 'blacksheep',"
        " 'sanic', 'asyncpg', 'psycopg', 'aiomysql', 'pymysql', 'aiosqlite', 'pytest'}\n"
        "assert not extra & set(sys.modules), extra & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True)


def test_core_dependencies_stay_few() -> None:
    """Everything but these is an extra."""
    names = {
        dependency.split(">")[0].split("[")[0]
        for dependency in PYPROJECT["project"]["dependencies"]
    }
    assert names == {"sqlalchemy", "anyio", "asgiref", "python-dotenv", "typing-extensions"}
