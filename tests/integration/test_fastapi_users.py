"""FastAPI Users on repom's dependency, written as its own documentation has it."""

import importlib.metadata
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from fastapi import Depends, FastAPI
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Mapped, mapped_column

from repom import Database, current_scope
from repom.async_session import get_async_db_session
from repom.config import reset_config
from repom.middleware import DatabaseSessionMiddleware
from repom.models import Base
from repom.registry import forget_configured, get_database
from tests.support.reader import execute, rows

pytest.importorskip("fastapi_users", reason="not installed: it needs SQLAlchemy < 2.1")
if int(importlib.metadata.version("fastapi-users-db-sqlalchemy").split(".")[0]) < 7:
    pytest.skip(
        "fastapi-users-db-sqlalchemy is too old for this FastAPI Users", allow_module_level=True
    )

from fastapi_users import BaseUserManager, FastAPIUsers, IntegerIDMixin, schemas
from fastapi_users.authentication import AuthenticationBackend, BearerTransport, JWTStrategy
from fastapi_users.db import SQLAlchemyBaseUserTable, SQLAlchemyUserDatabase

SECRET = "a secret of the tests, at least 32 bytes long"
ALICE = {"email": "alice@example.com", "password": "correct horse"}


class User(SQLAlchemyBaseUserTable[int], Base):
    id: Mapped[int] = mapped_column(primary_key=True)  # pyright: ignore[reportIncompatibleVariableOverride] - theirs


class UserRead(schemas.BaseUser[int]):
    pass


class UserCreate(schemas.BaseUserCreate):
    pass


class UserUpdate(schemas.BaseUserUpdate):
    pass


#: The last token that was sent to an address.
mail: dict[str, str] = {}


class Welcome(Exception):  # noqa: N818
    """What goes wrong after FastAPI Users has created its user."""


class UserManager(IntegerIDMixin, BaseUserManager[User, int]):
    reset_password_token_secret = SECRET
    verification_token_secret = SECRET

    async def on_after_register(self, user: User, request: Any = None) -> None:
        if user.email.startswith("unwelcome"):
            raise Welcome

    # What an application sends by e-mail, the tests read from here.
    async def on_after_request_verify(self, user: User, token: str, request: Any = None) -> None:
        mail[user.email] = token

    async def on_after_forgot_password(self, user: User, token: str, request: Any = None) -> None:
        mail[user.email] = token


async def get_user_db(
    session: AsyncSession = Depends(get_async_db_session),
) -> AsyncIterator[SQLAlchemyUserDatabase[User, int]]:
    yield SQLAlchemyUserDatabase(session, User)


async def get_user_manager(
    user_db: SQLAlchemyUserDatabase[User, int] = Depends(get_user_db),
) -> AsyncIterator[UserManager]:
    yield UserManager(user_db)


def get_jwt_strategy() -> JWTStrategy[User, int]:
    return JWTStrategy(secret=SECRET, lifetime_seconds=3600)


auth_backend = AuthenticationBackend(
    name="jwt",
    transport=BearerTransport(tokenUrl="auth/jwt/login"),
    get_strategy=get_jwt_strategy,
)
fastapi_users = FastAPIUsers[User, int](get_user_manager, [auth_backend])


def make_app() -> FastAPI:
    """The application of FastAPI Users' documentation, without any middleware."""
    app = FastAPI()
    app.include_router(
        fastapi_users.get_auth_router(auth_backend), prefix="/auth/jwt", tags=["auth"]
    )
    app.include_router(
        fastapi_users.get_register_router(UserRead, UserCreate), prefix="/auth", tags=["auth"]
    )
    app.include_router(fastapi_users.get_reset_password_router(), prefix="/auth", tags=["auth"])
    app.include_router(fastapi_users.get_verify_router(UserRead), prefix="/auth", tags=["auth"])
    app.include_router(
        fastapi_users.get_users_router(UserRead, UserUpdate), prefix="/users", tags=["users"]
    )
    current_user = fastapi_users.current_user(active=True)

    @app.get("/me")
    async def me(user: User = Depends(current_user)) -> dict[str, Any]:
        return {"email": user.email}

    return app


def client_of(app: FastAPI) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://test")


