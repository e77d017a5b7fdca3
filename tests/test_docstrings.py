"""The examples in the docstrings are executed."""

import doctest
import gc
import importlib
import pkgutil
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

import repom


def modules() -> list[str]:
    return [module.name for module in pkgutil.walk_packages(repom.__path__, "repom.")]


class ExampleBase(DeclarativeBase):
    pass


class Article(ExampleBase):
    __tablename__ = "docstring_article"
    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str]


def names() -> dict[str, Any]:
    """What the examples take for granted: names of repom, and an application's own."""
    from fastapi import FastAPI

    from repom.async_session import get_async_session
    from repom.middleware import DatabaseSessionMiddleware

    public = {name: getattr(repom, name) for name in repom.__all__}
    own = {"Article": Article, "Account": Article, "User": Article, "FastAPI": FastAPI}
    return {
        **public,
        **own,
        "DatabaseSessionMiddleware": DatabaseSessionMiddleware,
        "get_async_session": get_async_session,
    }


@pytest.mark.parametrize("name", modules())
def test_examples_are_true(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a docstring shows is what the code does."""
    monkeypatch.chdir(tmp_path)
    gc.collect()  # of the classes that other examples have mapped
    module = importlib.import_module(name)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for example in doctest.DocTestFinder().find(module, extraglobs=names()):
        runner.run(example)
    assert runner.summarize(verbose=False).failed == 0
