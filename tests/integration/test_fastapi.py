"""FastAPI with the middleware and without it: dependencies, endpoints in threads, errors."""

import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Annotated, Any

import pytest
from fastapi import BackgroundTasks, Depends, FastAPI, HTTPException, Request, WebSocket
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from sqlalchemy import Integer, String, insert, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from repom import Database, current_scope, current_session, current_sync_session, session_scope
from repom.async_session import get_async_db_session
from repom.errors import MixedSessionsError, ScopeClosedError
from repom.middleware import DatabaseSessionMiddleware
from repom.session import get_db_session, get_db_transaction
from tests.middleware.notes import (
    NOTE,
    NOWHERE,
    configured_notes_database,
    connections_in_use,
    notes,
    notes_database,
    write,
    write_sync,
)
from tests.support.asgi import Message, Response, request, websocket


class Base(DeclarativeBase):
    pass


class Note(Base):
    __tablename__ = "note"
    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    text: Mapped[str] = mapped_column(String(100))
    parent: Mapped[int | None] = mapped_column(Integer)


class NoteIn(BaseModel):
    text: str


class NoteOut(BaseModel):
    id: int
    text: str


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    """An empty table of notes, on each kind of database."""
    async with notes_database(database_url) as database:
        yield database


@pytest.fixture
async def configured(database_url: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Database]:
    """The same, as the database that is configured."""
    async with configured_notes_database(database_url, monkeypatch) as database:
        yield database


@pytest.fixture(params=["sqlite", "postgresql"])
def deferring_url(request: pytest.FixtureRequest) -> str:
    """The URL of a database that finds a wrong parent of a note at COMMIT."""
    name = {"sqlite": "sqlite_url", "postgresql": "postgres_url"}[request.param]
    url: str = request.getfixturevalue(name)
    return url


@pytest.fixture
async def deferring(deferring_url: str) -> AsyncIterator[Database]:
    """An empty table of notes, where COMMIT refuses one with the parent `NOWHERE`."""
    async with notes_database(deferring_url) as database:
        yield database


def managed(database: Database, **options: Any) -> FastAPI:
    """An app with the middleware, which answers 409 for an `IntegrityError`."""
    app = FastAPI(exception_handlers={IntegrityError: conflict}, **options)
    app.add_middleware(DatabaseSessionMiddleware, database)
    return app


async def conflict(request: Request, error: Exception) -> JSONResponse:
    return JSONResponse({"detail": "conflict"}, 409)


class Seen:
    """A response, and the notes that were committed when it started."""

    def __init__(self, response: Response, at_start: list[str]) -> None:
        self.response = response
        self.at_start = at_start


async def post(app: FastAPI, url: str, path: str = "/", text: str = "a") -> Seen:
    """Send a note; what the client got, and what a second connection saw at the start."""
    at_start: list[list[str]] = []

    def look(message: Message) -> None:
        if message["type"] == "http.response.start":
            at_start.append(notes(url))

    body = NoteIn(text=text).model_dump_json().encode()
    headers = {"content-type": "application/json"}
    response = await request(app, "POST", path, headers=headers, body=body, on_message=look)
    return Seen(response, at_start[0])


# --- the dependency, in its forms

# With the middleware the scope of the dependency does not matter. Without it FastAPI ends the
# dependency after the response, unless told otherwise.
FORMS: dict[str, tuple[bool, Any, bool]] = {
    "middleware": (True, Depends(get_async_db_session), True),
    "middleware, function scope": (True, Depends(get_async_db_session, scope="function"), True),
    "function scope": (False, Depends(get_async_db_session, scope="function"), True),
    "default scope": (False, Depends(get_async_db_session), False),
}


@pytest.mark.parametrize("form", FORMS)
async def test_dependency(configured: Database, database_url: str, form: str) -> None:
    """A note is there when its response starts, or at the latest afterwards where FastAPI ends
    the dependency then; of an HTTPException and of any other error nothing is left."""
    with_middleware, depends, before = FORMS[form]
    app = FastAPI()
    if with_middleware:
        app.add_middleware(DatabaseSessionMiddleware)

    @app.post("/notes", status_code=201, response_model=NoteOut)
    async def create(note: NoteIn, session: AsyncSession = depends) -> Note:
        created = Note(text=note.text)
        session.add(created)
        await session.flush()
        return created

    @app.post("/missing")
    async def missing(note: NoteIn, session: AsyncSession = depends) -> None:
        session.add(Note(text=note.text))
        await session.flush()
        raise HTTPException(404, "Note not found")

    @app.post("/crash")
    async def crash(note: NoteIn, session: AsyncSession = depends) -> None:
        session.add(Note(text=note.text))
        await session.flush()
        raise LookupError

    seen = await post(app, database_url, "/missing")
    assert (seen.response.status, seen.response.json()) == (404, {"detail": "Note not found"})
    seen = await post(app, database_url, "/crash")
    assert seen.response.status == 500
    assert notes(database_url) == []
    seen = await post(app, database_url, "/notes")
    assert (seen.response.status, seen.response.json()["text"]) == (201, "a")
    assert seen.at_start == (["a"] if before else [])
    assert notes(database_url) == ["a"]
    assert connections_in_use(configured) == 0


