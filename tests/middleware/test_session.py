"""The middleware itself: what it takes, what it serves, and what it finds around it."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import make_url, select
from sqlalchemy.exc import OperationalError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from repom import (
    Database,
    atomic,
    current_scope,
    current_session,
    current_sync_session,
    session_scope,
)
from repom.async_session import get_async_db_session
from repom.begin import ReadOnly
from repom.config import reset_config
from repom.errors import (
    ConfigurationError,
    InnerCommitError,
    MixedSessionsError,
    NoScopeError,
    ReadOnlyError,
    ScopeClosedError,
    UnknownDatabaseError,
)
from repom.middleware import DatabaseSessionMiddleware, commits_on_2xx, safe_methods
from repom.registry import forget_configured
from tests.middleware.notes import (
    NOTE,
    answer,
    connections_in_use,
    create_notes,
    notes,
    notes_database,
    responding,
    start,
    write,
)
from tests.support.asgi import Receive, Scope, Send, request, websocket
from tests.support.reader import connect


async def write_and_answer(send: Send) -> None:
    await write("a")
    await answer(send, 201)


# --- what it takes


@pytest.mark.parametrize("given", ["nothing", "Database", "str", "URL", "name", "mapping"])
async def test_ways_to_name_the_database(
    sqlite_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    """A `Database`, a URL, the name of a configured one, a mapping, or nothing for what is
    configured: `current_session()` means it."""
    create_notes(sqlite_url)
    (tmp_path / "settings_of_a_test.py").write_text(
        "from repom.config import RepomConfig\n"
        "class Config(RepomConfig):\n"
        f"    databases = {{'notes': {sqlite_url!r}}}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv("CONFIG_HOOK", raising=False)
    monkeypatch.setenv("REPOM_DATABASE_URL", "sqlite://" if given == "name" else sqlite_url)
    if given == "name":
        monkeypatch.setenv("CONFIG_HOOK", "settings_of_a_test:Config")
    reset_config()
    forget_configured()
    database: Any = {
        "nothing": None,
        "Database": Database(sqlite_url),
        "str": sqlite_url,
        "URL": make_url(sqlite_url),
        "name": "notes",
        "mapping": {"default": sqlite_url},
    }[given]
    app = DatabaseSessionMiddleware(responding(write_and_answer), database)
    try:
        response = await request(app, "POST")
        assert (response.status, response.exception) == (201, None)
        assert notes(sqlite_url) == ["a"]
    finally:
        await app.databases[None].dispose()
        reset_config()
        forget_configured()


async def test_several_databases(sqlite_url: str, database_url: str) -> None:
    """Each name has its session, and all of them end as the response says."""
    create_notes(f"{sqlite_url}.other")
    async with (
        notes_database(database_url) as database,
        contextlib.AsyncExitStack() as stack,
    ):
        other = Database(f"{sqlite_url}.other")
        stack.push_async_callback(other.dispose)

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await write("a")
            await current_session("other").execute(NOTE.insert().values(text="b"))
            await answer(send, int(scope["path"].removeprefix("/")))

        middleware = DatabaseSessionMiddleware(app, {"default": database, "other": other})
        await request(middleware, "POST", "/404")
        assert (notes(database_url), notes(f"{sqlite_url}.other")) == ([], [])
        await request(middleware, "POST", "/201")
        assert (notes(database_url), notes(f"{sqlite_url}.other")) == (["a"], ["b"])


def test_unknown_meaning_of_inner_commits() -> None:
    """A word that means nothing is refused, with those that do."""
    with pytest.raises(ValueError, match="write one of defer, allow, forbid"):
        DatabaseSessionMiddleware(responding(answer), inner_commits="never")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("inner_commits", "left", "rows"),
    [("defer", None, []), ("allow", None, ["a"]), ("forbid", InnerCommitError, [])],
)
async def test_commit_by_other_code(
    database: Database, database_url: str, inner_commits: Any, left: Any, rows: list[str]
) -> None:
    """`inner_commits` reaches the session of the request."""

    async def respond(send: Send) -> None:
        await write("a")
        await current_session().commit()
        await answer(send, 404)

    app = DatabaseSessionMiddleware(responding(respond), database, inner_commits=inner_commits)
    response = await request(app, "POST")
    assert type(response.exception) is (left or type(None))
    assert notes(database_url) == rows


@pytest.mark.parametrize(
    ("method", "waits"),
    [
        *(("GET", False), ("HEAD", False), ("OPTIONS", False), ("TRACE", False)),
        *(("POST", True), ("PUT", True), ("PATCH", True), ("DELETE", True), ("QUERY", True)),
    ],
)
async def test_who_takes_the_write_lock_of_sqlite(
    sqlite_url: str, method: str, waits: bool
) -> None:
    """A safe method reads while another process writes; any other asks for the lock at once,
    and not when it is too late for that."""
    kwargs = {"connect_args": {"timeout": 0.01}}
    async with notes_database(sqlite_url, engine_kwargs=kwargs) as database:

        async def respond(send: Send) -> None:
            await current_session().execute(select(NOTE.c.text))
            await answer(send)

        await database.ping()  # while no writer keeps it from switching to WAL
        with closing(connect(sqlite_url)) as writer:
            writer.execute("BEGIN IMMEDIATE")
            app = DatabaseSessionMiddleware(responding(respond), database)
            response = await request(app, method)
    assert isinstance(response.exception, OperationalError) is waits


async def test_wrong_configuration_fails_every_request(sqlite_url: str) -> None:
    """Where no server runs the lifespan, a request meets the error."""
    app = DatabaseSessionMiddleware(responding(answer), {"default": "nonsense"})
    for _ in range(2):
        response = await request(app)
        assert isinstance(response.exception, ConfigurationError)
        assert response.sent == []


# --- one inside another


async def test_mounted_middleware_joins(database: Database, database_url: str) -> None:
    """The inner one neither begins nor ends anything: its rule does not count, its app has the
    session of the outer one, and what the outer app does after it is the same transaction."""
    scopes: list[object] = []

    async def inner_app(scope: Scope, receive: Receive, send: Send) -> None:
        scopes.append(current_scope())
        await write("inner")

    inner = DatabaseSessionMiddleware(inner_app, {"default": database}, commit_on=commits_on_2xx)

    async def outer_app(scope: Scope, receive: Receive, send: Send) -> None:
        scopes.append(current_scope())
        await inner(scope, receive, send)
        assert notes(database_url) == []
        assert current_scope().is_open
        await write("outer")
        await answer(send, 303)

    response = await request(DatabaseSessionMiddleware(outer_app, database), "POST")
    assert (response.status, response.exception) == (303, None)
    assert scopes[0] is scopes[1]
    assert notes(database_url) == ["inner", "outer"]


@pytest.mark.parametrize("kind", ["http", "websocket"])
async def test_middlewares_that_disagree(sqlite_url: str, kind: str) -> None:
    """Two databases of the same name are an error that names both."""
    one, other = Database("sqlite://"), Database(sqlite_url)
    inner = DatabaseSessionMiddleware(responding(answer), other)
    outer = DatabaseSessionMiddleware(inner, one)
    if kind == "http":
        error = (await request(outer)).exception
    else:
        async with websocket(outer) as connection:
            pass
        error = connection.exception
    assert isinstance(error, ConfigurationError)
    assert f"the outer one has {one!r}, the one inside it {other!r}" in str(error)


async def test_inner_middleware_with_a_database_of_its_own(sqlite_url: str) -> None:
    """A name that the outer one does not know is an error, since it could not end it."""
    inner = DatabaseSessionMiddleware(responding(answer), {"reports": sqlite_url})
    outer = DatabaseSessionMiddleware(inner, {"default": "sqlite://"})
    response = await request(outer)
    assert isinstance(response.exception, UnknownDatabaseError)


async def test_request_inside_another_unit_of_work(database: Database, database_url: str) -> None:
    """A request made in a `session_scope()`, as tests make them, is a unit of its own, and
    afterwards the outer one goes on."""
    scopes: list[object] = []

    async def respond(send: Send) -> None:
        scopes.append(current_scope())
        await write_and_answer(send)

    app = DatabaseSessionMiddleware(responding(respond), database)
    with contextlib.suppress(LookupError):
        async with session_scope(database):
            outer = current_scope()
            await request(app, "POST")
            scope: dict[str, Any] = {"type": "http", "method": "POST", "path": "/"}
            with contextlib.suppress(Exception):  # the same row: only the context is of interest
                await app(scope, receive=_never, send=_ignore)
            assert current_scope() is outer
            await write("outer")
            assert outer not in scopes
            raise LookupError
    assert len(scopes) == 2
    assert notes(database_url) == ["a"]
    assert connections_in_use(database) == 0


async def _never() -> Any:
    await asyncio.Event().wait()


async def _ignore(message: Any) -> None:
    pass


async def test_layer_that_tries_again_with_the_same_request(
    database: Database, database_url: str
) -> None:
    """Each call with the same ASGI scope is a unit of work of its own; nothing stays in it."""
    attempts: list[object] = []

    async def respond(send: Send) -> None:
        await write("a")
        attempts.append(current_scope())
        if len(attempts) == 1:
            raise ConnectionError
        await answer(send, 201)

    app = DatabaseSessionMiddleware(responding(respond), database)
    keys: list[set[str]] = []

    async def retrying(scope: Scope, receive: Receive, send: Send) -> None:
        keys.append(set(scope))
        with contextlib.suppress(ConnectionError):
            await app(scope, receive, send)
        await app(scope, receive, send)
        keys.append(set(scope))

    response = await request(retrying, "POST")
    assert (response.status, response.exception) == (201, None)
    assert len(set(attempts)) == 2
    assert keys[0] == keys[1]
    assert notes(database_url) == ["a"]


# --- what is not a request


async def test_websocket_has_no_transaction(database: Database, database_url: str) -> None:
    """`current_session()` says to open `session_scope()` for each message, which means the
    middleware's database, also below a middleware that joins."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        while (message := await receive())["type"] == "websocket.receive":
            with pytest.raises(NoScopeError) as error:
                current_session()
            async with session_scope():
                await write(message["text"])
            await send({"type": "websocket.send", "text": str(error.value)})

    inner = DatabaseSessionMiddleware(app)
    async with websocket(DatabaseSessionMiddleware(inner, database)) as connection:
        for text in ("a", "b"):
            await connection.send(text)
            answered = (await connection.receive())["text"]
            assert notes(database_url)[-1] == text, "committed before it was answered"
    assert connection.exception is None
    assert answered == (
        "current_session() was called in a WebSocket connection, which can live for hours and is "
        "not one transaction.\nOpen a unit of work for each message: "
        "`async with session_scope() as session:` (or `with sync_session_scope()`), "
        "and answer after the block."
    )


