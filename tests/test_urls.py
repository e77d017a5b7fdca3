import asyncio
import doctest
import re
import socket
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from sqlalchemy import URL, create_engine, make_url
from sqlalchemy.exc import OperationalError
from sqlalchemy.ext.asyncio import create_async_engine

import repom.urls
from repom.errors import DatabaseURLError, MissingDriverError
from repom.urls import (
    convert_to_async_uri,
    convert_to_sync_uri,
    parse_url,
    redact,
    require_driver,
    safe,
    to_async,
    to_sync,
)

Install = Callable[..., None]


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Makes exactly the named modules look installed."""

    def install(*modules: str) -> None:
        monkeypatch.setattr("repom.urls.find_spec", lambda name: name in modules or None)

    return install


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port that is taken, so that nobody else gets it, and that nobody listens on."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


def told(error: BaseException | None) -> str:
    """All that an error and the errors in its chain say."""
    if error is None:
        return ""
    return f"{error!r}{error}{told(error.__cause__)}{told(error.__context__)}"


# --- the driver ------------------------------------------------------------------------------

ASYNC = {
    "sqlite": "sqlite+aiosqlite",
    "sqlite+pysqlite": "sqlite+aiosqlite",
    "postgresql": "postgresql+asyncpg",
    "postgres": "postgresql+asyncpg",
    "postgresql+psycopg2": "postgresql+asyncpg",
    "postgres+psycopg2": "postgresql+asyncpg",
    "mysql": "mysql+aiomysql",
    "mysql+pymysql": "mysql+aiomysql",
    "mysql+mysqldb": "mysql+aiomysql",
    "mariadb": "mariadb+aiomysql",
    "mariadb+pymysql": "mariadb+aiomysql",
    "mariadb+mysqldb": "mariadb+aiomysql",
    "mssql+pyodbc": "mssql+aioodbc",
}
ALREADY_ASYNC = [
    "sqlite+aiosqlite",
    "postgresql+asyncpg",
    "postgresql+psycopg",
    "postgresql+psycopg_async",
    "mysql+aiomysql",
    "mysql+asyncmy",
    "mariadb+asyncmy",
    "oracle+oracledb",
    "oracle+oracledb_async",
    "mssql+aioodbc",
]
SYNC = {
    "sqlite+aiosqlite": "sqlite+pysqlite",
    "postgresql": "postgresql+psycopg",
    "postgres": "postgresql+psycopg",
    "postgresql+asyncpg": "postgresql+psycopg",
    "postgresql+psycopg_async": "postgresql+psycopg",
    "mysql+aiomysql": "mysql+pymysql",
    "mysql+asyncmy": "mysql+pymysql",
    "mariadb+aiomysql": "mariadb+pymysql",
    "oracle+oracledb_async": "oracle+oracledb",
    "mssql+aioodbc": "mssql+pyodbc",
}
ALREADY_SYNC = [
    "sqlite",
    "sqlite+pysqlite",
    "postgresql+psycopg",
    "postgresql+psycopg2",
    "postgresql+pg8000",
    "mysql+pymysql",
    "mysql+mysqldb",
    "mariadb+mariadbconnector",
    "oracle+oracledb",
    "duckdb",
]

# What follows the dialect and has to stay as it is, byte for byte.
SERVERS = {
    "plain": "user:pass@localhost/db",
    "port": "user:pass@localhost:6543/db",
    "no-user": "localhost/db",
    "no-password": "user@localhost/db",
    "empty-password": "user:@localhost/db",
    "no-database": "user:pass@localhost",
    "nothing": "",
    "ipv6": "user:pass@[::1]:5432/db",
    "encoded": "us%40er:p%40%3A%2F%23%25%3F%C3%A9%20w@h/db",
    "needlessly-encoded": "user:%70!*'()~%7e@h/db",
    "raw": "user:p:/#?é w+$@h/db",
    "user-with-at": "user@corp:pass@h/db",
}
FILES = {
    "absolute": "//var/lib/db.sqlite3",
    "relative": "/data/db.sqlite3",
    "memory": "/:memory:",
    "nothing": "",
    "odd-name": "/da ta/a:b@c,é%20d.db",
    "windows": "/C:\\Users\\me\\db.sqlite3",
    "windows-slashes": "/C:/Users/me/db.sqlite3",
    "shared-memory": "/file:mem?mode=memory&cache=shared&uri=true",
    "options": "/x.db?uri=true&timeout=5&isolation_level=IMMEDIATE&check_same_thread=0&vfs=unix",
}


@pytest.mark.parametrize(("given", "expected"), ASYNC.items(), ids=ASYNC)
def test_async_driver(given: str, expected: str) -> None:
    """Every supported sync name gets its async driver; mariadb stays mariadb."""
    assert convert_to_async_uri(f"{given}:///db") == f"{expected}:///db"


@pytest.mark.parametrize("name", ALREADY_ASYNC)
def test_async_urls_stay(name: str) -> None:
    """A URL that names an async driver is nobody's to change, options included."""
    url = f"{name}://u:p%21@h/db?whatever=1&a=2"
    assert convert_to_async_uri(url) == url
    assert to_async(make_url(url)) == (make_url(url), {})


