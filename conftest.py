"""Runs the code of README.md and of the guides, each in an empty folder with a new database.

What a guide does not show, such as the requests and what they must answer, is in comments
that start with `invisible-code-block: python`.
"""

import asyncio
import importlib
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

import repom.models
from repom import registry
from repom.config import reset_config

_SETTINGS = ("DATABASE_URL", "REPOM_DATABASE_URL", "CONFIG_HOOK")
_before: dict[str, Any] = {}


@asynccontextmanager
async def client_of(app: Any) -> AsyncIterator[httpx.AsyncClient]:
    """A client of `app`, which is started and stopped around it."""
    from tests.support.lifespan import lifespan

    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with (
        lifespan(app),
        httpx.AsyncClient(transport=transport, base_url="http://test") as client,
    ):
        yield client


def _setup(namespace: dict[str, Any]) -> None:
    folder = TemporaryDirectory()
    _before.update(
        folder=folder,
        cwd=Path.cwd(),
        environ={name: os.environ.pop(name) for name in _SETTINGS if name in os.environ},
    )
    _forget_configuration()
    os.chdir(folder.name)
    sys.path.insert(0, folder.name)
    # As a script's: pydantic looks for the annotations of a class in the module of its name.
    namespace.update(__name__="__main__", docs=_before["cwd"] / "docs")
    namespace.update(client_of=client_of, asyncio=asyncio)
    # With a `Base` of its own, since each guide maps an Article, and tests have mapped theirs.
    _before.update(models=sys.modules.pop("repom.models"))
    repom.models = importlib.import_module("repom.models")


def _teardown(namespace: dict[str, Any]) -> None:
    for database in registry.configured_so_far():
        database.dispose_sync()
    _forget_configuration()
    repom.models.Base.registry.dispose()
    repom.models = sys.modules["repom.models"] = _before["models"]
    sys.path.remove(_before["folder"].name)
    os.chdir(_before["cwd"])
    for name in _SETTINGS:
        os.environ.pop(name, None)
    os.environ.update(_before["environ"])
    _before.pop("folder").cleanup()


def _forget_configuration() -> None:
    registry.forget_configured()
    reset_config()


pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser(), SkipParser()],
    patterns=["README.md", "docs/*.md", "docs/ja/*.md"],
    setup=_setup,
    teardown=_teardown,
).pytest()
