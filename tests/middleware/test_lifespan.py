"""The start and the end of the application."""

import asyncio
import itertools
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text
from starlette.applications import Starlette

from repom import Database, current_session, session_scope, sync_session_scope
from repom.config import reset_config
from repom.errors import (
    ConfigHookError,
    ConfigurationError,
    DatabaseFileError,
    DatabaseURLError,
    MissingDriverError,
    NoScopeError,
    UnknownDatabaseError,
)
from repom.middleware import DatabaseSessionMiddleware
from repom.registry import forget_configured
from tests.middleware.notes import answer, create_notes, notes, responding, write
from tests.support.asgi import LifespanFailed, Message, Receive, Scope, Send, lifespan, request
from tests.support.cancelling import CANCELLING, Interruption
from tests.support.databases import CLOSE_TIMEOUT
from tests.support.polling import until
from tests.support.reader import connections


@pytest.fixture
def configuration(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """The environment, to which the configuration of this process is read anew."""
    for name in ("REPOM_DATABASE_URL", "DATABASE_URL", "CONFIG_HOOK"):
        monkeypatch.delenv(name, raising=False)
    reset_config()
    forget_configured()
    yield monkeypatch
    reset_config()
    forget_configured()


@pytest.fixture(params=["postgres_url", "mysql_url"])
def server_url(request: pytest.FixtureRequest) -> str:
    """The URL of a database that knows who is connected."""
    url: str = request.getfixturevalue(request.param)
    return url


def wait_until_disconnected(url: str) -> None:
    """A server notices a closed connection a moment later."""
    end = time.monotonic() + CLOSE_TIMEOUT
    while found := connections(url):
        assert time.monotonic() < end, f"still connected: {found}"


# --- the end


@pytest.mark.parametrize("given", ["Database", "URL", "configured"])
async def test_shutdown_disposes_of_the_databases(
    server_url: str, configuration: pytest.MonkeyPatch, given: str
) -> None:
    """When the server hears that the shutdown is complete, no pooled connection is left: async
    or sync, of a database that was given or of one that is configured."""
    configuration.setenv("REPOM_DATABASE_URL", server_url)
    create_notes(server_url)
    forms: dict[str, Any] = {"Database": Database(server_url), "URL": server_url}
    connected_in_shutdown: list[int] = []
    heard: list[str] = []

    @asynccontextmanager
    async def own_lifespan(app: Starlette) -> AsyncIterator[None]:
        with sync_session_scope() as sync_session:
            sync_session.execute(text("SELECT 1"))
        yield
        async with session_scope() as session:
            await session.execute(text("SELECT 1"))
        connected_in_shutdown.append(len(connections(server_url)))

    def look(message: Message) -> None:
        if message["type"] == "lifespan.shutdown.complete":
            wait_until_disconnected(server_url)
        heard.append(message["type"])

    app = DatabaseSessionMiddleware(Starlette(lifespan=own_lifespan), forms.get(given))
    async with lifespan(app, on_message=look):
        pass
    assert connected_in_shutdown == [2], "the app's own shutdown can still use them"
    assert heard == ["lifespan.startup.complete", "lifespan.shutdown.complete"]


@pytest.mark.parametrize("stage", ["startup", "shutdown"])
async def test_databases_are_disposed_of_when_the_app_fails(server_url: str, stage: str) -> None:
    """A startup or a shutdown that raises leaves no pooled connection either."""

    @asynccontextmanager
    async def own_lifespan(app: Starlette) -> AsyncIterator[None]:
        async with session_scope() as session:
            await session.execute(text("SELECT 1"))
        if stage == "startup":
            raise LookupError("of the app")
        yield
        raise LookupError("of the app")

    app = DatabaseSessionMiddleware(Starlette(lifespan=own_lifespan), server_url)
    with pytest.raises(LifespanFailed, match="LookupError: of the app"):
        async with lifespan(app):
            pass
    wait_until_disconnected(server_url)


@pytest.mark.parametrize("shift", range(len(CANCELLING)))
async def test_databases_are_disposed_of_when_the_end_is_cancelled(
    server_url: str, shift: int
) -> None:
    """At any await, by a server that does not wait any longer: all of them, to the last
    connection."""
    databases = {name: Database(server_url) for name in ("default", "other")}

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        for name in databases:
            async with session_scope(name) as session:
                await session.execute(text("SELECT 1"))
        await send({"type": "lifespan.shutdown.complete"})

    async def ignore(message: Message) -> None:
        pass

    middleware = DatabaseSessionMiddleware(app, databases)
    for number in itertools.count(1):
        how = CANCELLING[(number + shift) % len(CANCELLING)]
        interruption = Interruption(number, how)
        run = interruption.run(middleware({"type": "lifespan"}, None, ignore))
        await asyncio.wait((asyncio.create_task(run),))
        await until(lambda: not connections(server_url))
        if not interruption.happened:
            break
    assert number > 10


async def test_database_that_cannot_be_disposed_of(
    server_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It is logged, and keeps neither the others from it nor the server from its answer."""

    class Stubborn(Database):
        async def dispose(self) -> None:
            raise OSError("no")

    other = Database(server_url)

    @asynccontextmanager
    async def own_lifespan(app: Starlette) -> AsyncIterator[None]:
        async with session_scope("other") as session:
            await session.execute(text("SELECT 1"))
        yield

    stubborn = Stubborn("sqlite://")
    databases = {"default": stubborn, "other": other}
    async with lifespan(DatabaseSessionMiddleware(Starlette(lifespan=own_lifespan), databases)):
        pass
    wait_until_disconnected(server_url)
    assert "disposing of <Database sqlite://> failed" in caplog.messages


# --- the start

Configure = Callable[[pytest.MonkeyPatch, Path], object]


def in_a_file(configuration: pytest.MonkeyPatch, folder: Path) -> str:
    (folder / "file").write_text("")
    return f"sqlite:///{folder}/file/db.sqlite3"


def with_a_bad_hook(configuration: pytest.MonkeyPatch, folder: Path) -> None:
    configuration.setenv("CONFIG_HOOK", "no_such_module:function")


def without_its_drivers(configuration: pytest.MonkeyPatch, folder: Path) -> str:
    for driver in ("asyncpg", "psycopg", "psycopg2"):
        configuration.setitem(sys.modules, driver, None)
    return "postgresql://nowhere/test"


WRONG: dict[str, tuple[Configure, type[ConfigurationError], str]] = {
    "unusable URL": (
        lambda *_: "postgresql:/oops",
        DatabaseURLError,
        "does not begin with a dialect",
    ),
    "missing driver": (without_its_drivers, MissingDriverError, "pip install"),
    "unwritable file": (in_a_file, DatabaseFileError, "db.sqlite3"),
    "unwritable file, second": (
        lambda *given: {"default": "sqlite://", "other": in_a_file(*given)},
        DatabaseFileError,
        "db.sqlite3",
    ),
    "unknown name": (lambda *_: "reports", UnknownDatabaseError, "'reports'"),
    "no database": (
        lambda *_: {"default": 42},
        ConfigurationError,
        "Give a URL, a Database",
    ),
    "bad hook": (with_a_bad_hook, ConfigHookError, "no_such_module"),
}


@pytest.mark.parametrize("wrong", WRONG)
async def test_wrong_configuration_stops_the_start(
    configuration: pytest.MonkeyPatch, tmp_path: Path, wrong: str
) -> None:
    """What the first request would meet is said before the app starts, by the one message that
    servers do not take for an app without lifespan, with the error's own words."""
    configure, kind, words = WRONG[wrong]
    database = configure(configuration, tmp_path)
    started: list[bool] = []

    @asynccontextmanager
    async def own_lifespan(app: Starlette) -> AsyncIterator[None]:
        started.append(True)
        yield

    app = Starlette(lifespan=own_lifespan)
    # As everybody adds it: made by Starlette, when the lifespan is there already.
    app.add_middleware(DatabaseSessionMiddleware, database)  # type: ignore[arg-type]
    with pytest.raises(LifespanFailed) as failed:
        async with lifespan(app):
            pass
    assert isinstance(failed.value.__cause__, kind)
    assert f"startup failed: {kind.__name__}: " in str(failed.value)
    assert words in str(failed.value)
    assert started == []


async def test_own_lifespan_finds_the_database(database_url: str) -> None:
    """In the app's startup and shutdown `session_scope()` means the middleware's database, and
    `current_session()` says to use it."""
    create_notes(database_url)
    advice: list[str] = []

    @asynccontextmanager
    async def own_lifespan(app: Starlette) -> AsyncIterator[None]:
        async with session_scope():
            await write("startup")
        yield
        async with session_scope():
            await write("shutdown")
        with pytest.raises(NoScopeError) as error:
            current_session()
        advice.extend(str(error.value).splitlines())

    app = DatabaseSessionMiddleware(Starlette(lifespan=own_lifespan), database_url)
    async with lifespan(app):
        assert notes(database_url) == ["startup"]
    assert notes(database_url) == ["startup", "shutdown"]
    assert advice == [
        "current_session() was called in the start or the end of the application, where no "
        "request is served.",
        "Open a unit of work: `async with session_scope() as session:` "
        "(or `with sync_session_scope()`).",
    ]


async def test_app_without_lifespan(sqlite_url: str) -> None:
    """What such an app raises reaches the server, which then goes on; requests are served."""
    create_notes(sqlite_url)
    error = NotImplementedError()

    async def respond(send: Send) -> None:
        await write("a")
        await answer(send)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            raise error
        await responding(respond)(scope, receive, send)

    database = Database(sqlite_url)
    middleware = DatabaseSessionMiddleware(app, database)
    with pytest.raises(LifespanFailed) as failed:
        async with lifespan(middleware):
            pass
    assert failed.value.__cause__ is error
    response = await request(middleware, "POST")
    assert response.status == 200
    assert notes(sqlite_url) == ["a"]
    await database.dispose()
