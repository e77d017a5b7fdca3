"""A database chosen for each request."""

import asyncio
import gc
import random
import weakref
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import pytest
from fastapi import BackgroundTasks, Depends, FastAPI, HTTPException, WebSocket
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession
from starlette.applications import Starlette

from repom import (
    Database,
    DatabaseCache,
    current_scope,
    current_session,
    current_sync_session,
    on_commit,
    session_scope,
    sync_session_scope,
)
from repom.async_session import get_async_db_session
from repom.config import reset_config
from repom.errors import ConfigurationError, UnknownDatabaseError
from repom.middleware import DatabaseSessionMiddleware
from repom.registry import forget_configured
from tests.middleware.notes import answer, responding
from tests.support.asgi import Receive, Response, Scope, Send, lifespan, request, websocket
from tests.support.polling import until
from tests.support.tenants import NAMES, connected, texts

WRITE = text("INSERT INTO note VALUES (:text)")
READ = text("SELECT DISTINCT text FROM note")


@pytest.fixture
async def tenants(tenant_urls: dict[str, str]) -> AsyncIterator[DatabaseCache]:
    """The databases of five tenants, two of which are kept open."""
    cache = DatabaseCache(tenant_urls.__getitem__, max_open=2)
    yield cache
    await cache.dispose()


@pytest.fixture
def sqlite_tenants(tmp_path: Path) -> Iterator[DatabaseCache]:
    """The same, where nothing depends on the kind."""
    cache = DatabaseCache(lambda name: f"sqlite:///{tmp_path / name}.sqlite3", max_open=2)
    for name in "ab":
        with sync_session_scope(cache[name]) as session:
            session.execute(text("CREATE TABLE note (text TEXT)"))
    yield cache
    cache.dispose_sync()


class Chooser:
    """Chooses by the header `x-tenant`, and counts how often."""

    def __init__(self, cache: DatabaseCache) -> None:
        self.cache = cache
        self.calls = 0

    def __call__(self, scope: Scope) -> Database:
        self.calls += 1
        tenant = dict(scope["headers"]).get(b"x-tenant", b"nobody").decode()
        if tenant not in NAMES:
            raise HTTPException(404, f"no tenant {tenant}")
        return self.cache[tenant]


async def write(text: str) -> None:
    await current_session().execute(WRITE, {"text": text})


async def ask(app: Any, tenant: str, path: str = "/", method: str = "POST") -> Response:
    return await request(app, method, path, headers=[("x-tenant", tenant)])


# --- the right database, always


async def test_many_requests_at_once(tenants: DatabaseCache, tenant_urls: dict[str, str]) -> None:
    """200 requests of five tenants, 20 at a time, async and sync, that succeed, fail, raise or are
    cancelled: each has the database of its tenant, and at the end two are open."""
    app = FastAPI()
    app.add_middleware(DatabaseSessionMiddleware, Chooser(tenants))
    gate = asyncio.Semaphore(20)

    @app.post("/{tenant}/{outcome}")
    async def work(tenant: str, outcome: str, tasks: BackgroundTasks) -> str:
        async def later() -> None:
            assert (await current_session().scalars(READ)).all() == [tenant]
            await write(tenant)

        await write(tenant)
        assert (await current_session().scalars(READ)).all() == [tenant]
        if outcome == "raise":
            raise LookupError
        if outcome == "fail":
            raise HTTPException(409)
        on_commit(later)
        tasks.add_task(later)
        return tenant

    @app.post("/sync/{tenant}/{outcome}")
    def work_sync(tenant: str, outcome: str) -> str:
        session = current_sync_session()
        session.execute(WRITE, {"text": tenant})
        assert session.scalars(READ).all() == [tenant]
        if outcome != "succeed":
            raise HTTPException(409)
        return tenant

    async def send_one(tenant: str, path: str) -> Response:
        async with gate:
            response = await ask(app, tenant, path)
        assert response.status in (200, 409, 500)
        return response

    chance = random.Random(11)
    choices = [
        (tenant, f"{chance.choice(['', '', '/sync'])}/{tenant}/{outcome}")
        for tenant, outcome in (
            (chance.choice(NAMES), chance.choice(["succeed", "succeed", "fail", "raise"]))
            for _ in range(200)
        )
    ]
    requests = [asyncio.create_task(send_one(*choice)) for choice in choices]
    for each in requests[::10]:
        asyncio.get_running_loop().call_later(chance.random() / 5, each.cancel)
    responses = await asyncio.gather(*requests, return_exceptions=True)
    errors = [each for each in responses if isinstance(each, Exception)]
    assert not errors, errors
    succeeded = [each for each in responses if isinstance(each, Response) and each.status == 200]
    assert len(succeeded) > 60
    for name, url in tenant_urls.items():
        assert set(texts(url)) == {name}
    written = sum(len(texts(url)) for url in tenant_urls.values())
    assert written >= len(succeeded)
    assert len(tenants.open) == 2


