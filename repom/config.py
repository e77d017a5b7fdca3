"""Where repom is told what to connect to: `RepomConfig`, `.env` and `CONFIG_HOOK`.

A setting is looked for in the environment, then in the `.env` of the working directory or of the
nearest folder above it; an empty value counts as unset. `${...}` in `.env` is not expanded,
because a password may contain it. All of it is read on first use, nothing at import, and
`os.environ` is never changed.
"""

import functools
import logging
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Literal

from dotenv import dotenv_values, find_dotenv
from sqlalchemy.engine import URL

from repom.config_hook import Hook
from repom.errors import ConfigurationError
from repom.urls import safe

logger = logging.getLogger("repom")


class RepomConfig:
    """What repom needs to know; subclass it and override.

    Args:
        db_url: sync or async URL of the default database, before every other source (a property
            of a subclass decides itself; there it is `super().db_url`).
        require_url: no URL anywhere is an error instead of the SQLite default.

    Attributes:
        DEFAULT_ENGINE_KWARGS: what `engine_kwargs` begins with. Times are in seconds.
        require_url: as the argument.
        pgbouncer: the server is behind PgBouncer: asyncpg then caches and names no statement.
        sqlite_begin: how every SQLite transaction begins. `None`: `IMMEDIATE` where writing is
            to be expected, `DEFERRED` elsewhere.
        readers: URLs of replicas of the default database, for what only reads.
        max_lag: seconds that a replica may be behind.

    >>> class MyConfig(RepomConfig):
    ...     db_url = "postgresql://app:secret@localhost/shop"
    ...
    ...     @property
    ...     def engine_kwargs(self):
    ...         return super().engine_kwargs | {"pool_size": 20}
    >>> MyConfig()
    MyConfig(db_url='postgresql://app:***@localhost/shop')
    >>> MyConfig().engine_kwargs["pool_size"]
    20
    """

    DEFAULT_ENGINE_KWARGS: ClassVar[Mapping[str, int]] = MappingProxyType(
        {"pool_size": 10, "max_overflow": 20, "pool_timeout": 30, "pool_recycle": 3600}
    )

    require_url: bool = False
    pgbouncer: bool = False
    sqlite_begin: Literal["IMMEDIATE", "DEFERRED"] | None = None
    readers: Sequence[str] = ()
    max_lag: float = 10.0

    def __init__(self, *, db_url: str | None = None, require_url: bool = False) -> None:
        # Into the instance's dict, where a subclass's plain `db_url = "..."` looks first.
        if db_url is not None:
            vars(self)["db_url"] = db_url
        if require_url:
            self.require_url = True

    def _find_url(self) -> str:
        """The URL of the default database, a `str`; read once for each config object.

        The first of: the argument, `REPOM_DATABASE_URL`, `DATABASE_URL`, each of the two from
        the environment and else from `.env`; then the SQLite file `data/db.sqlite3` below the
        working directory, announced once by a WARNING.

        Raises:
            ConfigurationError: `require_url` is set and there is none, or `.env` is unreadable.
        """
        if "db_url" not in vars(self):
            found = _read_setting("REPOM_DATABASE_URL") or _read_setting("DATABASE_URL")
            vars(self)["db_url"] = found[0] if found else self._default_url()
        url: str = vars(self)["db_url"]
        return url

    def _default_url(self) -> str:
        if self.require_url:
            raise ConfigurationError(
                "No database URL is configured, and require_url forbids the SQLite default.\n"
                "Set REPOM_DATABASE_URL or DATABASE_URL in the environment or in .env "
                f"(looked for in {Path.cwd()} and above),\nor write RepomConfig(db_url=...)."
            )
        path = Path.cwd() / "data" / "db.sqlite3"
        _announce_default(path)
        # Through URL, which knows what to escape in a path; SQLAlchemy 2.0 and 2.1 differ.
        url = URL.create("sqlite", database=path.as_posix())
        return url.render_as_string(hide_password=False)

    # Any: type checkers then let a subclass override it by an attribute and by a property.
    db_url: Any = property(_find_url)

    @property
    def engine_kwargs(self) -> dict[str, Any]:
        """Arguments of `create_engine()`, a new dict each time."""
        return dict(self.DEFAULT_ENGINE_KWARGS)

    @property
    def session_kwargs(self) -> dict[str, Any]:
        """Arguments of the session factory, a new dict each time.

        `expire_on_commit=False`: code after the response may still read its objects.
        """
        return {"expire_on_commit": False}

    @property
    def databases(self) -> Mapping[str, object]:
        """Further databases by name: each a URL, a `RepomConfig` or a `Database`."""
        return {}

    def __repr__(self) -> str:
        # Only what is known by now: a repr neither reads files nor raises.
        url = type(self).db_url
        if isinstance(url, str) or url is RepomConfig.db_url:
            url = vars(self).get("db_url", url)
        shown = repr(safe(url)) if isinstance(url, str) else "..."
        return f"{type(self).__name__}(db_url={shown})"


@functools.cache
def _announce_default(path: Path) -> None:
    """Warn, once for each file: a second config object is no news."""
    logger.warning(
        "No database URL is configured: using the SQLite file %s. "
        "Set REPOM_DATABASE_URL or DATABASE_URL in the environment or in .env.",
        path,
    )


def get_config() -> RepomConfig:
    """The configuration of this process: what `CONFIG_HOOK` returns, else a `RepomConfig()`.

    `CONFIG_HOOK=package.module:function`, in the environment or in `.env`, names a function
    without parameters. It is called once: the first config is kept until `reset_config()`; after
    an error the next call tries again.

    Raises:
        ConfigHookError: the hook cannot be imported, called, or used. Its own error, if there
            is one, is the `__cause__`.

    >>> get_config() is get_config()
    True
    """
    global _config, _running_hook
    with _lock:
        if _running_hook is not None:
            raise _running_hook.error(
                "calls get_config(), which waits for the hook itself",
                "Build the config in the hook and return it; call get_config() later.",
            )
        if _config is None:
            setting = _read_setting("CONFIG_HOOK")
            if setting is None:
                _config = RepomConfig()
            else:
                _running_hook = Hook(*setting)
                try:
                    _config = _running_hook.call(RepomConfig)
                finally:
                    _running_hook = None
        return _config


def reset_config() -> None:
    """Forget the config: the next `get_config()` reads everything again. For tests."""
    global _config
    with _lock:
        _config = None


# Re-entrant, so that a hook which calls get_config() meets the error and not a deadlock.
_lock = threading.RLock()
_config: RepomConfig | None = None
_running_hook: Hook | None = None


def _read_setting(name: str) -> tuple[str, str] | None:
    """The value, and where its author finds it: "the environment", or the path of the `.env`."""
    if value := os.environ.get(name, "").strip():
        return value, "the environment"
    path = find_dotenv(usecwd=True)
    try:
        # utf-8-sig: Windows editors write a BOM, which would become part of the first name.
        values = dotenv_values(path, interpolate=False, encoding="utf-8-sig")
    except (OSError, UnicodeError) as error:
        raise ConfigurationError(
            f"{path} cannot be read: {type(error).__name__}.\n"
            "It must be UTF-8 text that this process may read."
        ) from error
    value = (values.get(name) or "").strip()
    return (value, path) if value else None