@pytest.mark.parametrize(("given", "expected"), SYNC.items(), ids=SYNC)
def test_sync_driver(installed: Install, given: str, expected: str) -> None:
    """Every async name gets a sync driver, and plain postgresql one that is there."""
    installed("psycopg", "pymysql", "psycopg2")
    assert convert_to_sync_uri(f"{given}:///db") == f"{expected}:///db"


@pytest.mark.parametrize("name", ALREADY_SYNC)
def test_sync_urls_stay(name: str) -> None:
    """A URL that names a sync driver is nobody's to change, also where repom knows it not."""
    url = f"{name}://u:p%21@h/db?whatever=1&a=2"
    assert convert_to_sync_uri(url) == url
    assert to_sync(make_url(url)) == (make_url(url), {})


@pytest.mark.parametrize("rest", SERVERS.values(), ids=SERVERS)
@pytest.mark.parametrize("dialect", ["postgres", "postgresql", "mysql", "mariadb"])
def test_server_urls_keep_everything_else(installed: Install, dialect: str, rest: str) -> None:
    """User, password, host, port and database are the same bytes after a conversion."""
    installed("psycopg", "pymysql")
    for convert in (convert_to_async_uri, convert_to_sync_uri):
        converted = convert(f"{dialect}://{rest}")
        assert converted.partition("://")[2] == rest
        assert make_url(converted)[1:] == make_url(f"{dialect}://{rest}")[1:]


@pytest.mark.parametrize("rest", FILES.values(), ids=FILES)
def test_sqlite_urls_keep_everything_else(rest: str) -> None:
    """Path and options of a SQLite URL are the same bytes, there and back."""
    there = convert_to_async_uri(f"sqlite://{rest}")
    assert there == f"sqlite+aiosqlite://{rest}"
    assert convert_to_sync_uri(there) == f"sqlite+pysqlite://{rest}"


@pytest.mark.parametrize(
    "query",
    [
        "host=/var/run/postgresql",
        "host=a:1&host=b:2",
        "host=a,b&port=1,2",
        "host=a,b&port=1&port=2",
    ],
)
def test_hosts_in_the_query_stay(query: str) -> None:
    """A socket directory, and several hosts, are spelled the same for every driver."""
    url = f"postgresql://u:p%40@/db?{query}"
    assert convert_to_async_uri(url) == url.replace("://", "+asyncpg://")


def test_url_objects_are_rendered_with_their_password() -> None:
    """What is given as a URL object comes back as text that connects."""
    url = URL.create("postgres", "u", "p@ss", "h", 1, "db")
    assert convert_to_async_uri(url) == "postgresql+asyncpg://u:p%40ss@h:1/db"


def test_examples() -> None:
    """The examples in the docstrings are true."""
    assert doctest.testmod(repom.urls) == doctest.TestResults(failed=0, attempted=2)


