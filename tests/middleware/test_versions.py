"""A framework that is too old is found when the application starts, and named."""

import sys
import tomllib
from collections.abc import Callable
from importlib import import_module, metadata
from pathlib import Path

import pytest
from fastapi import FastAPI
from quart import Quart
from starlette.applications import Starlette

from repom.errors import ConfigurationError
from repom.middleware import DatabaseSessionMiddleware
from repom.middleware.versions import OLDEST, refuse_old
from tests.support.asgi import ASGIApp, LifespanFailed, lifespan

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is looked into before the environment is."""
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def install(folder: Path, name: str, version: str) -> None:
    """What pip leaves of a package, and nothing of the package."""
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


@pytest.mark.parametrize(
    ("version", "old"),
    [("0.41.2", True), ("0.9", True), ("0.41.3", False), ("0.41.3.post1", False), ("1.0", False)],
)
def test_versions_are_compared_by_number(installed: Path, version: str, old: bool) -> None:
    """0.9 is older than 0.41, and a newer one needs nothing."""
    install(installed, "starlette", version)
    if old:
        with pytest.raises(ConfigurationError, match=rf"starlette {version} is installed"):
            refuse_old("starlette")
    else:
        refuse_old("starlette")


def of_starlette(url: str) -> ASGIApp:
    app = Starlette()
    app.add_middleware(DatabaseSessionMiddleware, url)
    return app


def around_starlette(url: str) -> ASGIApp:
    return DatabaseSessionMiddleware(Starlette(), url)


def of_a_subclass_of_fastapi(url: str) -> ASGIApp:
    class App(FastAPI):
        pass

    app = App()
    app.add_middleware(DatabaseSessionMiddleware, url)
    return app


def of_quart(url: str) -> ASGIApp:
    app = Quart(__name__)
    app.asgi_app = DatabaseSessionMiddleware(app.asgi_app, url)  # type: ignore[method-assign]
    return app  # type: ignore[return-value] # pyright: ignore[reportReturnType]


@pytest.mark.parametrize(
    ("make", "framework"),
    [
        (of_starlette, "starlette"),
        (around_starlette, "starlette"),
        (of_a_subclass_of_fastapi, "fastapi"),
        (of_a_subclass_of_fastapi, "starlette"),
        (of_quart, "quart"),
    ],
)
async def test_application_does_not_start(
    sqlite_url: str, installed: Path, make: Callable[[str], ASGIApp], framework: str
) -> None:
    """The server is told which framework is too old, and what to install."""
    install(installed, framework, "0.1.0")
    with pytest.raises(LifespanFailed, match=f"{framework} 0.1.0 is installed") as failed:
        async with lifespan(make(sqlite_url)):
            pass
    assert f'pip install "repom[{framework}]"' in str(failed.value)


async def test_what_is_installed_here_is_new_enough(sqlite_url: str) -> None:
    """Else no application would start."""
    for make in (of_starlette, around_starlette, of_a_subclass_of_fastapi, of_quart):
        async with lifespan(make(sqlite_url)):
            pass


@pytest.mark.parametrize("framework", ["litestar", "quart", "falcon", "django", "blacksheep"])
def test_face_is_not_imported(
    installed: Path, monkeypatch: pytest.MonkeyPatch, framework: str
) -> None:
    """Where the framework has a module of repom's, importing that says so."""
    monkeypatch.delitem(sys.modules, f"repom.middleware.{framework}", raising=False)
    install(installed, framework, "0.1.0")
    with pytest.raises(ConfigurationError, match=f"{framework} 0.1.0 is installed"):
        import_module(f"repom.middleware.{framework}")


def test_framework_that_was_not_installed_by_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without metadata nothing is known, and nothing is said."""

    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    refuse_old("starlette")


def test_extras_declare_the_same() -> None:
    """What pip is told is what is checked."""
    extras = tomllib.loads(PYPROJECT.read_text())["project"]["optional-dependencies"]
    assert {name: extras[name] for name in OLDEST} == {
        name: [f"{name}>={version}"] for name, version in OLDEST.items()
    }
