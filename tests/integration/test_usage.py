"""The forms in which people use repom, as the documentation shows them, on every database."""

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import APIRouter, Depends, FastAPI, HTTPException
from pydantic import BaseModel
from sqlalchemy import String, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Mapped, Session, mapped_column

from repom import atomic, current_session, on_commit, session_scope
from repom.async_session import convert_to_async_uri, get_async_db_session, get_async_session
from repom.config import get_config, reset_config
from repom.middleware import DatabaseSessionMiddleware
from repom.models import Base
from repom.registry import forget_configured, get_database
from repom.session import get_db_session, get_db_transaction, get_session
from tests.support.reader import rows


class Person(Base):
    __tablename__ = "usage_person"
    id: Mapped[int] = mapped_column(primary_key=True)
    email: Mapped[str] = mapped_column(String(100), unique=True)


class Article(Base):
    __tablename__ = "usage_article"
    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str] = mapped_column(String(100))
    published: Mapped[bool] = mapped_column(default=False)


TABLES = [Person.__table__, Article.__table__]


@pytest.fixture
def url(database_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The configured default database, with the tables and nothing in them."""
    monkeypatch.setenv("REPOM_DATABASE_URL", database_url)
    reset_config()
    forget_configured()
    engine = get_database().engine
    Base.metadata.create_all(engine, tables=TABLES)  # type: ignore[arg-type]
    yield database_url
    get_database().dispose_sync()
    forget_configured()
    reset_config()


def emails(url: str) -> list[str]:
    return [email for (email,) in rows(url, "SELECT email FROM usage_person ORDER BY email")]


# --- by hand


def test_manual_session(url: str) -> None:
    """`await get_async_session()` is ready to execute, and the caller's to commit and close."""

    async def by_hand() -> Person | None:
        session = await get_async_session()
        try:
            session.add(Person(id=1, email="a@example.com"))
            await session.commit()
            query = select(Person).where(Person.id == 1)
            return (await session.execute(query)).scalar_one_or_none()
        finally:
            await session.close()

    person = asyncio.run(by_hand())
    assert person is not None
    assert person.to_dict() == {"id": 1, "email": "a@example.com"}


def test_manual_sync_session(url: str) -> None:
    """`get_session()` is the sync twin."""
    with get_session() as session:
        session.add(Person(email="a@example.com"))
        session.commit()
    assert emails(url) == ["a@example.com"]


# --- the library ends the transaction


async def create_user(email: str) -> Person:
    async for session in get_async_db_session():
        user = Person(email=email)
        session.add(user)
        return user
    raise AssertionError("the loop has one turn")


async def create_user_2(email: str) -> None:
    async with get_async_db_session() as session:
        session.add(Person(email=email))


def test_return_from_the_loop_commits_however_often_asyncio_runs(url: str) -> None:
    """`asyncio.run(create_user())`, many times in one process: every row is there."""
    wanted = [f"{number}@example.com" for number in range(5)]
    for email in wanted:
        asyncio.run(create_user(email))
    assert emails(url) == wanted


def test_async_with_commits_and_rolls_back(url: str) -> None:
    """Left normally it commits, left by an exception it leaves nothing."""

    async def fail(email: str) -> None:
        async with get_async_db_session() as session:
            session.add(Person(email=email))
            await session.flush()
            raise LookupError

    asyncio.run(create_user_2("a@example.com"))
    with pytest.raises(LookupError):
        asyncio.run(fail("b@example.com"))
    assert emails(url) == ["a@example.com"]


@pytest.mark.parametrize("get", [get_db_session, get_db_transaction], ids=lambda f: f.__name__)
def test_sync_forms(url: str, get: Any) -> None:
    """`for` with return and `with` commit; an exception leaves nothing."""

    def by_for() -> None:
        for session in get():
            session.add(Person(email="for@example.com"))
            return

    def fails() -> None:
        for session in get():
            session.add(Person(email="fails@example.com"))
            raise LookupError

    by_for()
    with get() as session:
        session.add(Person(email="with@example.com"))
    with pytest.raises(LookupError):
        fails()
    assert emails(url) == ["for@example.com", "with@example.com"]


# --- FastAPI


class ArticleCreate(BaseModel):
    title: str


class ArticleResponse(BaseModel):
    id: int
    title: str
    published: bool


router = APIRouter()
sent: list[tuple[str, int]] = []


@router.get("/articles/{article_id}", response_model=ArticleResponse)
async def get_article(
    article_id: int, session: AsyncSession = Depends(get_async_db_session)
) -> dict[str, Any]:
    query = select(Article).where(Article.id == article_id)
    article = (await session.execute(query)).scalar_one_or_none()
    if not article:
        raise HTTPException(404, "Article not found")
    return article.to_dict()


@router.post("/articles", response_model=ArticleResponse)
async def create_article(
    data: ArticleCreate, session: AsyncSession = Depends(get_async_db_session)
) -> dict[str, Any]:
    article = Article(**data.model_dump())
    session.add(article)
    await session.flush()
    return article.to_dict()


@router.post("/articles/{article_id}/publish", response_model=ArticleResponse)
async def publish_article(article_id: int) -> dict[str, Any]:
    return (await publish(article_id)).to_dict()


@router.post("/sync-articles", response_model=ArticleResponse)
def create_article_in_a_thread(
    data: ArticleCreate, session: Session = Depends(get_db_session)
) -> dict[str, Any]:
    article = Article(**data.model_dump())
    session.add(article)
    session.flush()
    return article.to_dict()


async def publish(article_id: int) -> Article:
    article = await current_session().get_one(Article, article_id)
    article.published = True
    on_commit(lambda: sent.append(("published", article_id)))
    return article


@pytest.fixture(params=["middleware", "dependency only"])
async def client(url: str, request: pytest.FixtureRequest) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the FastAPI application, with the middleware and without."""
    app = FastAPI()
    app.include_router(router)
    if request.param == "middleware":
        app.add_middleware(DatabaseSessionMiddleware)
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client
    await get_database().dispose()


async def test_fastapi_dependency(client: httpx.AsyncClient, url: str) -> None:
    """`Depends(get_async_db_session)` gives a session whose work is committed on success."""
    created = await client.post("/articles", json={"title": "Hello"})
    assert created.json() == {"id": 1, "title": "Hello", "published": False}
    assert rows(url, "SELECT title FROM usage_article") == [("Hello",)]
    assert (await client.get("/articles/1")).json()["title"] == "Hello"
    assert (await client.get("/articles/2")).status_code == 404


async def test_fastapi_dependency_of_def_endpoints(client: httpx.AsyncClient, url: str) -> None:
    """`Depends(get_db_session)` does the same in the thread pool."""
    created = await client.post("/sync-articles", json={"title": "Thread"})
    assert created.json()["title"] == "Thread"
    assert rows(url, "SELECT title FROM usage_article") == [("Thread",)]


@pytest.mark.parametrize("client", ["middleware"], indirect=True)
async def test_current_session_without_any_parameter(client: httpx.AsyncClient, url: str) -> None:
    """Code called by an endpoint finds the session, and its callback runs after the commit."""
    sent.clear()
    await client.post("/articles", json={"title": "Hello"})
    answer = await client.post("/articles/1/publish")
    assert answer.json()["published"] is True
    assert [bool(p) for (p,) in rows(url, "SELECT published FROM usage_article")] == [True]
    assert sent == [("published", 1)]


# --- background jobs, scripts, workers


async def recompute_totals() -> None:
    current_session().add(Person(email=f"{len(await all_people())}@example.com"))


async def all_people() -> list[Person]:
    return list((await current_session().scalars(select(Person))).all())


async def nightly() -> None:
    async with session_scope():
        await recompute_totals()


@atomic()
async def transfer(email: str, fail: bool) -> str:
    current_session().add(Person(email=email))
    await current_session().flush()
    if fail:
        raise LookupError(email)
    return email


def test_jobs_run_twice_in_one_process(url: str) -> None:
    """Two `asyncio.run()` use one configured database without meeting each other's loop."""
    asyncio.run(nightly())
    asyncio.run(nightly())
    assert emails(url) == ["0@example.com", "1@example.com"]


def test_atomic_is_a_unit_of_work_or_a_savepoint(url: str) -> None:
    """Alone it commits; inside a scope a failure undoes only its own part."""

    async def work() -> str:
        name = await transfer("alone@example.com", fail=False)
        async with session_scope():
            await transfer("kept@example.com", fail=False)
            with pytest.raises(LookupError):
                await transfer("undone@example.com", fail=True)
        return name

    assert asyncio.run(work()) == "alone@example.com"
    assert emails(url) == ["alone@example.com", "kept@example.com"]


# --- configuration and URLs

SETTINGS = """
from repom import RepomConfig

class MyConfig(RepomConfig):
    @property
    def engine_kwargs(self) -> dict:
        kwargs = super().engine_kwargs
        kwargs["pool_size"] = 20
        return kwargs

def get_repom_config():
    return MyConfig()
"""


def test_config_hook_in_dotenv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`CONFIG_HOOK` in `.env` names the application's own configuration."""
    (tmp_path / "settings_of_the_app.py").write_text(SETTINGS)
    (tmp_path / ".env").write_text("CONFIG_HOOK=settings_of_the_app:get_repom_config\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    reset_config()
    assert get_config().engine_kwargs["pool_size"] == 20
    reset_config()


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("sqlite:///data/db.sqlite3", "sqlite+aiosqlite:///data/db.sqlite3"),
        ("postgresql://user:pass@localhost/db", "postgresql+asyncpg://user:pass@localhost/db"),
        ("mysql://user:pass@localhost/db", "mysql+aiomysql://user:pass@localhost/db"),
    ],
)
def test_urls(given: str, wanted: str) -> None:
    """The conversions that the documentation shows."""
    assert convert_to_async_uri(given) == wanted


