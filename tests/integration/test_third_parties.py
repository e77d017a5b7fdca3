"""Libraries that write and commit through a session they are given."""

from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from advanced_alchemy.exceptions import IntegrityError
from advanced_alchemy.repository import SQLAlchemyAsyncRepository
from advanced_alchemy.service import SQLAlchemyAsyncRepositoryService
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse
from sqladmin import Admin, ModelView

from repom import Database, atomic, current_session
from repom.managed import InnerCommits
from repom.middleware import DatabaseSessionMiddleware
from tests.support.units import Note, UnitBase, texts


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    """A database with the tables of `tests.support.units`."""
    database = Database(database_url)
    await database.create_all(UnitBase.metadata)
    yield database
    await database.dispose()


def client_of(app: FastAPI) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://test")


# --- advanced-alchemy: repositories and services


class NoteService(SQLAlchemyAsyncRepositoryService[Note]):
    """As its documentation has it."""

    class Repository(SQLAlchemyAsyncRepository[Note]):
        model_type = Note

    repository_type = Repository


def app_with_services(database: Database, inner_commits: InnerCommits) -> FastAPI:
    async def conflict(request: Request, error: Exception) -> Response:
        return JSONResponse({"detail": "conflict"}, 409)

    app = FastAPI(exception_handlers={IntegrityError: conflict})
    app.add_middleware(DatabaseSessionMiddleware, database, inner_commits=inner_commits)

    @app.post("/notes/{text}", status_code=201)
    async def create(text: str, later: int = 201) -> None:
        service = NoteService(session=current_session())
        await service.create({"text": text}, auto_commit=True)
        if later != 201:
            raise HTTPException(later)

    @app.put("/notes/{text}")
    async def ensure(text: str) -> None:
        service = NoteService(session=current_session())
        try:
            async with atomic():
                await service.create({"text": text}, auto_commit=True)
        except IntegrityError:
            note = await service.get_one(text=text)
            note.remark = "again"
            await service.update(note, auto_commit=True)

    @app.get("/notes")
    async def listed() -> list[str]:
        notes, count = await NoteService(session=current_session()).get_many_and_count()
        assert len(notes) == count
        return [note.text for note in notes]

    return app


async def test_commit_by_a_repository_is_undone_by_what_fails_later(database: Database) -> None:
    """`auto_commit=True` of advanced-alchemy is deferred: the request decides."""
    async with client_of(app_with_services(database, "defer")) as client:
        assert (await client.post("/notes/a")).status_code == 201
        assert texts(database) == ["a"]
        assert (await client.post("/notes/b?later=404")).status_code == 404
        assert (await client.get("/notes")).json() == ["a"]
    assert texts(database) == ["a"]


async def test_allowed_commit_by_a_repository_survives_what_fails_later(
    database: Database,
) -> None:
    """With inner_commits="allow" it is a COMMIT, as in advanced-alchemy alone."""
    async with client_of(app_with_services(database, "allow")) as client:
        assert (await client.post("/notes/b?later=404")).status_code == 404
    assert texts(database) == ["b"]


async def test_error_of_a_repository(database: Database) -> None:
    """It reaches the app's handler for it, and inside atomic() leaves the transaction healthy."""
    async with client_of(app_with_services(database, "defer")) as client:
        assert (await client.put("/notes/a")).status_code == 200
        assert (await client.post("/notes/a")).status_code == 409
        assert (await client.put("/notes/a")).status_code == 200
        assert (await client.post("/notes/b")).status_code == 201
    assert texts(database) == ["a", "b"]


# --- SQLAdmin


class NoteAdmin(ModelView, model=Note):
    """As its documentation has it."""

    column_list = ("id", "text")
    form_columns = ("text", "remark")


async def test_admin_site(database: Database) -> None:
    """SQLAdmin takes `database.sessionmaker`, at import, and its pages list, create, change and
    delete."""
    app = FastAPI()
    app.add_middleware(DatabaseSessionMiddleware, database)
    admin = Admin(app, session_maker=database.sessionmaker)
    admin.add_view(NoteAdmin)
    async with client_of(app) as client:

        async def submit(path: str, text: str) -> int:
            data: dict[str, Any] = {"text": text, "remark": "", "save": "Save"}
            return (await client.post(f"/admin/note/{path}", data=data)).status_code

        assert await submit("create", "a") == 302
        assert texts(database) == ["a"]
        assert await submit("create", "a") == 400  # there is one already
        assert await submit("edit/1", "b") == 302
        assert texts(database) == ["b"]
        page = await client.get("/admin/note/list")
        assert page.status_code == 200
        assert ">b<" in page.text.replace("\n", "").replace(" ", "")
        assert (await client.delete("/admin/note/delete?pks=1")).status_code == 200
    assert texts(database) == []