async def test_unknown_kind_of_connection_passes(sqlite_url: str) -> None:
    """What is neither HTTP nor WebSocket nor lifespan is not touched."""
    seen: list[Any] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append((dict(scope), receive, send))

    middleware = DatabaseSessionMiddleware(app, sqlite_url)
    await middleware({"type": "telnet"}, _never, _ignore)
    assert seen == [({"type": "telnet"}, _never, _ignore)]


# --- after the request


async def test_session_after_the_request(database: Database, database_url: str) -> None:
    """The session object that somebody kept, and `current_session()` in a task that was left
    over, say that the unit of work has ended."""
    kept: list[AsyncSession] = []
    go_on = asyncio.Event()
    left_over: list[asyncio.Task[None]] = []

    async def respond(send: Send) -> None:
        async def later() -> None:
            await go_on.wait()
            await write("late")

        await write("a")
        kept.append(current_session())
        left_over.append(asyncio.create_task(later()))
        await answer(send, 201)

    await request(DatabaseSessionMiddleware(responding(respond), database), "POST")
    with pytest.raises(ScopeClosedError, match="session_scope"):
        await kept[0].execute(select(NOTE.c.text))
    go_on.set()
    with pytest.raises(ScopeClosedError, match="session_scope"):
        await left_over[0]
    with pytest.raises(NoScopeError):
        current_session()
    assert notes(database_url) == ["a"]
    assert connections_in_use(database) == 0