async def test_everything_of_a_request_has_its_database(sqlite_tenants: DatabaseCache) -> None:
    """Also what is begun after an early commit, in a callback, by `session_scope()` inside, after
    the body, and by a task that outlives the request: though it was chosen once."""
    choose = Chooser(sqlite_tenants)
    left: list[asyncio.Task[None]] = []
    over = asyncio.Event()
    app = FastAPI()
    app.add_middleware(DatabaseSessionMiddleware, choose)

    async def outlive() -> None:
        await over.wait()
        async with session_scope():
            await write("outlived")

    @app.post("/")
    async def endpoint(tasks: BackgroundTasks) -> None:
        await write("first")
        await current_scope().commit()
        async with session_scope():
            await write("inside")
        await write("second")
        on_commit(lambda: write("callback"))
        tasks.add_task(write, "background")
        left.append(asyncio.create_task(outlive()))

    response = await ask(app, "b")
    assert (response.status, response.exception) == (200, None)
    over.set()
    await left[0]
    assert choose.calls == 1
    async with session_scope(sqlite_tenants["b"]) as session:
        found = (await session.scalars(READ)).all()
    assert set(found) == {"first", "inside", "second", "callback", "background", "outlived"}
    async with session_scope(sqlite_tenants["a"]) as session:
        assert (await session.scalars(READ)).all() == []
    await sqlite_tenants.dispose()


async def test_a_request_that_is_served_again(sqlite_tenants: DatabaseCache) -> None:
    """After a lost conflict it is the same database's, and is not chosen anew."""
    choose = Chooser(sqlite_tenants)
    attempts: list[int] = []

    async def respond(send: Send) -> None:
        attempts.append(current_scope().attempt)
        await write(f"attempt {attempts[-1]}")
        if len(attempts) < 3:
            raise LookupError
        await answer(send)

    app = DatabaseSessionMiddleware(
        responding(respond),
        choose,
        retries=3,
        retry_on=lambda error: isinstance(error, LookupError),
    )
    response = await ask(app, "b")
    assert (response.status, attempts, choose.calls) == (200, [1, 2, 3], 1)
    async with session_scope(sqlite_tenants["b"]) as session:
        assert (await session.scalars(READ)).all() == ["attempt 3"]
    await sqlite_tenants.dispose()


async def test_what_layers_inside_have_found_out(sqlite_tenants: DatabaseCache) -> None:
    """It is chosen when a session is first asked for, so the path parameters, say, are known."""
    app = FastAPI()
    app.add_middleware(
        DatabaseSessionMiddleware, lambda scope: sqlite_tenants[scope["path_params"]["tenant"]]
    )

    @app.get("/{tenant}/notes")
    async def notes(tenant: str) -> str:
        return str(current_session().get_bind().engine.url.database)

    for name in "ab":
        response = await request(app, "GET", f"/{name}/notes")
        assert Path(response.json()).stem == name


async def test_the_request_is_not_kept(sqlite_tenants: DatabaseCache) -> None:
    """Once chosen, a scope that somebody keeps does not keep the ASGI scope."""

    class State:
        pass

    kept: list[object] = []
    gone: list[weakref.ref[State]] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        scope["state"]["mine"] = state = State()
        gone.append(weakref.ref(state))
        kept.append(current_scope())
        current_session()
        await answer(send)

    served = DatabaseSessionMiddleware(app, Chooser(sqlite_tenants))
    await request(served, headers=[("x-tenant", "a")], state={})
    gc.collect()
    assert (len(kept), gone[0]()) == (1, None)


# --- what is wrong


async def test_an_unknown_tenant_is_answered_by_the_application(
    sqlite_tenants: DatabaseCache,
) -> None:
    """What the function raises is raised by `current_session()`, and a request that asks for none
    has no need of a tenant."""
    choose = Chooser(sqlite_tenants)
    app = FastAPI()
    app.add_middleware(DatabaseSessionMiddleware, choose)

    @app.get("/health")
    async def health() -> str:
        return "ok"

    @app.get("/notes")
    async def notes() -> None:
        current_session()

    unknown = await ask(app, "x", "/notes", "GET")
    assert (unknown.status, unknown.json()) == (404, {"detail": "no tenant x"})
    assert choose.calls == 1
    assert (await ask(app, "x", "/health", "GET")).status == 200
    assert choose.calls == 1


