"""Who is measured. A contender's file is what its users would write, and nothing else."""

from __future__ import annotations

from importlib import import_module
from typing import Any, NamedTuple

from benchmarks.hosts import ASGIApp


class Contender(NamedTuple):
    """One application under test.

    Attributes:
        name: what the tables call it.
        build: `module:function` of this package; called with the URL and the engine's options.
        environment: the requirements file it runs with, and the virtual environment.
        host: "asgi" or "fastapi". It is compared with hand-written code on the same host.
    """

    name: str
    build: str
    environment: str
    host: str

    def app(self, url: str, engine_kwargs: dict[str, Any]) -> ASGIApp:
        """The application."""
        module, _, function = self.build.partition(":")
        build = getattr(import_module(f"{__name__}.{module}"), function)
        app: ASGIApp = build(url, engine_kwargs)
        return app


CONTENDERS = [
    Contender("hand-written", "hand_written:asgi", "repom", "asgi"),
    Contender("hand-written", "hand_written:fastapi", "repom", "fastapi"),
    Contender("repom", "with_repom:asgi", "repom", "asgi"),
    Contender("repom", "with_repom:fastapi", "repom", "fastapi"),
    Contender("FastAPI Depends", "fastapi_depends:fastapi", "repom", "fastapi"),
]


def find(build: str) -> Contender:
    """The contender that `build` names."""
    return next(contender for contender in CONTENDERS if contender.build == build)