async def write_in_an_atomic_block() -> None:
    async with atomic():
        await write("late")


async def write_in_a_block() -> None:
    async with get_async_db_session():
        await write("late")


async def write_in_a_loop() -> None:
    async for _ in get_async_db_session():
        await write("late")


@pytest.mark.parametrize("work", [write_in_an_atomic_block, write_in_a_block, write_in_a_loop])
async def test_sibling_of_a_task_that_failed(
    database: Database, database_url: str, work: Callable[[], Awaitable[None]]
) -> None:
    """`gather` lets it go on when the client has its 500. What would be a part of the request
    until then is no transaction of its own afterwards."""
    answered = asyncio.Event()
    siblings: list[asyncio.Task[None]] = []

    async def fail() -> None:
        raise LookupError

    async def sibling() -> None:
        await answered.wait()
        await work()

    async def respond(send: Send) -> None:
        await write("a")
        siblings.append(asyncio.create_task(sibling()))
        await asyncio.gather(fail(), *siblings)

    response = await request(DatabaseSessionMiddleware(responding(respond), database), "POST")
    assert isinstance(response.exception, LookupError)
    answered.set()
    with pytest.raises(ScopeClosedError, match="session_scope"):
        await siblings[0]
    assert notes(database_url) == []
    assert connections_in_use(database) == 0