# --- tests of an application

CONFTEST = """
from repom.testing import create_async_test_fixtures, create_test_fixtures
import models

async_db_engine, async_db_test = create_async_test_fixtures()
db_engine, db_test = create_test_fixtures()
"""
MODELS = """
from sqlalchemy import String
from sqlalchemy.orm import Mapped, mapped_column
from repom.models import Base

class User(Base):
    __tablename__ = "usage_user"
    id: Mapped[int] = mapped_column(primary_key=True)
    email: Mapped[str] = mapped_column(String(100))
"""
TESTS = """
import pytest
from sqlalchemy import select
from models import User

@pytest.mark.asyncio
async def test_create_user(async_db_test):
    async_db_test.add(User(email="a@example.com"))
    await async_db_test.flush()
    query = select(User).where(User.email == "a@example.com")
    found = (await async_db_test.execute(query)).scalar_one()
    assert found.email == "a@example.com"
    await async_db_test.commit()

@pytest.mark.asyncio
async def test_isolated(async_db_test):
    assert (await async_db_test.execute(select(User))).scalars().all() == []

def test_sync(db_test):
    db_test.add(User(email="a@example.com"))
    db_test.commit()
    assert len(db_test.scalars(select(User)).all()) == 1

def test_sync_isolated(db_test):
    assert db_test.scalars(select(User)).all() == []
"""


