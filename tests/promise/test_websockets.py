"""WebSockets: a unit of work for each message, and between messages nothing is open.

The application is served by uvicorn, in a thread; the test is its clients, on sockets that also
break. What a client has been answered is committed, seen by a second connection; what fails, or
is cut off by a reset of the TCP connection, leaves nothing. Who asks for a session outside of a
block is told what to write, and who lets FastAPI hold one is warned.

More of this: tests/middleware/test_session.py and tests/integration/test_starlette.py (what the
error says), tests/integration/test_sockets.py (many messages), tests/test_async_session.py (the
warning), tests/promise/test_background.py (tasks that a unit of work leaves behind).
"""

import asyncio
import contextlib
import logging
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from fastapi import Depends, FastAPI, HTTPException, WebSocket, WebSocketDisconnect
from fastapi.responses import JSONResponse
from sqlalchemy import insert
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from starlette.middleware.base import BaseHTTPMiddleware
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, ConnectionClosedError, InvalidStatus
from websockets.sync.client import connect as connect_blocking

from repom import (
    Database,
    atomic,
    current_scope,
    current_session,
    current_sync_session,
    on_commit,
    on_rollback,
    session_scope,
    sync_session_scope,
)
from repom.async_session import get_async_db_session
from repom.errors import NoScopeError, WouldDeadlockError
from repom.middleware import DatabaseSessionMiddleware
from repom.session import get_db_session, get_db_transaction
from tests.middleware.notes import NOTE, NOWHERE, notes, write, write_sync
from tests.promise.served import Served, notes_at, serving
from tests.support.asgi import ASGIApp
from tests.support.polling import until
from tests.support.sockets import post, reset

PATIENCE = 10.0  # seconds that a client waits for an answer

Endpoint = Callable[..., Awaitable[None]]


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    """An empty table of notes, on each kind of database."""
    with notes_at(database_url) as database:
        yield database


@pytest.fixture(params=["sqlite_url", "postgres_url"])
def deferring_url(request: pytest.FixtureRequest) -> str:
    """The URL of a database that finds a wrong parent of a note at COMMIT."""
    url: str = request.getfixturevalue(request.param)
    return url


def app_of(database: Database, endpoint: Endpoint) -> FastAPI:
    """An application with the middleware, and one WebSocket."""
    app = FastAPI()
    app.add_middleware(DatabaseSessionMiddleware, database)
    app.add_api_websocket_route("/", endpoint)
    return app


def client_of(served: Served, path: str = "/") -> connect:
    """A client; its block ends with the closing handshake."""
    return connect(uri_of(served) + path, proxy=None)


def uri_of(served: Served) -> str:
    return served.base_url.replace("http:", "ws:")


async def ask(client: ClientConnection, text: str) -> str:
    """Send a message, and return the answer."""
    await client.send(text)
    return await hear(client)


async def hear(client: ClientConnection) -> str:
    async with asyncio.timeout(PATIENCE):
        return str(await client.recv())


class RefusedError(Exception):
    """An error of the application."""


# --- outside of a block

ASKS: dict[str, Callable[[], object]] = {
    "current_session": current_session,
    "current_sync_session": current_sync_session,
    "current_scope": current_scope,
    "on_commit": lambda: on_commit(print),
    "on_rollback": lambda: on_rollback(print),
}


@pytest.mark.parametrize("where", ["endpoint", "child task", "thread"])
async def test_what_to_write_is_said(sqlite_url: str, where: str) -> None:
    """Each way to ask names itself, the place, and the block to write; the connection goes on."""

    async def here(ask: Callable[[], object]) -> None:
        ask()

    async def child_task(ask: Callable[[], object]) -> None:
        await asyncio.create_task(here(ask))

    places: dict[str, Callable[[Callable[[], object]], Awaitable[object]]] = {
        "endpoint": here,
        "child task": child_task,
        "thread": asyncio.to_thread,
    }

    async def endpoint(websocket: WebSocket) -> None:
        await websocket.accept()
        async for name in websocket.iter_text():
            with pytest.raises(NoScopeError) as caught:
                await places[where](ASKS[name])
            await websocket.send_text(str(caught.value))

    with (
        notes_at(sqlite_url) as database,
        serving(database, app_of(database, endpoint)) as served,
    ):
        async with client_of(served) as client:
            for name in ASKS:
                first, second = (await ask(client, name)).splitlines()
                assert first.startswith(f"{name}() was called in a WebSocket connection, which")
                assert "for each message: `async with session_scope() as session:`" in second
                assert "`with sync_session_scope()`" in second