async def test_a_choice_that_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """None is the configured default, and a string the name of a configured database."""
    (tmp_path / "settings_of_tenants.py").write_text(
        "from repom.config import RepomConfig\n"
        "class Config(RepomConfig):\n"
        f"    db_url = 'sqlite:///{tmp_path}/default.db'\n"
        f"    databases = {{'other': 'sqlite:///{tmp_path}/other.db'}}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("CONFIG_HOOK", "settings_of_tenants:Config")
    reset_config()
    forget_configured()
    found: list[str] = []

    async def respond(send: Send) -> None:
        found.append(Path(str(current_session().get_bind().engine.url.database)).name)
        await answer(send)

    try:
        for choice in (None, "other"):
            app = DatabaseSessionMiddleware(responding(respond), partial(_always, choice))
            assert (await request(app)).exception is None
        unknown = DatabaseSessionMiddleware(responding(respond), partial(_always, "nowhere"))
        assert isinstance((await request(unknown)).exception, UnknownDatabaseError)
    finally:
        reset_config()
        forget_configured()
    assert found == ["default.db", "other.db"]


def _always(choice: str | None, scope: Scope) -> str | None:
    return choice


@pytest.mark.parametrize("returned", ["coroutine", "URL", "number"])
async def test_a_choice_that_cannot_be(returned: str) -> None:
    """A coroutine function, a URL of which nobody would keep the engine, something else."""

    async def coroutine(scope: Scope) -> None:
        raise AssertionError

    functions: dict[str, Any] = {
        "coroutine": coroutine,
        "URL": lambda scope: "sqlite://",
        "number": lambda scope: 17,
    }
    says = {
        "coroutine": "Write a plain function",
        "URL": "DatabaseCache",
        "number": "returned a int",
    }

    async def respond(send: Send) -> None:
        current_session()

    response = await request(DatabaseSessionMiddleware(responding(respond), functions[returned]))
    assert isinstance(response.exception, ConfigurationError)
    assert says[returned] in str(response.exception)


# --- one inside another


async def test_mounted_middleware_joins(sqlite_tenants: DatabaseCache) -> None:
    """One that chooses by the same function is no second choice."""
    choose = Chooser(sqlite_tenants)

    async def respond(send: Send) -> None:
        await write("joined")
        await answer(send)

    inner = DatabaseSessionMiddleware(responding(respond), choose)
    response = await ask(DatabaseSessionMiddleware(inner, choose), "a")
    assert (response.status, response.exception, choose.calls) == (200, None, 1)
    await sqlite_tenants.dispose()


@pytest.mark.parametrize("outer", ["another function", "a database"])
async def test_middlewares_that_disagree(sqlite_tenants: DatabaseCache, outer: str) -> None:
    """The inner one would have another database, so both are named."""
    choose = Chooser(sqlite_tenants)
    given: Any = Chooser(sqlite_tenants) if outer == "another function" else sqlite_tenants["a"]
    inner = DatabaseSessionMiddleware(responding(answer), choose)
    response = await ask(DatabaseSessionMiddleware(inner, given), "a")
    assert isinstance(response.exception, ConfigurationError)
    assert "Give both middlewares the same function" in str(response.exception)
    assert choose.calls == 0


# --- where no request is


async def test_websocket(sqlite_tenants: DatabaseCache, caplog: pytest.LogCaptureFixture) -> None:
    """The scopes of a connection have its database; a session that is held for the whole
    connection is warned of once, and not for each."""

    app = FastAPI()
    app.add_middleware(DatabaseSessionMiddleware, Chooser(sqlite_tenants))

    @app.websocket("/")
    async def connect(
        socket: WebSocket, session: Annotated[AsyncSession, Depends(get_async_db_session)]
    ) -> None:
        async with session_scope():
            await write("scope")
        await session.execute(WRITE, {"text": "held"})
        await socket.accept()
        await socket.close()

    for name in "ab":
        async with websocket(app, headers=[("x-tenant", name)]) as connection:
            pass
        assert connection.exception is None
        async with session_scope(sqlite_tenants[name]) as session:
            assert set(await session.scalars(READ)) == {"held", "scope"}
    assert len(caplog.records) == 1
    await sqlite_tenants.dispose()


async def test_lifespan(tenants: DatabaseCache, tenant_urls: dict[str, str]) -> None:
    """No database is the default one there, a named one can be used, and when the application has
    stopped those that were chosen are disposed of."""

    @asynccontextmanager
    async def own_lifespan(app: Starlette) -> AsyncIterator[None]:
        with pytest.raises(UnknownDatabaseError, match="chosen for each request"):
            async with session_scope():
                pass
        async with session_scope(tenants["a"]) as session:
            await session.execute(READ)
        yield

    inner = Starlette(lifespan=own_lifespan)
    inner.add_route("/", _write_and_answer, methods=["POST"])
    app = DatabaseSessionMiddleware(inner, Chooser(tenants))
    async with lifespan(app):
        for name in "abc":
            assert (await ask(app, name)).status == 200
        await until(lambda: connected(tenant_urls.values()) == 2)
    await until(lambda: connected(tenant_urls.values()) == 0)


async def _write_and_answer(request: Any) -> Any:
    from starlette.responses import PlainTextResponse

    await write("x")
    return PlainTextResponse("ok")
