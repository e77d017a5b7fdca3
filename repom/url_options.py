"""The options in a URL's query, as another driver spells them.

SQLAlchemy hands the query to the driver's connect() as keywords, nearly all of them as text.
What a table here does not list is refused: the other driver would fail on it, or ignore it.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import parse_qsl, urlencode

from repom.errors import DatabaseURLError

Query = Mapping[str, str | tuple[str, ...]]
Translated = tuple[dict[str, str | tuple[str, ...]], dict[str, Any]]

# libpq (psycopg, psycopg2) -> keywords of asyncpg.connect() that take text.
# https://www.postgresql.org/docs/current/libpq-connect.html#LIBPQ-PARAMKEYWORDS
_SAME = ("host", "krbsrvname", "passfile", "password", "port", "target_session_attrs", "user")
_TO_ASYNCPG = {"dbname": "database", "sslmode": "ssl"} | {name: name for name in _SAME}
_TO_LIBPQ = {asyncpg: libpq for libpq, asyncpg in _TO_ASYNCPG.items()}

# asyncpg reads these from its `dsn` only. It loads the files as libpq does, and sends names it
# does not know to the server as settings. Keywords beside the dsn take precedence over it.
_IN_DSN = {"sslcert", "sslcrl", "sslkey", "sslnegotiation", "sslpassword", "sslrootcert"}
_IN_DSN |= {"application_name", "options", "ssl_max_protocol_version", "ssl_min_protocol_version"}
_DSN_HEAD = "postgresql://"

# Asks for what asyncpg does anyway. Not here: `channel_binding=require`, which it cannot do.
_ASYNCPG_DOES = {
    "channel_binding": ("disable", "prefer"),
    "client_encoding": ("utf8", "utf-8"),
    "gssencmode": ("disable", "prefer"),
}

# Names that both ends share. SQLAlchemy makes numbers and booleans of those that need it.
_AIOMYSQL = {"charset", "client_flag", "connect_timeout", "init_command", "local_infile"}
_AIOMYSQL |= {"program_name", "read_default_file", "read_default_group", "sql_mode"}
_AIOMYSQL |= {"unix_socket", "use_unicode"}
_PYMYSQL = _AIOMYSQL | {"bind_address", "collation", "read_timeout", "write_timeout"}
_PYMYSQL |= {"ssl_ca", "ssl_capath", "ssl_cert", "ssl_check_hostname", "ssl_cipher", "ssl_key"}
_ACCEPTED = {"aiomysql": _AIOMYSQL, "pymysql": _PYMYSQL}

# What to write instead of an option that the driver lacks: by driver, then by its first word.
_INSTEAD = {
    "asyncpg": "or write postgresql+psycopg://, a driver that has it and is both sync and async.",
    "autocommit": 'give engine_kwargs={"isolation_level": "AUTOCOMMIT"}.',
    "ssl": 'give engine_kwargs={"connect_args": {"ssl": ssl.create_default_context(cafile=...)}}.',
    "": 'give what the driver has instead as engine_kwargs={"connect_args": {...}}.',
}


def _no_equivalent(option: str, driver: str) -> DatabaseURLError:
    keys = (driver, option.partition("_")[0], "")
    instead = next(_INSTEAD[key] for key in keys if key in _INSTEAD)
    return DatabaseURLError(
        f"The driver {driver} has no equivalent of the URL's option `{option}`.\n"
        f"Remove it from the URL; {instead}"
    )


def _same_spelling(query: Query, driver: str) -> Translated:
    # A driver without a table takes all that the one before it took.
    accepted = _ACCEPTED.get(driver, query)
    for option in query:
        if option not in accepted:
            raise _no_equivalent(option, driver)
    return dict(query), {}


def _libpq_to_asyncpg(query: Query, driver: str) -> Translated:
    options: dict[str, str | tuple[str, ...]] = {}
    dsn: dict[str, str] = {}
    connect_args: dict[str, Any] = {}
    for option, value in query.items():
        if option in _TO_ASYNCPG:
            options[_TO_ASYNCPG[option]] = value
        elif option in _IN_DSN:
            dsn[option] = str(value)
        elif option == "connect_timeout":
            connect_args["timeout"] = _seconds(str(value))
        elif str(value).lower() not in _ASYNCPG_DOES.get(option, ()):
            raise _no_equivalent(option, driver)
    if dsn:
        options["dsn"] = f"{_DSN_HEAD}?{urlencode(dsn)}"
    return options, connect_args


def _seconds(text: str) -> float | None:
    """asyncpg wants a number, and None for libpq's "zero or less: wait for ever"."""
    if not re.fullmatch(r"\s*[+-]?[0-9]+\s*", text):
        raise DatabaseURLError("The URL's option `connect_timeout` is no whole number of seconds.")
    return float(text) if float(text) > 0 else None


def _asyncpg_to_libpq(query: Query, driver: str) -> Translated:
    options: dict[str, str | tuple[str, ...]] = {}
    connect_args: dict[str, Any] = {}
    for option, value in query.items():
        head, _, tail = str(value).partition("?")
        in_dsn = dict(parse_qsl(tail))
        if option in _TO_LIBPQ:
            options[_TO_LIBPQ[option]] = value
        elif option == "dsn" and head == _DSN_HEAD and in_dsn.keys() <= _IN_DSN:
            options |= in_dsn
        elif option != "prepared_statement_cache_size":
            raise _no_equivalent(option, driver)
        elif driver == "psycopg" and value == "0":
            # Zero is written for a pooler that cannot keep prepared statements: psycopg prepares
            # too, psycopg2 never does. Any other size is a matter of asyncpg's own cache.
            connect_args["prepare_threshold"] = None
    return options, connect_args


def translate(query: Query, old: str, new: str) -> Translated:
    """The options of one driver, for another.

    Args:
        query: of a URL.
        old: the driver that the URL names, "" if it names none.
        new: the driver that takes its place.

    Returns:
        The new query, and the `connect_args` for what a query cannot say; usually empty.

    Raises:
        DatabaseURLError: an option has no equivalent, or is given more than once.
    """
    for option, value in query.items():
        if not isinstance(value, str) and option not in ("host", "port"):
            raise DatabaseURLError(f"The URL's option `{option}` is given more than once.")
    by: Callable[[Query, str], Translated] = _same_spelling
    if new == "asyncpg":
        by = _libpq_to_asyncpg
    elif old == "asyncpg":
        by = _asyncpg_to_libpq
    return by(query, new)
