"""Sync URL <-> async URL: which driver replaces which.

Pure functions. The only thing looked up outside the URL is whether a driver is installed.
"""

import re
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError

from repom.errors import DatabaseURLError, MissingDriverError
from repom.url_options import translate

_Converted = tuple[URL, dict[str, Any]]

# --- drivers -------------------------------------------------------------------------------
# In these tables `mysql` stands for `mariadb` too.

_TO_ASYNC = {
    "sqlite": "aiosqlite",
    "sqlite+pysqlite": "aiosqlite",
    "postgresql": "asyncpg",
    "postgresql+psycopg2": "asyncpg",
    "mysql": "aiomysql",
    "mysql+mysqldb": "aiomysql",
    "mysql+pymysql": "aiomysql",
    "mssql+pyodbc": "aioodbc",
}

# The first that is installed is taken. A plain name is resolved here because SQLAlchemy's meaning
# of it varies: `postgresql` is psycopg2 in 2.0 and psycopg in 2.1, `mysql` always mysqlclient.
_TO_SYNC = {
    "sqlite+aiosqlite": ("pysqlite",),
    "postgresql": ("psycopg", "psycopg2"),
    "postgresql+asyncpg": ("psycopg", "psycopg2"),
    "postgresql+psycopg_async": ("psycopg",),
    "mysql": ("mysqldb", "pymysql"),
    "mysql+aiomysql": ("pymysql",),
    "mysql+asyncmy": ("pymysql",),
    "oracle+oracledb_async": ("oracledb",),
    "mssql+aioodbc": ("pyodbc",),
}
_ASYNC_ONLY = {name.partition("+")[2] for name in _TO_SYNC} - {""}
_ASYNC = _ASYNC_ONLY | {"psycopg", "oracledb"}

# Driver -> its module and what to install. Of the rest SQLAlchemy knows the module.
_PACKAGES = {
    "aiosqlite": ("aiosqlite", '"repom[async]"'),
    "asyncpg": ("asyncpg", '"repom[postgres]"'),
    "psycopg": ("psycopg", '"repom[postgres]"'),
    "psycopg_async": ("psycopg", '"repom[postgres]"'),
    "psycopg2": ("psycopg2", "psycopg2-binary"),
    "aiomysql": ("aiomysql", '"repom[mysql]"'),
    "pymysql": ("pymysql", '"repom[mysql]"'),
    "asyncmy": ("asyncmy", "asyncmy"),
    "mysqldb": ("MySQLdb", "mysqlclient"),
}
_MODULE_TO_PACKAGE = {"mysql": "mysql-connector-python"}  # where it is not the module's name

# --- converting ----------------------------------------------------------------------------


def to_async(url: URL) -> _Converted:
    """The URL for an async engine; one that names an async driver is returned as it is.

    Returns:
        The URL, and the `connect_args` for what its query cannot say: options that the driver
        takes as numbers only (`connect_timeout` for asyncpg). They are usually empty.

    Raises:
        DatabaseURLError: no async driver is known for the URL, or the driver has no equivalent
            of an option in its query.
    """
    url = parse_url(url)
    if _driver(url) in _ASYNC:
        return url, {}
    if _key(url) in _TO_ASYNC:
        return _convert(url, _TO_ASYNC[_key(url)])
    raise DatabaseURLError(
        f"No async driver is known for `{url.drivername}://`.\n"
        f"There is one for {', '.join(_TO_ASYNC)}, and for mariadb as for mysql.\n"
        f"Otherwise name an async driver in the URL: {', '.join(sorted(_ASYNC))}."
    )


def to_sync(url: URL) -> _Converted:
    """The URL for a sync engine; one that names a sync driver is returned as it is.

    Plain `postgresql://`, `mysql://` and `mariadb://` get the driver that is installed.

    Returns:
        The URL, and the `connect_args` for what its query cannot say: psycopg's
        `prepare_threshold=None` for `prepared_statement_cache_size=0`. They are usually empty.

    Raises:
        DatabaseURLError: no sync driver is known for the URL, or the driver has no equivalent of
            an option in its query.
        MissingDriverError: none of the drivers to choose from is installed.
    """
    url = parse_url(url)
    if _key(url) in _TO_SYNC:
        return _convert(url, _first_installed(_TO_SYNC[_key(url)]))
    if _driver(url) not in _ASYNC_ONLY:
        return url, {}
    raise DatabaseURLError(
        f"No sync driver is known for `{url.drivername}://`.\n"
        f"There is one for {', '.join(_TO_SYNC)}, and for mariadb as for mysql.\n"
        "Otherwise name a sync driver in the URL."
    )