@pytest.mark.parametrize(
    "name", ["postgresql+pg8000", "mysql+mysqlconnector", "duckdb", "sqlite+pysqlcipher"]
)
def test_no_async_driver(name: str) -> None:
    """A dialect or driver without an async twin is named, with what there is instead."""
    with pytest.raises(DatabaseURLError, match=rf"`{name}://`".replace("+", r"\+")) as caught:
        convert_to_async_uri(f"{name}://u:secret@h/db")
    assert "postgresql+psycopg2, " in str(caught.value)
    assert "aiosqlite, asyncmy, asyncpg" in str(caught.value)


def test_no_sync_driver() -> None:
    """An async driver under a dialect that is not known is no sync URL."""
    with pytest.raises(DatabaseURLError, match=r"`cockroachdb\+asyncpg://`"):
        convert_to_sync_uri("cockroachdb+asyncpg://u:secret@h/db")


# --- installed or not ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("modules", "given", "expected"),
    [
        (["psycopg", "psycopg2"], "postgresql+asyncpg", "postgresql+psycopg"),
        (["psycopg2"], "postgresql+asyncpg", "postgresql+psycopg2"),
        (["psycopg2"], "postgresql", "postgresql+psycopg2"),
        (["MySQLdb", "pymysql"], "mysql", "mysql+mysqldb"),
        (["pymysql"], "mysql", "mysql+pymysql"),
        (["pymysql"], "mariadb", "mariadb+pymysql"),
    ],
)
def test_sync_driver_is_one_that_is_installed(
    installed: Install, modules: list[str], given: str, expected: str
) -> None:
    """Where there is a choice, it falls on what is there, whatever SQLAlchemy's default is."""
    installed(*modules)
    assert convert_to_sync_uri(f"{given}://h/db") == f"{expected}://h/db"


@pytest.mark.parametrize(
    ("given", "command"),
    [
        ("postgresql", 'pip install "repom[postgres]" or pip install psycopg2-binary'),
        ("postgresql+asyncpg", 'pip install "repom[postgres]" or pip install psycopg2-binary'),
        ("mysql", 'pip install mysqlclient or pip install "repom[mysql]"'),
        ("mysql+aiomysql", 'pip install "repom[mysql]"'),
    ],
)
def test_no_sync_driver_is_installed(installed: Install, given: str, command: str) -> None:
    """With none of the possible drivers there, the error is the command that helps."""
    installed()
    with pytest.raises(MissingDriverError) as caught:
        convert_to_sync_uri(f"{given}://u:secret@h/db")
    assert str(caught.value).endswith(f": {command}")


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("sqlite+aiosqlite", 'pip install "repom[async]"'),
        ("postgresql+asyncpg", 'pip install "repom[postgres]"'),
        ("postgresql+psycopg", 'pip install "repom[postgres]"'),
        ("postgresql+psycopg_async", 'pip install "repom[postgres]"'),
        ("postgresql+psycopg2", "pip install psycopg2-binary"),
        ("mysql+aiomysql", 'pip install "repom[mysql]"'),
        ("mariadb+pymysql", 'pip install "repom[mysql]"'),
        ("mysql+asyncmy", "pip install asyncmy"),
        ("mysql+mysqldb", "pip install mysqlclient"),
        ("postgres", 'pip install "repom[postgres]" or pip install psycopg2-binary'),
    ],
)
def test_missing_driver(installed: Install, name: str, command: str) -> None:
    """A driver that is not installed is an error with the exact line to run."""
    installed()
    with pytest.raises(MissingDriverError) as caught:
        require_driver(make_url(f"{name}://u:secret@h/db"))
    assert str(caught.value).splitlines()[1] == f"Install it: {command}"


@pytest.mark.parametrize(
    "name",
    ["sqlite", "sqlite+pysqlite", "sqlite+aiosqlite", "postgres", "postgresql+asyncpg", "mysql"],
)
def test_driver_is_there(name: str) -> None:
    """No error for what is installed, nor for SQLite, which Python brings along."""
    require_driver(make_url(f"{name}://"))


