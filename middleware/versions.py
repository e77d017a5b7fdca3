"""Frameworks that are too old, found when the application starts."""

from __future__ import annotations

import re
from importlib import metadata

from repom.errors import ConfigurationError

#: The oldest version of each framework that has passed the tests; the extras say the same.
OLDEST = {
    "starlette": "0.41.3",
    "fastapi": "0.121",
    "litestar": "2.15",
    "quart": "0.19.9",
    "falcon": "4.0",
    "django": "4.2",
    "blacksheep": "2.0.8",
    "sanic": "24.6",
}


def refuse_old(framework: str) -> None:
    """Check the version of a framework that is in use.

    Raises:
        ConfigurationError: it is older than `OLDEST`.
    """
    try:
        installed = metadata.version(framework)
    except metadata.PackageNotFoundError:
        return  # imported from somewhere else than where pip has put it
    oldest = OLDEST[framework]
    if _numbers(installed) < _numbers(oldest):
        raise ConfigurationError(
            f"{framework} {installed} is installed, which is too old: older than {oldest}, a "
            "COMMIT that fails does not reach the application's error handling.\n"
            f'Write `pip install "repom[{framework}]"`, which has a version that does.'
        )


def refuse_old_frameworks_of(*apps: object) -> None:
    """The same for the frameworks that the classes of `apps` come from."""
    modules = {cls.__module__.partition(".")[0] for app in apps for cls in type(app).__mro__}
    for framework in OLDEST.keys() & modules:
        refuse_old(framework)


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)[:3]]