def convert_to_async_uri(url: str | URL) -> str:
    """The URL with an async driver, as text and with its password.

    Everything but the driver stays as it was written. Only where an option is spelled differently
    for the new driver is the URL rendered anew, with the same meaning.

        >>> convert_to_async_uri("postgresql://user:pass@localhost/db?sslmode=require")
        'postgresql+asyncpg://user:pass@localhost/db?ssl=require'

    Raises:
        DatabaseURLError: the URL cannot be read, no async driver is known for it, or an option in
            its query has no equivalent, or none that a URL can say (see `to_async`).
    """
    return _as_text(url, to_async)


def convert_to_sync_uri(url: str | URL) -> str:
    """The URL with a sync driver, as text and with its password: `convert_to_async_uri` reversed.

        >>> convert_to_sync_uri("sqlite+aiosqlite:///data/db.sqlite3")
        'sqlite+pysqlite:///data/db.sqlite3'

    Raises:
        DatabaseURLError: as `convert_to_async_uri`.
        MissingDriverError: none of the drivers to choose from is installed.
    """
    return _as_text(url, to_sync)


def _as_text(given: str | URL, convert: Callable[[URL], _Converted]) -> str:
    parsed = parse_url(given)
    url, connect_args = convert(parsed)
    if connect_args:
        raise DatabaseURLError(
            f"{_driver(url)} takes an option of this URL only as connect_args={connect_args}.\n"
            "Give the URL to Database(url), which passes it on, or remove the option from the URL\n"
            "and give these connect_args to the engine."
        )
    if isinstance(given, str) and url.query == parsed.query:
        return f"{url.drivername}://{given.partition('://')[2]}"
    return url.render_as_string(hide_password=False)


def _convert(url: URL, driver: str) -> _Converted:
    query, connect_args = translate(url.query, _driver(url), driver)
    backend = url.drivername.partition("+")[0]
    return url.set(drivername=f"{backend}+{driver}", query=query), connect_args


def _driver(url: URL) -> str:
    return url.drivername.partition("+")[2]


def _key(url: URL) -> str:
    return re.sub("^mariadb", "mysql", url.drivername)


def _first_installed(drivers: tuple[str, ...]) -> str:
    for driver in drivers:
        if driver not in _PACKAGES or find_spec(_PACKAGES[driver][0]):
            return driver
    commands = " or ".join(f"pip install {_PACKAGES[driver][1]}" for driver in drivers)
    raise MissingDriverError(
        f"The database driver {' or '.join(drivers)} is not installed.\nInstall it: {commands}"
    )


def require_driver(url: URL) -> None:
    """Check that the driver of a URL is installed. A plain name is taken as by `to_sync`.

    Raises:
        MissingDriverError: it is not; with the line to run, such as `pip install "repom[async]"`.
    """
    url = parse_url(url)
    drivers = (_driver(url),) if _driver(url) else _TO_SYNC.get(_key(url), ())
    if drivers and all(driver in _PACKAGES for driver in drivers):
        _first_installed(drivers)
    else:
        _import_driver(url)


def _import_driver(url: URL) -> None:
    try:
        url.get_dialect().import_dbapi()
    except NoSuchModuleError as error:
        raise MissingDriverError(
            f"SQLAlchemy knows no dialect for `{url.drivername}://`.\n"
            "Correct the URL, or install the package that brings the dialect."
        ) from error
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        raise MissingDriverError(
            f"The database driver of `{url.drivername}://` is not installed: {error}.\n"
            f"Install it: pip install {_MODULE_TO_PACKAGE.get(module, module)}"
        ) from error


# --- reading and showing -------------------------------------------------------------------

