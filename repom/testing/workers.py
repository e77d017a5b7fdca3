"""A database for each worker of pytest-xdist, so that they do not see each other.

Its name is that of the configured one and of the worker: `shop_gw0` for `shop`, `test_gw0.db`
for `test.db`. What an earlier run has left there is dropped.
"""

from __future__ import annotations

import os
from pathlib import Path, PurePath
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from sqlalchemy import URL, Engine
from sqlalchemy.exc import DBAPIError

from repom.dialects import Support
from repom.dialects.sqlite import SQLite, is_sqlite, private_memory
from repom.errors import ConfigurationError
from repom.urls import safe


def worker_here() -> str | None:
    """The name of the worker that this process is, such as "gw0"."""
    return os.environ.get("PYTEST_XDIST_WORKER")


def url_of_worker(url: URL, worker: str) -> URL:
    """The URL of the worker's own database; `url` itself if no other process can see that."""
    name = url.database or ""
    if not is_sqlite(url):
        return url.set(database=f"{name}_{worker}")
    if private_memory(url) is not url or url.query.get("vfs") == "memdb":
        return url
    if not name.startswith("file:"):
        return url.set(database=_renamed(name, worker))
    parts = urlsplit(name)
    path = quote(_renamed(unquote(parts.path), worker))
    return url.set(database=urlunsplit(parts._replace(path=path)))


def _renamed(file: str, worker: str) -> str:
    path = PurePath(file)
    return str(path.with_name(f"{path.stem}_{worker}{path.suffix}"))


def create(support: Support, configured: Engine) -> None:
    """Make an empty database.

    Args:
        support: of the one to be made.
        configured: an engine of the configured one, in AUTOCOMMIT; SQLite does not use it.

    Raises:
        ConfigurationError: the server refuses.
    """
    if isinstance(support, SQLite):
        remove_file(support)
        return
    try:
        _execute(configured, "DROP DATABASE IF EXISTS {}", support.url)
        _execute(configured, "CREATE DATABASE {}", support.url)
    except DBAPIError as error:
        raise ConfigurationError(
            f"{safe(support.url)}, the database of one worker of pytest-xdist, cannot be made: "
            "see the __cause__.\n"
            "Allow the user to create databases (PostgreSQL: ALTER ROLE ... CREATEDB; MySQL: "
            "GRANT ALL), and do not run the same tests twice at a time."
        ) from error


def drop(support: Support, configured: Engine) -> None:
    """Undo `create`."""
    if isinstance(support, SQLite):
        remove_file(support)
    else:
        _execute(configured, "DROP DATABASE IF EXISTS {}", support.url)


def _execute(configured: Engine, sql: str, url: URL) -> None:
    name = configured.dialect.identifier_preparer.quote_identifier(url.database or "")
    with configured.connect() as connection:
        connection.exec_driver_sql(sql.format(name))


def remove_file(support: SQLite) -> None:
    """Remove the file, and those that SQLite writes beside it."""
    for suffix in ("", "-wal", "-shm"):
        Path(support.path + suffix).unlink(missing_ok=True)