@pytest.mark.parametrize(
    ("name", "module", "command"),
    [
        ("postgresql+pg8000", "pg8000", "pip install pg8000"),
        ("mysql+mariadbconnector", "mariadb", "pip install mariadb"),
        ("mysql+mysqlconnector", "mysql", "pip install mysql-connector-python"),
        ("mssql+aioodbc", "aioodbc", "pip install aioodbc"),
        ("mssql", "pyodbc", "pip install pyodbc"),
        ("oracle+oracledb_async", "oracledb", "pip install oracledb"),
    ],
)
def test_missing_driver_that_only_sqlalchemy_knows(
    monkeypatch: pytest.MonkeyPatch, name: str, module: str, command: str
) -> None:
    """Its dialect tells which module it misses."""
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingDriverError, match=f"driver of `{re.escape(name)}://`") as caught:
        require_driver(make_url(f"{name}://u:secret@h/db"))
    assert str(caught.value).splitlines()[1] == f"Install it: {command}"


def test_unknown_dialect() -> None:
    """Who brings it, only its user knows."""
    with pytest.raises(MissingDriverError, match="knows no dialect for `duckdb\\+engine://`"):
        require_driver(make_url("duckdb+engine://u:secret@h/db"))


# --- options ---------------------------------------------------------------------------------

DSN = "dsn=postgresql%3A%2F%2F%3F"
TRANSLATED = {
    "sslmode": ("sslmode=verify-full", "ssl=verify-full"),
    "dbname": ("dbname=x&user=u&password=p", "database=x&password=p&user=u"),
    "application_name": ("application_name=my+app", f"{DSN}application_name%3Dmy%2Bapp"),
    "server-options": ("options=-c+jit%3Doff", f"{DSN}options%3D-c%2Bjit%253Doff"),
    "tls-files": (
        "sslcert=c&sslkey=k&sslmode=require&sslrootcert=r",
        f"{DSN}sslcert%3Dc%26sslkey%3Dk%26sslrootcert%3Dr&ssl=require",
    ),
    "hosts": (
        "host=a%3A1&host=b%3A2&target_session_attrs=primary",
        "host=a%3A1&host=b%3A2&target_session_attrs=primary",
    ),
}


@pytest.mark.parametrize(("libpq", "asyncpg"), TRANSLATED.values(), ids=TRANSLATED)
def test_postgresql_options(libpq: str, asyncpg: str) -> None:
    """libpq's options mean the same for asyncpg, and the same again on the way back."""
    there = convert_to_async_uri(f"postgresql://u:p%40@h/db?{libpq}")
    assert there == f"postgresql+asyncpg://u:p%40@h/db?{asyncpg}"
    assert make_url(convert_to_sync_uri(there)).query == make_url(f"x://?{libpq}").query


@pytest.mark.parametrize(
    "option",
    [
        "channel_binding=prefer",
        "channel_binding=disable",
        "client_encoding=UTF8",
        "gssencmode=prefer",
    ],
)
def test_options_that_ask_for_the_usual(option: str) -> None:
    """What asyncpg does in any case needs no option."""
    assert convert_to_async_uri(f"postgresql://h/db?{option}") == "postgresql+asyncpg://h/db"


@pytest.mark.parametrize(("text", "timeout"), [("3", 3.0), (" +3", 3.0), ("0", None), ("-1", None)])
def test_connect_timeout(text: str, timeout: float | None) -> None:
    """asyncpg takes its time limit as a number only, which goes beside the URL."""
    url = make_url("postgresql://h/db").update_query_dict({"connect_timeout": text})
    assert to_async(url) == (make_url("postgresql+asyncpg://h/db"), {"timeout": timeout})