_FORM = "Write dialect+driver://user:password@host:port/database, or sqlite:///path for a file."
_ENCODE = "In user and password write @ as %40, : as %3A, / as %2F, ? as %3F and # as %23."
_NO_DIALECT = f"does not begin with a dialect.\n{_FORM}"
_BAD_PORT = f"has a port that is not a number.\n{_FORM}\n{_ENCODE}"
_STRAY_AT = f"has an @ after the one that ends the password: it is written %40.\n{_ENCODE}"
_HOSTS = (
    "has several hosts before the database's name.\n"
    "For asyncpg and psycopg write postgresql://user:password@/database?host=H1:P1&host=H2:P2."
)
_ONE_HOST = (
    "has several hosts, and the drivers of MySQL and MariaDB connect to one.\n"
    "Write the host of a proxy before the servers (ProxySQL, MaxScale, HAProxy), or a name that\n"
    "always leads to the one that takes writes."
)

# What SQLAlchemy does not take for user and password. Three slashes: there is no such part.
_AFTER_LOGIN = re.compile(r"[\w+]+://(?!/)(?:[^:/]*(?::[^@]*)?@)?(.*)", re.DOTALL)
_SECRET = r"([?&](?:dsn|odbc_connect|[^=&]*(?:passw|pwd|secret|token)[^=&]*)=)"


def parse_url(url: str | URL) -> URL:
    """A database URL, checked for what SQLAlchemy would read otherwise than it was meant.

    `postgres://` becomes `postgresql://`.

    Raises:
        DatabaseURLError: it cannot be read, or has several hosts where its driver takes none or
            before the database's name, or an unencoded `@` that would make a part of the password
            the host. Neither the message nor an error in its chain holds the password.
    """
    if isinstance(url, str):
        match = _AFTER_LOGIN.match(url)
        text, rest = url, match[1] if match else ""
    elif isinstance(url, URL):
        text, rest = url.render_as_string(hide_password=False), url.host or ""
    else:
        raise DatabaseURLError(f"A database URL is a str or a URL, not {type(url).__name__}.")
    parsed, problem = None, ""
    try:
        parsed = make_url(url)
    except ArgumentError:
        problem = _NO_DIALECT
    except ValueError:
        problem = _BAD_PORT
    if "@" in rest:
        problem = _STRAY_AT
    elif parsed is not None and _is_mysql(parsed) and _several(parsed):
        problem = _ONE_HOST
    elif "," in re.split("[/?]", rest)[0] and (problem or text.startswith("postgres")):
        problem = _ONE_HOST if text.startswith(("mysql", "mariadb")) else _HOSTS
    if parsed is None or problem:
        # Not raised in `except`: SQLAlchemy's error, which quotes the URL, would be its context.
        raise DatabaseURLError(f"The database URL {redact(text)} {problem}")
    return parsed.set(drivername=re.sub(r"^postgres(?=\+|$)", "postgresql", parsed.drivername))


def _is_mysql(url: URL) -> bool:
    return url.get_backend_name() in ("mysql", "mariadb")


def _several(url: URL) -> bool:
    host = url.query.get("host") or url.host or ""
    return "," in host if isinstance(host, str) else len(host) > 1


def redact(text: str) -> str:
    """A text that is no valid URL, without anything in it that may be a password."""
    match = re.match(r"[\w+.-]+://", text)
    if match is None:
        return "***" if text.strip() else "(empty)"
    rest = text[match.end() :]
    if re.search(_SECRET, rest, re.IGNORECASE):
        return f"{match[0]}***"
    # Up to the last @, since the password may hold more of them; to the end where there is none.
    return match[0] + re.sub(":(?:.*(?=@)|.*)", ":***", rest, count=1, flags=re.DOTALL)


def safe(url: str | URL) -> str:
    """A URL to show: its password, and those given as an option, are `***`."""
    try:
        shown = parse_url(url).render_as_string(hide_password=True)
    except DatabaseURLError:
        return redact(url if isinstance(url, str) else url.render_as_string(hide_password=False))
    return re.sub(f"{_SECRET}[^&]*", r"\1***", shown, flags=re.IGNORECASE)
