"""Which database a name stands for."""

from __future__ import annotations

import threading
from collections.abc import Mapping

from sqlalchemy import URL

from repom.config import RepomConfig, get_config
from repom.database import Database
from repom.errors import ConfigurationError, UnknownDatabaseError

DEFAULT = "default"


class Databases:
    """Names to databases: those that were given, then those that the configuration names.

    Args:
        given: by name; a URL or a configuration stands for a `Database` made of it.
        default: what "default" means here. A name is looked up when it is used.
    """

    def __init__(
        self,
        given: Mapping[str, Database | RepomConfig | str | URL],
        default: str | Database = DEFAULT,
    ) -> None:
        self._by_name = {name: to_database(name, value) for name, value in given.items()}
        self._default = default

    def __getitem__(self, database: str | Database | None) -> Database:
        """The database of that name; a `Database` is itself, None is the default.

        Raises:
            UnknownDatabaseError: neither given nor configured.
        """
        name = self._default if database is None or database == DEFAULT else database
        if isinstance(name, Database):
            return name
        found = self._by_name.get(name)
        return found if found is not None else get_database(name)

    def items(self) -> list[tuple[str, Database]]:
        """The databases that were given, in that order."""
        given = dict(self._by_name)
        if self._default != DEFAULT:
            given[DEFAULT] = self[DEFAULT]
        return list(given.items())

    def to_check(self) -> list[Database]:
        """What is checked before the first request."""
        return [database for _, database in self.items()] or [self[DEFAULT]]

    def to_dispose(self) -> list[Database]:
        """What is disposed of after the last one."""
        return [database for _, database in self.items()]

    def known(self) -> list[Database]:
        """All that can be asked for by a name, those of the configuration included."""
        names = [*get_config().databases, *(self._by_name or [DEFAULT])]
        return [self._by_name.get(name) or get_database(name) for name in names]

    def overlaid(self, database: str | Database | None) -> Databases:
        """These databases, with `database` as the default one."""
        if database is None or database == DEFAULT:
            return self
        return Databases(self._by_name, database)


#: Only what the configuration of this process names.
CONFIGURED = Databases({})

_configured: dict[str, Database] = {}
_mutex = threading.RLock()


def get_database(name: str = DEFAULT) -> Database:
    """The database that the configuration names so, one object for the whole process.

    Raises:
        UnknownDatabaseError: the configuration has no such name.
        ConfigurationError: what is configured cannot be used.
    """
    database = _configured.get(name)
    if database is not None:
        return database
    with _mutex:
        if name not in _configured:
            config = get_config()
            if name == DEFAULT:
                _configured[name] = Database.from_config(config)
            elif name in config.databases:
                _configured[name] = to_database(name, config.databases[name])
            else:
                raise UnknownDatabaseError(_unknown(name, [DEFAULT, *config.databases]))
        return _configured[name]


def default_or(database: Database) -> Database:
    """The configured default database if it is in use, else `database`, which it is from now on.

    For tests: nothing is read from the configuration.
    """
    with _mutex:
        return _configured.setdefault(DEFAULT, database)


def configured_so_far() -> list[Database]:
    """The databases of the configuration that have been used, for disposing of them."""
    return list(_configured.values())


def forget_configured() -> None:
    """Read the configuration again at the next use. For tests; dispose of the engines first."""
    with _mutex:
        _configured.clear()


def as_databases(
    database: Database | str | URL | Mapping[str, Database | RepomConfig | str | URL] | None,
) -> Databases:
    """What an application gave to name its databases.

    Args:
        database: a `Database`; a URL; the name of a configured one, which is looked up when
            it is used; a mapping of names to databases, configurations and URLs; or None for
            what is configured.
    """
    if database is None:
        return CONFIGURED
    if isinstance(database, Mapping):
        return Databases(database)
    if isinstance(database, str) and ":" not in database:
        return CONFIGURED.overlaid(database)
    return Databases({DEFAULT: database})


def to_database(name: str, value: object) -> Database:
    """What `value` stands for, which somebody gave for `name`.

    Raises:
        ConfigurationError: it is none of a `Database`, a configuration, a URL.
    """
    if isinstance(value, Database):
        return value
    if isinstance(value, RepomConfig):
        return Database.from_config(value)
    if isinstance(value, (str, URL)):
        return Database(value)
    raise ConfigurationError(
        f"the database {name!r} is a {type(value).__name__}.\n"
        "Give a URL, a Database, or a RepomConfig."
    )


def _unknown(name: str, known: list[str]) -> str:
    return (
        f"no database is called {name!r}. Known: {', '.join(sorted(known))}.\n"
        "Add it to RepomConfig.databases, or to the mapping given to DatabaseSessionMiddleware."
    )