def test_text_cannot_say_connect_args() -> None:
    """A URL alone would lose the time limit: an error says where to put it."""
    with pytest.raises(DatabaseURLError, match=r"connect_args=\{'timeout': 3\.0\}") as caught:
        convert_to_async_uri("postgresql://u:secret@h/db?connect_timeout=3")
    assert "Database(url)" in str(caught.value)


@pytest.mark.parametrize(
    ("module", "size", "connect_args"),
    [("psycopg", "0", {"prepare_threshold": None}), ("psycopg", "500", {}), ("psycopg2", "0", {})],
)
def test_no_prepared_statements(
    installed: Install, module: str, size: str, connect_args: dict[str, None]
) -> None:
    """What keeps asyncpg from preparing statements keeps psycopg from it; psycopg2 never does."""
    installed(module)
    url = make_url(f"postgresql+asyncpg://h/db?prepared_statement_cache_size={size}")
    assert to_sync(url) == (make_url(f"postgresql+{module}://h/db"), connect_args)


MYSQL = "charset=utf8mb4&connect_timeout=3&init_command=SET+x%3D1&local_infile=1&unix_socket=%2Fs"


def test_mysql_options() -> None:
    """The MySQL drivers share their options' names."""
    assert convert_to_async_uri(f"mysql+pymysql://h/d?{MYSQL}") == f"mysql+aiomysql://h/d?{MYSQL}"
    assert convert_to_sync_uri(f"mysql+aiomysql://h/d?{MYSQL}") == f"mysql+pymysql://h/d?{MYSQL}"


@pytest.mark.parametrize("option", ["ca", "capath", "cert", "check_hostname", "cipher", "key"])
def test_tls_files_of_mysql(installed: Install, option: str) -> None:
    """SQLAlchemy's own options for TLS work with PyMySQL as with mysqlclient."""
    installed("pymysql")
    url = f"mysql://h/d?ssl_{option}=x&read_timeout=3&write_timeout=3"
    assert convert_to_sync_uri(url) == url.replace("://", "+pymysql://")


def test_mysqlclient_keeps_its_own_options(installed: Install) -> None:
    """`mysql://` is written for mysqlclient: where that is installed its options stay."""
    installed("MySQLdb")
    url = "mysql://h/d?ssl_mode=REQUIRED"
    assert convert_to_sync_uri(url) == url.replace("://", "+mysqldb://")


@pytest.mark.parametrize(
    ("url", "option", "instead"),
    [
        ("postgresql://h/d?channel_binding=require", "channel_binding", r"postgresql\+psycopg://"),
        ("postgresql://h/d?keepalives=1", "keepalives", r"postgresql\+psycopg://"),
        ("postgresql+asyncpg://h/d?command_timeout=1", "command_timeout", "connect_args"),
        ("postgresql+asyncpg://h/d?dsn=postgresql://:pw%40h/", "dsn", "connect_args"),
        ("postgresql+asyncpg://h/d?dsn=postgresql://?jit%3Doff", "dsn", "connect_args"),
        ("mysql+pymysql://h/d?ssl_ca=ca.pem", "ssl_ca", "create_default_context"),
        ("mysql+pymysql://h/d?read_timeout=3", "read_timeout", "connect_args"),
        ("mysql+pymysql://h/d?autocommit=true", "autocommit", "isolation_level"),
        ("mysql+aiomysql://h/d?auth_plugin=x", "auth_plugin", "connect_args"),
    ],
)
def test_untranslatable_options(url: str, option: str, instead: str) -> None:
    """An option that the other driver lacks is named, with what to do instead."""
    convert = to_sync if "asyncpg" in url or "aiomysql" in url else to_async
    with pytest.raises(DatabaseURLError, match=rf"`{option}`.\nRemove it.*{instead}"):
        convert(make_url(url))


@pytest.mark.parametrize("text", ["", "1.5", "x", "\N{ARABIC-INDIC DIGIT THREE}"])
def test_senseless_connect_timeout(text: str) -> None:
    """libpq would refuse it as well."""
    url = make_url("postgresql://h/db").update_query_dict({"connect_timeout": text})
    with pytest.raises(DatabaseURLError, match="`connect_timeout` is no whole number"):
        to_async(url)