@pytest.fixture(params=["middleware", "dependency only"])
async def app(
    request: pytest.FixtureRequest, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[FastAPI]:
    """The application, with the middleware and without, on an empty database."""
    monkeypatch.setenv("REPOM_DATABASE_URL", database_url)
    reset_config()
    forget_configured()
    database = get_database()
    await database.create_all(Base.metadata)
    app = make_app()
    if request.param == "middleware":
        app.add_middleware(DatabaseSessionMiddleware)
    yield app
    await database.dispose()
    forget_configured()
    reset_config()


async def log_in(client: httpx.AsyncClient, email: str, password: str) -> httpx.Response:
    answer = await client.post("/auth/jwt/login", data={"username": email, "password": password})
    if answer.is_success:
        client.headers["Authorization"] = f"Bearer {answer.json()['access_token']}"
    return answer


async def test_the_whole_flow(app: FastAPI, database_url: str) -> None:
    """Register, log in, me, update, verify, forgotten password, delete: every answer of FastAPI
    Users' own routers is what the database holds when it arrives."""

    def stored() -> list[tuple[str, bool]]:
        found = rows(database_url, f"SELECT email, is_verified FROM {table(database_url)}")
        return [(email, bool(is_verified)) for email, is_verified in found]

    async with client_of(app) as client:
        registered = await client.post("/auth/register", json=ALICE)
        assert registered.status_code == 201, registered.text
        assert stored() == [("alice@example.com", False)]
        assert (await client.post("/auth/register", json=ALICE)).status_code == 400

        assert (await log_in(client, ALICE["email"], "wrong")).status_code == 400
        assert (await log_in(client, **ALICE)).status_code == 200
        assert (await client.get("/me")).json() == {"email": "alice@example.com"}

        changed = await client.patch("/users/me", json={"email": "alice@example.org"})
        assert changed.status_code == 200, changed.text
        assert stored() == [("alice@example.org", False)]

        address = {"email": "alice@example.org"}
        assert (await client.post("/auth/request-verify-token", json=address)).status_code == 202
        token = {"token": mail.pop("alice@example.org")}
        assert (await client.post("/auth/verify", json=token)).status_code == 200
        assert stored() == [("alice@example.org", True)]

        assert (await client.post("/auth/forgot-password", json=address)).status_code == 202
        token = {"token": mail.pop("alice@example.org"), "password": "battery staple"}
        assert (await client.post("/auth/reset-password", json=token)).status_code == 200
        assert (await log_in(client, "alice@example.org", ALICE["password"])).status_code == 400
        assert (await log_in(client, "alice@example.org", "battery staple")).status_code == 200

        me = f"/users/{(await client.get('/users/me')).json()['id']}"
        assert (await client.delete(me)).status_code == 403
        execute(database_url, f"UPDATE {table(database_url)} SET is_superuser = true")
        assert (await client.delete(me)).status_code == 204
        assert stored() == []


async def test_a_request_that_fails_later_leaves_no_user(database_url: str) -> None:
    """The adapter commits in mid-request; deferred, that commit does not survive the failure."""
    database = Database(database_url)
    await database.create_all(Base.metadata)
    app = make_app()
    app.add_middleware(DatabaseSessionMiddleware, database=database)
    async with client_of(app) as client:
        answer = await client.post(
            "/auth/register", json=ALICE | {"email": "unwelcome@example.com"}
        )
    assert answer.status_code == 500
    assert count_users(database_url) == 0
    await database.dispose()


async def test_allowed_inner_commits_survive_a_later_failure(database_url: str) -> None:
    """With inner_commits="allow" the adapter's commit is one, as in FastAPI Users alone."""
    database = Database(database_url)
    await database.create_all(Base.metadata)
    app = make_app()
    app.add_middleware(DatabaseSessionMiddleware, database=database, inner_commits="allow")
    async with client_of(app) as client:
        answer = await client.post(
            "/auth/register", json=ALICE | {"email": "unwelcome@example.com"}
        )
    assert answer.status_code == 500
    assert count_users(database_url) == 1
    await database.dispose()


async def test_the_adapter_uses_the_session_of_the_request(database_url: str) -> None:
    """What the endpoint decides holds for FastAPI Users' work, too."""
    database = Database(database_url)
    await database.create_all(Base.metadata)
    app = FastAPI()
    app.add_middleware(DatabaseSessionMiddleware, database=database)

    @app.post("/dry-run")
    async def dry_run(manager: UserManager = Depends(get_user_manager)) -> dict[str, Any]:
        user = await manager.create(UserCreate(email="bob@example.com", password="battery staple"))
        current_scope().rollback_only()
        return {"id": user.id}

    async with client_of(app) as client:
        answer = await client.post("/dry-run")
    assert answer.status_code == 200
    assert answer.json()["id"] is not None
    assert count_users(database_url) == 0
    await database.dispose()


def count_users(url: str) -> int:
    return int(rows(url, f"SELECT count(*) FROM {table(url)}")[0][0])


def table(url: str) -> str:
    return "user" if "mysql" in url else '"user"'