@pytest.mark.parametrize("form", ["middleware", "function scope"])
async def test_commit_of_a_dependency_that_fails(
    deferring_url: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The app's handler answers for it, with the middleware and without."""
    with_middleware, depends, _ = FORMS[form]
    app = FastAPI(exception_handlers={IntegrityError: conflict})
    if with_middleware:
        app.add_middleware(DatabaseSessionMiddleware)

    @app.post("/", status_code=201)
    async def create(note: NoteIn, session: AsyncSession = depends) -> None:
        await session.execute(insert(NOTE).values(text=note.text, parent=NOWHERE))

    async with configured_notes_database(deferring_url, monkeypatch) as database:
        seen = await post(app, deferring_url)
        assert (seen.response.status, seen.response.json()) == (409, {"detail": "conflict"})
        assert notes(deferring_url) == []
        assert connections_in_use(database) == 0


@pytest.mark.parametrize("form", FORMS)
async def test_dependencies_share_the_session(configured: Database, form: str) -> None:
    """A dependency of a dependency, the endpoint, and `current_session()` at any depth have one
    session, with the middleware and without."""
    with_middleware, depends, _ = FORMS[form]
    app = FastAPI()
    if with_middleware:
        app.add_middleware(DatabaseSessionMiddleware)
    sessions: list[AsyncSession] = []

    class Repository:
        def __init__(self, session: Annotated[AsyncSession, depends]) -> None:
            sessions.append(session)

    async def service(session: Annotated[AsyncSession, depends]) -> AsyncSession:
        return session

    async def deep() -> None:
        sessions.append(current_session())

    @app.get("/")
    async def endpoint(
        repository: Annotated[Repository, Depends()],
        of_service: Annotated[AsyncSession, Depends(service)],
        own: Annotated[AsyncSession, depends],
    ) -> None:
        sessions.extend((of_service, own))
        await deep()

    response = await request(app)
    assert (response.status, response.exception) == (200, None)
    assert len(sessions) == 4
    assert len(set(sessions)) == 1


@pytest.mark.parametrize("kind", ["dependency", "transaction", "current"])
async def test_endpoints_in_threads(database: Database, database_url: str, kind: str) -> None:
    """A `def` endpoint uses the request's sync session; its transaction has ended, and its
    connection is back, when the response starts."""
    app = managed(database)
    session_of: dict[str, Callable[..., Any]] = {
        "dependency": get_db_session,
        "transaction": get_db_transaction,
        "current": current_sync_session,
    }

    if kind == "current":

        @app.post("/")
        def current(note: NoteIn) -> None:
            write_sync(note.text)
            if note.text == "bad":
                raise HTTPException(422)
    else:

        @app.post("/")
        def depending(note: NoteIn, session: Session = Depends(session_of[kind])) -> None:
            assert session is current_sync_session()
            session.add(Note(text=note.text))
            session.flush()
            if note.text == "bad":
                raise HTTPException(422)

    seen = await post(app, database_url, text="bad")
    assert (seen.response.status, seen.at_start) == (422, [])
    seen = await post(app, database_url, text="good")
    assert (seen.response.status, seen.at_start) == (200, ["good"])
    assert database.engine.pool.checkedout() == 0  # type: ignore[attr-defined]


async def test_commit_that_fails_in_a_thread(deferring: Database, deferring_url: str) -> None:
    """A `def` endpoint whose COMMIT fails is answered by the handler."""
    app = managed(deferring)

    @app.post("/")
    def create(note: NoteIn) -> None:
        write_sync(note.text, parent=NOWHERE)

    seen = await post(app, deferring_url)
    assert seen.response.status == 409
    assert notes(deferring_url) == []
    assert deferring.engine.pool.checkedout() == 0  # type: ignore[attr-defined]


async def test_sync_and_async_session_in_one_request(database: Database, database_url: str) -> None:
    """Two connections cannot share one transaction: an error says so, and nothing is left."""
    app = managed(database)

    def sync_dependency(session: Session = Depends(get_db_session)) -> None:
        session.add(Note(text="sync"))
        session.flush()

    @app.post("/", dependencies=[Depends(sync_dependency)])
    async def mixed() -> None:
        await write("async")

    seen = await post(app, database_url)
    assert seen.response.status == 500
    assert isinstance(seen.response.exception, MixedSessionsError)
    assert notes(database_url) == []
    assert database.engine.pool.checkedout() == 0  # type: ignore[attr-defined]


# --- what else decides


async def test_response_that_does_not_fit_its_model(database: Database, database_url: str) -> None:
    """FastAPI finds it out after the endpoint has returned: a 500, and nothing is committed."""
    app = managed(database)

    @app.post("/", response_model=NoteOut)
    async def create(note: NoteIn) -> dict[str, str]:
        await write(note.text)
        return {"unlike": "a note"}

    seen = await post(app, database_url)
    assert seen.response.status == 500
    assert notes(database_url) == []


async def test_request_that_does_not_fit_its_model(database: Database, database_url: str) -> None:
    """A dependency may have written before the body was found wrong: the 422 rolls back."""
    app = managed(database)

    async def audit() -> None:
        await write("audit")

    @app.post("/{number}", dependencies=[Depends(audit)])
    async def create(number: int) -> None:
        raise AssertionError("not called")

    seen = await post(app, database_url, "/one")
    assert seen.response.status == 422
    assert notes(database_url) == []


async def test_error_at_flush(database: Database, database_url: str) -> None:
    """What the database refuses at once is answered by the handler, too, and rolled back."""
    app = managed(database)

    @app.post("/")
    async def create(note: NoteIn) -> None:
        await write("before")
        await write(note.text)
        await write(note.text)

    seen = await post(app, database_url)
    assert seen.response.status == 409
    assert notes(database_url) == []


async def test_dependency_that_fails_after_its_yield(database: Database, database_url: str) -> None:
    """At function scope it ends before the response: its error is one of the request."""
    app = managed(database)

    async def strict() -> AsyncIterator[None]:
        yield
        await write("of the dependency")
        raise HTTPException(409)

    @app.post("/", dependencies=[Depends(strict, scope="function")])
    async def create(note: NoteIn) -> None:
        await write(note.text)

    seen = await post(app, database_url)
    assert seen.response.status == 409
    assert notes(database_url) == []


@pytest.mark.parametrize("where", ["background task", "dependency"])
async def test_work_after_the_response(database: Database, database_url: str, where: str) -> None:
    """A background task, and a dependency of the default scope after its `yield`, work in a
    transaction of their own, which is committed when the app returns."""
    app = managed(database)

    async def later() -> None:
        assert notes(database_url) == ["a"]
        await write("later")

    async def dependency() -> AsyncIterator[None]:
        yield
        if where == "dependency":
            await later()

    @app.post("/", dependencies=[Depends(dependency)])
    async def create(note: NoteIn, tasks: BackgroundTasks) -> None:
        await write(note.text)
        if where == "background task":
            tasks.add_task(later)

    seen = await post(app, database_url)
    assert (seen.response.status, seen.at_start) == (200, ["a"])
    assert notes(database_url) == ["a", "later"]
    assert connections_in_use(database) == 0


async def test_session_and_objects_after_the_request(database: Database, database_url: str) -> None:
    """Objects can still be read, the session cannot be used."""
    app = managed(database)
    kept: list[Any] = []

    @app.post("/")
    async def create(note: NoteIn, session: AsyncSession = Depends(get_async_db_session)) -> None:
        created = Note(text=note.text)
        session.add(created)
        kept.extend((session, created, current_scope()))

    await post(app, database_url)
    session, created, scope = kept
    assert (created.text, created.id is not None) == ("a", True)
    with pytest.raises(ScopeClosedError):
        await session.execute(select(NOTE.c.text))
    assert not scope.is_open


async def test_work_in_a_scope_of_its_own(database: Database, database_url: str) -> None:
    """`session_scope()` in an endpoint is independent: it stays when the request fails."""
    app = managed(database)

    @app.post("/")
    async def create(note: NoteIn) -> None:
        async with session_scope():
            await write("attempt")
        await write(note.text)
        raise HTTPException(404)

    seen = await post(app, database_url)
    assert (seen.response.status, seen.at_start) == (404, ["attempt"])
    assert notes(database_url) == ["attempt"]


async def test_dependency_on_a_websocket(database: Database, database_url: str) -> None:
    """It owns its session, of the middleware's database, for the whole connection."""
    app = managed(database)

    @app.websocket("/")
    async def endpoint(
        connection: WebSocket, session: AsyncSession = Depends(get_async_db_session)
    ) -> None:
        await connection.accept()
        await session.execute(insert(NOTE).values(text=await connection.receive_text()))
        await connection.send_text("written")
        with contextlib.suppress(Exception):
            await connection.receive_text()

    async with websocket(app) as connection:
        await connection.send("a")
        await connection.receive()
        assert notes(database_url) == []
    assert notes(database_url) == ["a"]
    assert connections_in_use(database) == 0