def test_options_given_twice() -> None:
    """Nobody can say which one is meant."""
    with pytest.raises(DatabaseURLError, match="`sslmode` is given more than once"):
        convert_to_async_uri("postgresql://h/db?sslmode=allow&sslmode=require")


LIBPQ = (
    "sslmode=prefer&connect_timeout=3&application_name=a&options=-cjit%3Doff&krbsrvname=postgres"
    "&target_session_attrs=primary&passfile=/nowhere&ssl_min_protocol_version=TLSv1.2"
    "&channel_binding=prefer&gssencmode=disable&client_encoding=utf8&user=u&password=p&dbname=d"
)


@pytest.mark.parametrize(
    "url",
    [
        f"postgresql://127.0.0.1:PORT/db?{LIBPQ}",
        "postgresql://u@/db?host=127.0.0.1:PORT&host=127.0.0.1:PORT",
        "mysql+pymysql://u:p@127.0.0.1:PORT/db?charset=utf8mb4&connect_timeout=3&local_infile=1"
        "&init_command=x&sql_mode=x&program_name=x&use_unicode=1&client_flag=0",
    ],
    ids=["libpq", "hosts", "mysql"],
)
async def test_drivers_take_what_they_are_given(closed_port: int, url: str) -> None:
    """The real drivers accept every translated option, there and back: only the network fails."""
    given = make_url(url.replace("PORT", str(closed_port)))
    there, connect_args = to_async(given)
    engine = create_async_engine(there, connect_args=connect_args)
    with pytest.raises((OperationalError, ConnectionRefusedError)) as caught:
        await engine.connect().start()
    assert isinstance(caught.value, ConnectionRefusedError) or "2003" in str(caught.value)
    await engine.dispose()

    back, connect_args = to_sync(there)
    with pytest.raises(OperationalError, match=r"refused|2003"):
        create_engine(back, connect_args=connect_args).connect()


async def test_server_settings_reach_the_server() -> None:
    """asyncpg really sends the application's name and the options to the server."""
    login: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # https://www.postgresql.org/docs/current/protocol-message-formats.html, StartupMessage
        size = int.from_bytes(await reader.readexactly(4), "big")
        login.set_result(await reader.readexactly(size - 4))
        await reader.read()
        writer.close()

    options = "sslmode=disable&application_name=my+app&options=-csearch_path%3Da"
    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        url = convert_to_async_uri(f"postgresql://user@127.0.0.1:{port}/db?{options}")
        engine = create_async_engine(url)
        connecting = asyncio.ensure_future(engine.connect().start())
        packet = (await asyncio.wait_for(login, 10))[4:].split(b"\0")
        connecting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await connecting
        await engine.dispose()
    assert dict(zip(packet[::2], packet[1::2], strict=False)).items() >= {
        (b"user", b"user"),
        (b"database", b"db"),
        (b"application_name", b"my app"),
        (b"options", b"-csearch_path=a"),
    }


# --- reading ---------------------------------------------------------------------------------