async def test_error_that_nobody_catches(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """It ends this connection without an answer, is in the server's log, and no more."""

    async def endpoint(websocket: WebSocket) -> None:
        await websocket.accept()
        async for text in websocket.iter_text():
            if text == "wrong":
                await write(text)
            async with session_scope():
                await write(text)
            await websocket.send_text(text)

    url = database.url.render_as_string(hide_password=False)
    with serving(database, app_of(database, endpoint)) as served:
        async with client_of(served) as other:
            async with client_of(served) as client:
                with pytest.raises(ConnectionClosedError):
                    await ask(client, "wrong")
            assert await ask(other, "right") == "right"
    assert notes(url) == ["right"]
    assert "NoScopeError" in caplog.text


# --- a unit of work for each message, in every form


async def store(text: str) -> None:
    await write(text)
    if text.startswith("bad"):
        raise RefusedError


def store_in_a_thread(text: str) -> None:
    write_sync(text)
    if text.startswith("bad"):
        raise RefusedError


async def by_session_scope(text: str) -> None:
    async with session_scope():
        await store(text)


async def by_atomic(text: str) -> None:
    async with atomic():
        await store(text)


@atomic()
async def by_decorator(text: str) -> None:
    await store(text)


async def by_block(text: str) -> None:
    async with get_async_db_session():
        await store(text)


async def by_loop(text: str) -> None:
    async for _ in get_async_db_session():
        await store(text)


async def by_child_task(text: str) -> None:
    async with session_scope():
        await asyncio.create_task(store(text))


async def by_thread(text: str) -> None:
    def work() -> None:
        with sync_session_scope():
            store_in_a_thread(text)

    await asyncio.to_thread(work)


async def by_block_in_a_thread(text: str) -> None:
    def work() -> None:
        with get_db_session():
            store_in_a_thread(text)

    await asyncio.to_thread(work)


def opener() -> Callable[[], Any]:
    """A dependency that only says how to open a session."""
    return get_async_db_session


FORMS = [
    by_session_scope,
    by_atomic,
    by_decorator,
    by_block,
    by_loop,
    by_child_task,
    by_thread,
    by_block_in_a_thread,
]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
async def test_every_form_for_a_message(
    database: Database,
    database_url: str,
    form: Callable[[str], Awaitable[None]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """What is answered is committed, what is refused is rolled back, and while the server waits
    for the next message no connection is in use. Nobody is warned."""

    async def endpoint(websocket: WebSocket) -> None:
        await websocket.accept()
        async for text in websocket.iter_text():
            try:
                await form(text)
            except RefusedError:
                await websocket.send_text("refused")
            else:
                await websocket.send_text("stored")

    with serving(database, app_of(database, endpoint)) as served:
        async with client_of(served) as client:
            for text, answer in {"a": "stored", "bad": "refused", "b": "stored"}.items():
                before = notes(database_url)
                assert await ask(client, text) == answer
                assert notes(database_url) == before + [text] * (answer == "stored")
                if form is by_loop:  # whose rollback is not awaited
                    await until(lambda: served.in_use == 0)
                served.assert_nothing_open()
    # Its pools tell of themselves at INFO, where another test has set up logging for that.
    assert [
        record
        for record in caplog.records
        if record.name.startswith("repom") and record.levelno >= logging.WARNING
    ] == []


async def test_dependency_that_says_how_to_open_a_session(
    database: Database, database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """`Depends` for the function, and `async with` for each message."""

    async def endpoint(websocket: WebSocket, opens: Any = Depends(opener)) -> None:
        await websocket.accept()
        async for text in websocket.iter_text():
            async with opens() as session:
                await session.execute(insert(NOTE).values(text=text))
            await websocket.send_text(text)

    with serving(database, app_of(database, endpoint)) as served:
        async with client_of(served) as client:
            for text in ("a", "b"):
                assert await ask(client, text) == text
                assert notes(database_url)[-1] == text
                served.assert_nothing_open()
    assert caplog.messages == []


async def test_commit_that_fails(deferring_url: str) -> None:
    """The block raises, so that no success is sent. An application that catches it may say so
    and go on; one that does not loses the connection."""

    async def endpoint(websocket: WebSocket) -> None:
        await websocket.accept()
        async for text in websocket.iter_text():
            try:
                async with session_scope():
                    await write(text, parent=NOWHERE if text.startswith("bad") else None)
            except IntegrityError:
                if text == "bad, not caught":
                    raise
                await websocket.send_text("refused")
            else:
                await websocket.send_text("stored")

    with (
        notes_at(deferring_url) as database,
        serving(database, app_of(database, endpoint)) as served,
    ):
        async with client_of(served) as client:
            assert await ask(client, "bad") == "refused"
            served.assert_nothing_open()
            assert await ask(client, "a") == "stored"
            assert notes(deferring_url) == ["a"]
            with pytest.raises(ConnectionClosedError):
                await ask(client, "bad, not caught")
        assert notes(deferring_url) == ["a"]
        await until(lambda: served.in_use == 0)


# --- clients that are gone


class Broken:
    """An endpoint whose client breaks off, at a chosen moment.

    Attributes:
        may_go_on: what the work of `working` waits for.
        left: how the endpoint was left.
    """

    def __init__(self, moment: str) -> None:
        self.may_go_on = threading.Event()
        self.left: list[str] = []
        self._moment: Callable[[WebSocket, str], Awaitable[None]] = getattr(self, moment)

    async def __call__(self, websocket: WebSocket) -> None:
        await websocket.accept()
        try:
            await self._moment(websocket, await websocket.receive_text())
        except BaseException as error:
            self.left.append(type(error).__name__)
            raise
        self.left.append("return")

    async def between(self, websocket: WebSocket, text: str) -> None:
        async with session_scope():
            await write(text)
        await websocket.send_text("stored")
        await websocket.receive_text()

    async def receiving(self, websocket: WebSocket, text: str) -> None:
        async with session_scope():
            await write(text)
            await websocket.send_text("progress")
            await websocket.receive_text()

    async def sending(self, websocket: WebSocket, text: str) -> None:
        async with session_scope():
            await write(text)
            while True:
                await websocket.send_text("progress")
                await asyncio.sleep(0.001)

    async def working(self, websocket: WebSocket, text: str) -> None:
        async with session_scope():
            await write(text)
            await websocket.send_text("progress")
            await until(self.may_go_on.is_set)
        await websocket.receive_text()

    async def cancelled(self, websocket: WebSocket, text: str) -> None:
        async def work() -> None:
            async with session_scope():
                await write(text)
                await websocket.send_text("progress")
                await asyncio.Event().wait()

        working = asyncio.create_task(work())
        try:
            await websocket.receive_text()
        finally:
            working.cancel()
            await asyncio.wait({working})


@pytest.mark.parametrize("how", ["reset", "close"])
@pytest.mark.parametrize(
    ("moment", "rows"),
    [
        ("between", ["a"]),
        ("receiving", []),
        ("sending", []),
        ("working", ["a"]),
        ("cancelled", []),
    ],
)
async def test_client_that_is_gone(
    database: Database, database_url: str, moment: str, rows: list[str], how: str
) -> None:
    """A block that notices it is rolled back, one that does not goes on to its COMMIT, and in
    neither does a message that was sent in it commit what is half done. Nothing stays open."""
    endpoint = Broken(moment)
    with serving(database, app_of(database, endpoint)) as served:
        async with client_of(served) as client:
            told = await ask(client, "a")
            assert notes(database_url) == (["a"] if told == "stored" else [])
            if how == "reset":
                reset(client.transport)
            else:
                await client.close()
        endpoint.may_go_on.set()
        await until(lambda: endpoint.left == ["WebSocketDisconnect"])
        assert notes(database_url) == rows
        served.assert_nothing_open()


# --- many clients


async def test_many_connections_that_wait(database_url: str) -> None:
    """Fifty share two connections of the pool, and hold none while they wait."""

    async def endpoint(websocket: WebSocket) -> None:
        await websocket.accept()
        async for text in websocket.iter_text():
            async with session_scope():
                await write(text)
            await websocket.send_text(text)

    with (
        notes_at(database_url, pool_size=2, max_overflow=0, pool_timeout=PATIENCE) as database,
        serving(database, app_of(database, endpoint)) as served,
    ):
        async with contextlib.AsyncExitStack() as stack:
            clients = [await stack.enter_async_context(client_of(served)) for _ in range(50)]
            for turn in range(2):
                texts = [f"{turn}-{number}" for number in range(len(clients))]
                assert await asyncio.gather(*map(ask, clients, texts)) == texts
                served.assert_nothing_open()
                assert set(texts) <= set(notes(database_url))
    assert len(notes(database_url)) == 100


@pytest.mark.parametrize("fails", [False, True])
async def test_heartbeat_commits_nothing(
    database: Database, database_url: str, fails: bool
) -> None:
    """What a sibling task sends leaves the block's half-done work alone."""

    async def endpoint(websocket: WebSocket) -> None:
        async def beat() -> None:
            while True:
                await websocket.send_text("beat")
                await asyncio.sleep(0.001)

        await websocket.accept()
        with contextlib.suppress(RefusedError):
            async with session_scope():
                beating = asyncio.create_task(beat())
                await write("half")
                await websocket.receive_text()
                beating.cancel()
                if fails:
                    raise RefusedError
                await write("whole")
        await websocket.send_text("done")

    with serving(database, app_of(database, endpoint)) as served:
        async with client_of(served) as client:
            for _ in range(10):
                assert await hear(client) == "beat"
                assert notes(database_url) == []
            await client.send("go on")
            while await hear(client) != "done":
                continue
            assert notes(database_url) == ([] if fails else ["half", "whole"])
            served.assert_nothing_open()


async def test_tasks_of_one_connection(database: Database, database_url: str) -> None:
    """Each has units of work of its own: one that fails undoes nothing of the other."""

    async def endpoint(websocket: WebSocket) -> None:
        async def record(name: str) -> None:
            for number in range(10):
                with contextlib.suppress(RefusedError):
                    async with session_scope():
                        await write(f"{name}-{number}")
                        if number % 2:
                            raise RefusedError

        await websocket.accept()
        async with asyncio.TaskGroup() as tasks:
            for name in "abc":
                tasks.create_task(record(name))
        await websocket.send_text("done")

    with serving(database, app_of(database, endpoint)) as served:
        async with client_of(served) as client:
            assert await hear(client) == "done"
            stored = notes(database_url)
            served.assert_nothing_open()
    assert sorted(stored) == [f"{name}-{number}" for name in "abc" for number in range(0, 10, 2)]


@pytest.mark.parametrize("by", ["websocket", "http"])
async def test_broadcast_on_commit(deferring_url: str, by: str) -> None:
    """Everybody hears of a message that one connection, or a request, has committed, and can
    read it then; of one that is refused or whose COMMIT fails nobody hears."""
    room: set[WebSocket] = set()

    async def broadcast(text: str) -> None:
        for websocket in room:
            await websocket.send_text(text)

    async def work(text: str) -> None:
        await write(text, parent=NOWHERE if text == "fails" else None)
        on_commit(lambda: broadcast(text))
        if text == "refused":
            raise HTTPException(409)

    async def endpoint(websocket: WebSocket) -> None:
        await websocket.accept()
        room.add(websocket)
        await websocket.send_text("welcome")
        async for text in websocket.iter_text():
            with contextlib.suppress(HTTPException, IntegrityError):
                async with session_scope():
                    await work(text)
        room.discard(websocket)

    with notes_at(deferring_url) as database:
        app = app_of(database, endpoint)
        app.post("/{text}", status_code=201)(work)
        with serving(database, app) as served:
            async with contextlib.AsyncExitStack() as stack:
                clients = [await stack.enter_async_context(client_of(served)) for _ in range(5)]
                for client in clients:
                    assert await hear(client) == "welcome"
                for text in ("fails", "refused", "a", "fails", "b"):
                    if by == "websocket":
                        await clients[0].send(text)
                    else:
                        await asyncio.to_thread(post, f"{served.base_url}/{text}")
                for text in ("a", "b"):
                    for client in clients:
                        assert await hear(client) == text
                        assert text in notes(deferring_url)
    assert notes(deferring_url) == ["a", "b"]


# --- a session that FastAPI holds

HELD: dict[str, Any] = {
    "async": Depends(get_async_db_session),
    "async, function scope": Depends(get_async_db_session, scope="function"),
    "sync": Depends(get_db_session),
    "transaction": Depends(get_db_transaction),
}

# How a connection ends: whether the endpoint then returns.
ENDS = {
    "return": True,
    "error": False,
    "close": False,
    "reset": False,
    "caught close": True,
    "caught reset": True,
}


async def put(session: AsyncSession | Session, text: str) -> None:
    statement = insert(NOTE).values(text=text)
    if isinstance(session, AsyncSession):
        await session.execute(statement)
    else:
        await asyncio.to_thread(session.execute, statement)


@pytest.mark.parametrize("kind", HELD)
async def test_dependency_holds_one_session(
    database: Database, database_url: str, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It is committed when the endpoint returns, and rolled back when an exception leaves it,
    whatever has been answered. A warning says what to write instead, once."""

    async def endpoint(websocket: WebSocket, session: Any = HELD[kind]) -> None:
        await websocket.accept()
        ends = await websocket.receive_text()
        await put(session, ends)
        await websocket.send_text("answered")
        try:
            await websocket.receive_text()
        except WebSocketDisconnect:
            if not ENDS[ends]:
                raise
        if ends == "error":
            raise RefusedError

    with serving(database, app_of(database, endpoint)) as served:
        for ends in ENDS:
            async with client_of(served) as client:
                assert await ask(client, ends) == "answered"
                assert ends not in notes(database_url)
                assert served.in_use == 1
                if "reset" in ends:
                    reset(client.transport)
                elif "close" in ends:
                    await client.close()
                else:
                    await client.send("go on")
                await client.wait_closed()
            await until(lambda: served.in_use == 0)
            served.assert_nothing_open()
    assert notes(database_url) == [ends for ends, returns in ENDS.items() if returns]
    (record,) = [record for record in caplog.records if record.name == "repom"]
    assert record.levelname == "WARNING"
    assert "() is a dependency in a WebSocket connection, which can live" in record.getMessage()
    assert "`async with session_scope() as session:`" in record.getMessage()


async def test_scope_for_each_message_beside_a_held_session(
    database: Database, database_url: str
) -> None:
    """It is independent of that one. SQLite has one writer, which would wait for itself: there
    an error says so at once."""

    async def endpoint(
        websocket: WebSocket, session: AsyncSession = Depends(get_async_db_session)
    ) -> None:
        await websocket.accept()
        async for text in websocket.iter_text():
            if text == "held":
                await put(session, text)
            else:
                try:
                    async with session_scope():
                        await write(text)
                except WouldDeadlockError:
                    text = "would deadlock"
            await websocket.send_text(text)

    with serving(database, app_of(database, endpoint)) as served:
        async with client_of(served) as client:
            assert await ask(client, "a") == "a"
            assert notes(database_url) == ["a"]
            assert await ask(client, "held") == "held"
            if database.is_sqlite:
                assert await ask(client, "b") == "would deadlock"
            else:
                assert await ask(client, "b") == "b"
                assert notes(database_url) == ["a", "b"]
        await until(lambda: served.in_use == 0)
        served.assert_nothing_open()
        assert "held" in notes(database_url)


async def test_joining_form_beside_a_held_session(database: Database, database_url: str) -> None:
    """`async with get_async_db_session()` is a part of the unit of work around it, which here is
    that of the connection: another reason not to let FastAPI hold one."""

    async def endpoint(
        websocket: WebSocket, session: AsyncSession = Depends(get_async_db_session)
    ) -> None:
        await websocket.accept()
        async for text in websocket.iter_text():
            async with get_async_db_session() as inner:
                assert inner is session
                await write(text)
            await websocket.send_text(text)

    with serving(database, app_of(database, endpoint)) as served:
        async with client_of(served) as client:
            assert await ask(client, "a") == "a"
            assert notes(database_url) == []
        await until(lambda: notes(database_url) == ["a"])


async def test_start_and_jobs_are_not_warned_of(
    database: Database, database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The lifespan, what it starts, and a framework's own use of the generator there, are no
    connections."""
    hold = asynccontextmanager(get_async_db_session)

    async def job() -> None:
        async for _ in get_async_db_session():
            await write("job")

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with get_async_db_session():
            await write("start")
        async with hold():
            await write("held")
        await asyncio.create_task(job())
        yield

    app = FastAPI(lifespan=lifespan)
    app.add_middleware(DatabaseSessionMiddleware, database)
    with serving(database, app):
        assert notes(database_url) == ["start", "held", "job"]
    assert [record for record in caplog.records if record.name == "repom"] == []


# --- answers that are no WebSocket


async def test_denied(database: Database, database_url: str) -> None:
    """A refused handshake is no request that the middleware commits for: what its block has
    committed is there when the client hears of it, what a dependency holds is rolled back."""

    async def endpoint(
        websocket: WebSocket, held: bool = False, session: Any = Depends(get_async_db_session)
    ) -> None:
        if held:
            await put(session, "held")
            raise HTTPException(401, "nobody")
        async with session_scope():
            await write("attempt")
        await websocket.send_denial_response(JSONResponse({"detail": "no"}, 403))

    with serving(database, app_of(database, endpoint)) as served:
        for query, status in {"/": 403, "/?held=1": 401}.items():
            with pytest.raises(InvalidStatus) as denied:
                async with client_of(served, query):
                    pass
            assert denied.value.response.status_code == status
            assert notes(database_url) == ["attempt"]
            await until(lambda: served.in_use == 0)
            served.assert_nothing_open()


# --- applications inside applications


def own_middleware(database: Database, app: FastAPI) -> ASGIApp:
    """A mounted application that is one by itself, with layers above, between and below."""
    outer = FastAPI()
    for each in (app, outer):
        each.add_middleware(BaseHTTPMiddleware, dispatch=not_called)
        each.add_middleware(DatabaseSessionMiddleware, database)
        each.add_middleware(BaseHTTPMiddleware, dispatch=not_called)
    outer.mount("/inner", app)
    return outer


def of_the_mount(database: Database, app: FastAPI) -> ASGIApp:
    """Only the mounted application has the middleware."""
    outer = FastAPI()
    app.add_middleware(DatabaseSessionMiddleware, database)
    outer.mount("/inner", app)
    return outer


def of_the_outer(database: Database, app: FastAPI) -> ASGIApp:
    """Only the outer application has the middleware."""
    outer = FastAPI()
    outer.add_middleware(DatabaseSessionMiddleware, database)
    outer.mount("/inner", app)
    return outer


async def not_called(*_: Any) -> Any:
    raise AssertionError("this is no HTTP request")


@pytest.mark.parametrize(
    "shape", [own_middleware, of_the_mount, of_the_outer], ids=lambda shape: shape.__name__
)
async def test_mounted_application(
    database: Database,
    database_url: str,
    shape: Callable[[Database, FastAPI], ASGIApp],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The same errors, the same unit of work for a message, the same warning, once."""
    app = FastAPI()

    @app.websocket("/")
    async def endpoint(websocket: WebSocket) -> None:
        await websocket.accept()
        async for text in websocket.iter_text():
            with pytest.raises(NoScopeError, match="in a WebSocket connection"):
                current_session()
            async with session_scope():
                await write(text)
            await websocket.send_text(text)

    @app.websocket("/held")
    async def held(
        websocket: WebSocket, session: AsyncSession = Depends(get_async_db_session)
    ) -> None:
        await websocket.accept()
        await websocket.receive_text()
        await websocket.send_text("answered")

    with serving(database, shape(database, app)) as served:
        async with client_of(served, "/inner/") as client:
            for text in ("a", "b"):
                assert await ask(client, text) == text
                assert notes(database_url)[-1] == text
                served.assert_nothing_open()
        assert caplog.messages == []
        for _ in range(2):
            async with client_of(served, "/inner/held") as client:
                assert await ask(client, "held") == "answered"
    assert [record.name for record in caplog.records] == ["repom"]


# --- a server that stops


@pytest.mark.parametrize(
    ("at", "rows"), [("waiting", []), ("ends in time", ["a", "b"]), ("hangs", [])]
)
def test_server_that_stops(database: Database, database_url: str, at: str, rows: list[str]) -> None:
    """Clients that are open are told so; a block that ends in time is committed, one that does
    not is cancelled and rolled back. No connection is left."""
    left: list[str] = []

    async def endpoint(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.send_text("welcome")
        try:
            if at != "waiting":
                async with session_scope():
                    await write("a")
                    await websocket.send_text("written")
                    with contextlib.suppress(WebSocketDisconnect):
                        await websocket.receive_text()
                    if at == "hangs":
                        await asyncio.Event().wait()
                    await write("b")
            await websocket.receive_text()
        except BaseException as error:
            left.append(type(error).__name__)
            raise

    with contextlib.ExitStack() as stack:
        patience = {"timeout_graceful_shutdown": 0.2} if at == "hangs" else {}
        with serving(database, app_of(database, endpoint), **patience) as served:
            client = stack.enter_context(connect_blocking(uri_of(served), proxy=None))
            assert client.recv(PATIENCE) == "welcome"
            if at != "waiting":
                assert client.recv(PATIENCE) == "written"
        with pytest.raises(ConnectionClosed) as closed:
            client.recv(PATIENCE)
    assert closed.value.rcvd is not None
    assert closed.value.rcvd.code == 1012
    assert (
        left
        == {
            "waiting": ["WebSocketDisconnect"],
            "ends in time": ["WebSocketDisconnected"],
            "hangs": ["CancelledError"],
        }[at]
    )
    assert notes(database_url) == rows