async def test_sync_session_in_a_thread(database: Database, database_url: str) -> None:
    """A thread of the request uses the sync session, whose transaction has ended when the
    response starts; the async one beside it is refused."""
    mixed: list[BaseException] = []

    def work() -> None:
        current_sync_session().execute(NOTE.insert().values(text="a"))

    async def respond(send: Send) -> None:
        await asyncio.to_thread(work)
        try:
            current_session()
        except MixedSessionsError as error:
            mixed.append(error)
        await send(start(201))
        assert notes(database_url) == ["a"]
        assert database.engine.pool.checkedout() == 0  # type: ignore[attr-defined]
        await send({"type": "http.response.body"})

    response = await request(DatabaseSessionMiddleware(responding(respond), database), "POST")
    assert (response.status, response.exception) == (201, None)
    assert len(mixed) == 1


# --- requests that only read


class NotesBase(DeclarativeBase):
    metadata = NOTE.metadata


class Note(NotesBase):
    __table__ = NOTE


async def test_read_only_by_method(database_url: str) -> None:
    """With `safe_methods` a GET only reads, and a POST writes."""
    async with notes_database(database_url) as database:
        app = DatabaseSessionMiddleware(
            responding(write_and_answer), database, read_only=safe_methods
        )
        assert (await request(app, "POST")).status == 201
        refused = await request(app, "GET", "/notes/7?secret=1")
        assert isinstance(refused.exception, ReadOnlyError)
        assert "GET /notes/7 only reads" in str(refused.exception)
        assert "secret" not in str(refused.exception)
        assert notes(database_url) == ["a"]


async def test_read_only_by_path(database_url: str) -> None:
    """A function of the application decides, also for one snapshot."""

    def choose(asgi_scope: Scope) -> ReadOnly:
        return "snapshot" if asgi_scope["path"] == "/report" else False

    async with notes_database(database_url) as database:
        app = DatabaseSessionMiddleware(responding(write_and_answer), database, read_only=choose)
        assert isinstance((await request(app, "POST", "/report")).exception, ReadOnlyError)
        assert (await request(app, "GET", "/")).status == 201
        assert notes(database_url) == ["a"]


async def test_read_only_for_all(sqlite_url: str) -> None:
    """True makes all requests read; a value that is none of them is an error at once."""
    async with notes_database(sqlite_url) as database:
        app = DatabaseSessionMiddleware(responding(write_and_answer), database, read_only=True)
        assert isinstance((await request(app, "POST")).exception, ReadOnlyError)
    with pytest.raises(ValueError, match="read_only='GET'"):
        DatabaseSessionMiddleware(responding(answer), read_only="GET")  # type: ignore[arg-type]


async def test_a_swallowed_write_of_a_request_that_only_reads(database_url: str) -> None:
    """Its 200 is not sent: it would tell of a note that is not there."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        with contextlib.suppress(ReadOnlyError):
            await write("a")
        await answer(send, 200)

    async with notes_database(database_url) as database:
        middleware = DatabaseSessionMiddleware(app, database, read_only=safe_methods)
        found = await request(middleware, "GET")
        assert not found.messages
        assert isinstance(found.exception, ReadOnlyError)
        assert notes(database_url) == []


async def test_a_handler_for_writes_of_requests_that_only_read(sqlite_url: str) -> None:
    """The application can answer for it, also where the write came as late as the flush at the
    end."""

    async def late(request: Request) -> Response:
        current_session().add(Note(text="a"))
        return Response()

    async def refused(request: Request, error: Exception) -> Response:
        return Response(status_code=405)

    async with notes_database(sqlite_url) as database:
        app = Starlette(
            routes=[Route("/", late)],
            middleware=[
                Middleware(DatabaseSessionMiddleware, database=database, read_only=safe_methods)
            ],
            exception_handlers={ReadOnlyError: refused},
        )
        assert (await request(app, "GET")).status == 405
        assert notes(sqlite_url) == []