UNREADABLE = {
    "empty": ("", "(empty) does not begin with a dialect"),
    "blank": (" \n", "(empty) does not begin with a dialect"),
    "no-scheme": ("user:SECRET@host/db", "*** does not begin with a dialect"),
    "dialect-only": ("postgres", "*** does not begin with a dialect"),
    "password-only": ("SECRET", "*** does not begin with a dialect"),
    "one-slash": ("postgresql:/user:SECRET@host/db", "*** does not begin with a dialect"),
    "jdbc": ("jdbc:postgresql://h/d?password=SECRET", "*** does not begin with a dialect"),
    "odd-scheme": ("my-sql://u:SECRET@h/d", "my-sql://u:***@h/d does not begin with a dialect"),
    "port": ("mysql://u:SECRET@h:33o6/d", "mysql://u:***@h:33o6/d has a port that is not a number"),
    "no-host": ("mysql://user:SECRET", "mysql://user:*** has a port that is not a number"),
    "secret-option": (
        "mysql://h:x/d?SSL_Key_Password=SECRET&a=b",
        "mysql://*** has a port that is not a number",
    ),
    "secret-option-with-at": (
        "mysql://u:SECRET@h:x/d?password=p@SECRET",
        "mysql://*** has an @ after",
    ),
    "at-in-password": ("mysql://u:SECRET@SECRET@h/d", "mysql://u:***@h/d has an @ after"),
    "at-and-slash": ("mysql://u:a@SECRET/SECRET@h/d", "mysql://u:***@h/d has an @ after"),
    "at-and-port": ("mysql://u:a@h:SECRET@h/d", "mysql://u:***@h/d has an @ after"),
    "at-and-query": ("mysql://u:a@x?y=SECRET@h/d", "mysql://u:***@h/d has an @ after"),
    "slash-in-user": ("mysql://u/x:SECRET@h/d", "mysql://u/x:***@h/d has an @ after"),
    "hosts": ("postgresql://u:SECRET@a:1,b:2/d", "postgresql://u:***@a:1,b:2/d has several hosts"),
    "hosts-one-port": ("postgresql://u:SECRET@a,b:2/d", "postgresql://u:***@a,b:2/d has several"),
    "hosts-no-user": ("postgresql://a:1,b:2/d", "postgresql://a:*** has several hosts"),
    "hosts-mysql": ("mysql://u:SECRET@a:1,b:2/d", "mysql://u:***@a:1,b:2/d has several hosts"),
    "hosts-mysql-no-port": ("mysql://u:SECRET@a,b/d", "mysql://u:***@a,b/d has several hosts"),
    "hosts-mariadb-query": (
        "mariadb+aiomysql://u:SECRET@/d?host=a&host=b",
        "mariadb+aiomysql://u:***@/d?host=a&host=b has several hosts",
    ),
}


@pytest.mark.parametrize(("url", "message"), UNREADABLE.values(), ids=UNREADABLE)
@pytest.mark.parametrize("read", [parse_url, convert_to_async_uri, convert_to_sync_uri])
def test_unreadable_urls(read: Callable[[str], object], url: str, message: str) -> None:
    """What is wrong is said, and what to write; no error in the chain holds the password."""
    with pytest.raises(DatabaseURLError) as caught:
        read(url)
    assert str(caught.value).startswith(f"The database URL {message}")
    assert "rite" in str(caught.value)
    assert str(caught.value).count("\n") <= 2
    assert "SECRET" not in told(caught.value)
    assert caught.value.__context__ is None


@pytest.mark.parametrize(("url", "message"), UNREADABLE.values(), ids=UNREADABLE)
def test_unreadable_urls_can_be_shown(url: str, message: str) -> None:
    """What is shown of an unreadable URL is what its error shows."""
    assert safe(url) == redact(url)
    assert message.startswith(f"{safe(url)} ")


@pytest.mark.parametrize("url", [None, b"sqlite://", 1])
def test_no_text(url: Any) -> None:
    """A setting that is not there arrives as None, and is an error of repom's own."""
    with pytest.raises(DatabaseURLError, match=f"not {type(url).__name__}"):
        parse_url(url)


@pytest.mark.parametrize("host", ["SECRET@h", "a,b"])
def test_url_objects_are_checked(host: str) -> None:
    """SQLAlchemy's own reading of a bad text is no better for being an object."""
    url = URL.create("postgresql+asyncpg", "u", "SECRET", host, None, "d@b")
    with pytest.raises(DatabaseURLError) as caught:
        to_async(url)
    assert "SECRET" not in told(caught.value)
    assert "SECRET" not in safe(url)


def test_comma_elsewhere() -> None:
    """A comma is part of other databases' host names, of passwords and of paths."""
    for url in ("mssql+pyodbc://u:p@h,1433/d", "postgresql://u:p,@h/d,", "sqlite:///a,b"):
        assert parse_url(url) == make_url(url)


