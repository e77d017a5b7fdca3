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
        environment: the file in requirements/, and the virtual environment, that it runs with.
        host: "asgi" or "fastapi". It is compared with hand-written code on the same host and
            in the same environment.
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


HOSTS = ("asgi", "fastapi")

#: Runs beside the others in every environment, twice.
HAND_WRITTEN = "hand-written"

CONTENDERS = [
    Contender(name, build, environment, host)
    for name, environment, host, build in (
        ("repom", "repom", "asgi", "with_repom:asgi"),
        ("repom", "repom", "fastapi", "with_repom:fastapi"),
        ("repom, read_only", "repom", "asgi", "with_repom:asgi_read_only"),
        ("repom, read_only", "repom", "fastapi", "with_repom:fastapi_read_only"),
        ("repom, Depends", "repom", "fastapi", "with_repom_depends:fastapi"),
        ("FastAPI's Depends", "repom", "fastapi", "fastapi_depends:fastapi"),
        (
            "context-async-sqlalchemy, ASGI",
            "context-async-sqlalchemy",
            "asgi",
            "with_context_async_sqlalchemy:asgi",
        ),
        (
            "context-async-sqlalchemy, ASGI",
            "context-async-sqlalchemy",
            "fastapi",
            "with_context_async_sqlalchemy:fastapi",
        ),
        (
            "context-async-sqlalchemy, HTTP",
            "context-async-sqlalchemy",
            "fastapi",
            "with_context_async_sqlalchemy:fastapi_http",
        ),
        (
            "fastapi-async-sqlalchemy",
            "fastapi-async-sqlalchemy",
            "fastapi",
            "with_fastapi_async_sqlalchemy:fastapi",
        ),
        ("fastapi-sqla", "fastapi-sqla", "fastapi", "with_fastapi_sqla:fastapi"),
        ("FastSQLA", "fastsqla", "fastapi", "with_fastsqla:fastapi"),
        ("Advanced Alchemy", "advanced-alchemy", "fastapi", "with_advanced_alchemy:fastapi"),
    )
]


def hand_written(environment: str, host: str) -> Contender:
    """What the contenders of an environment are compared with."""
    return Contender(HAND_WRITTEN, f"hand_written:{host}", environment, host)