@pytest.mark.parametrize("mode", ["auto", "strict"])
def test_test_fixtures(tmp_path: Path, database_url: str, mode: str) -> None:
    """Every test is rolled back, even one that commits, in either mode of pytest-asyncio."""
    for name, text in {"conftest": CONFTEST, "models": MODELS, "test_it": TESTS}.items():
        (tmp_path / f"{name}.py").write_text(text)
    result = subprocess.run(
        [sys.executable, "-W", "error", "-m", "pytest", "-q", "-p", "no:cacheprovider",
         "-o", f"asyncio_mode={mode}", "-o", "asyncio_default_fixture_loop_scope=function"],
        cwd=tmp_path,
        env={"PATH": "", "REPOM_DATABASE_URL": database_url},
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert "4 passed" in result.stdout, result.stdout + result.stderr
    assert rows(database_url, "SELECT * FROM usage_user") == []


def test_test_fixtures_on_a_memory_database(tmp_path: Path) -> None:
    """`sqlite://` lives as long as the run, so the schema is there in every test."""
    conftest = CONFTEST.replace("fixtures()", 'fixtures("sqlite://")')
    for name, text in {"conftest": conftest, "models": MODELS, "test_it": TESTS}.items():
        (tmp_path / f"{name}.py").write_text(text)
    result = subprocess.run(
        [sys.executable, "-W", "error", "-m", "pytest", "-q", "-p", "no:cacheprovider",
         "-o", "asyncio_default_fixture_loop_scope=function"],
        cwd=tmp_path,
        env={"PATH": ""},
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert "4 passed" in result.stdout, result.stdout + result.stderr