# --- showing ---------------------------------------------------------------------------------

SHOWN = {
    "password": ("mysql://u:SECRET@h:1/d?charset=utf8", "mysql://u:***@h:1/d?charset=utf8"),
    "empty-password": ("mysql://u:@h/d", "mysql://u:***@h/d"),
    "no-password": ("postgres://u@h/d", "postgresql://u@h/d"),
    "file": ("sqlite:///data/db.sqlite3", "sqlite:///data/db.sqlite3"),
    "option": ("postgresql://h/d?password=SECRET", "postgresql://h/d?password=***"),
    "options": (
        "postgresql://h/d?application_name=a&passfile=f&sslPassword=SECRET%26SECRET&user=u",
        "postgresql://h/d?application_name=a&passfile=f&sslPassword=***&user=u",
    ),
    "twice": ("mysql://h/d?passwd=SECRET&passwd=SECRET", "mysql://h/d?passwd=***&passwd=***"),
    "dsn": (
        "postgresql+asyncpg://h/d?dsn=postgresql%3A%2F%2F%3Fsslpassword%3DSECRET",
        "postgresql+asyncpg://h/d?dsn=***",
    ),
    "odbc": ("mssql+aioodbc:///?odbc_connect=PWD%3DSECRET", "mssql+aioodbc:///?odbc_connect=***"),
}


@pytest.mark.parametrize(("url", "shown"), SHOWN.values(), ids=SHOWN)
def test_safe(url: str, shown: str) -> None:
    """Passwords are stars, wherever in the URL they are; the rest can be read."""
    assert safe(url) == safe(make_url(url)) == shown


# --- any text --------------------------------------------------------------------------------

hosts = st.one_of(
    st.from_regex(r"[a-z0-9.-]+", fullmatch=True), st.ip_addresses().map(str), st.none()
)
names = st.text(min_size=1)
urls = st.builds(
    URL.create,
    st.sampled_from([*ASYNC, *SYNC, *ALREADY_ASYNC]),
    username=names,
    password=st.text(),
    host=hosts,
    port=st.none() | st.integers(0, 65535),
    database=names,
)


@given(urls)
def test_any_parts_survive(url: URL) -> None:
    """Whatever user, password, host and database are, they are the same after any conversion."""
    there, _ = to_async(url)
    assert there[1:] == url[1:]
    back, _ = to_sync(there)
    assert back[1:] == url[1:]
    assert to_async(back)[0][1:] == url[1:]


@given(urls.map(lambda url: url.set(database="db")))
def test_any_text_survives(url: URL) -> None:
    """The same for URLs as text, byte for byte."""
    text = url.render_as_string(hide_password=False)
    for convert in (convert_to_async_uri, convert_to_sync_uri):
        assert convert(text).partition("://")[2] == text.partition("://")[2]


@given(urls, st.text())
def test_any_password_is_hidden(url: URL, secret: str) -> None:
    """What is shown does not depend on the password at all."""
    assert safe(url.set(password=secret)) == safe(url)
    with_option = url.set(query={"password": secret, "user": "u"})
    assert safe(with_option) == safe(url.set(query={"password": "x", "user": "u"}))


@given(st.text(), st.text(), st.sampled_from(["", "host", "h:1", "h:x", "[::1]", "a:1,b:2"]))
@example("x@y?a=", "&b=", "h")
@example("p@host?", "", "h")
@example("&password=", "@", "h")
@example("?@", "=", "")
@example("@\n", "@", "h")
def test_any_password_written_raw_is_hidden(before: str, after: str, host: str) -> None:
    """A password that nobody encoded is hidden too, whether the URL can be read or not."""
    text = f"postgresql://user:{before}SECRET{after}@{host}/db"
    assert "SECRET" not in safe(text)
    assert "SECRET" not in redact(text)
    error, password = None, "SECRET"
    try:
        password = parse_url(text).password or ""
    except DatabaseURLError as caught:
        error = caught
    assert "SECRET" not in told(error)
    assert "SECRET" in password
