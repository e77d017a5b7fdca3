"""What is special to Sanic: it answers for a failed COMMIT by itself; middlewares, signals, tasks.

What it shares with other frameworks is in tests/frameworks/test_table.py.
"""

import asyncio
from itertools import count
from pathlib import Path
from typing import Any

from sanic import Request, Sanic, empty
from sanic.response import HTTPResponse
from sqlalchemy.exc import IntegrityError

from repom import Database
from repom.errors import ScopeClosedError
from repom.middleware import DatabaseSessionMiddleware
from tests.frameworks.apps.sanic import conflict
from tests.integration.test_sockets import client_of, post
from tests.middleware.notes import NOWHERE, create_notes, notes, write
from tests.support.asgi import lifespan, request
from tests.support.sockets import free_port, serve_process

numbers = count()


def app_of(handler: Any) -> Any:
    app: Any = Sanic(f"special-{next(numbers)}", configure_logging=False)
    app.config.TOUCHUP = False  # it would rewrite Sanic's own classes, once in a process
    app.add_route(handler, "/", methods=["POST"])
    app.exception(IntegrityError)(conflict)
    return app


async def create(request: Request) -> HTTPResponse:
    await write("a")
    return empty(201)


async def create_orphan(request: Request) -> HTTPResponse:
    await write("a", parent=NOWHERE)
    return empty(201)


def test_as_it_is_served(tmp_path: Path, postgres_url: str) -> None:
    """By uvicorn, with Sanic's own optimizations: it rewrites its code when it starts."""
    create_notes(postgres_url)
    (tmp_path / "served_site.py").write_text(
        "import sys\n"
        f"sys.path.append({str(Path(__file__).parents[2])!r})\n"
        "from sanic import Sanic\n"
        "from sqlalchemy.exc import IntegrityError\n"
        "from repom.middleware import DatabaseSessionMiddleware\n"
        "from tests.integration import test_sanic as tested\n"
        "app = Sanic('served')\n"
        "app.add_route(tested.create, '/', methods=['POST'])\n"
        "app.add_route(tested.create_orphan, '/orphans', methods=['POST'])\n"
        "app.exception(IntegrityError)(tested.conflict)\n"
        "app = DatabaseSessionMiddleware(app)\n"
    )
    port = free_port()
    base_url = f"http://127.0.0.1:{port}"
    args = ["-m", "uvicorn", "served_site:app", "--app-dir", str(tmp_path), "--port", str(port)]
    env = {"REPOM_DATABASE_URL": postgres_url}
    with (
        serve_process(args, env, ready_url=f"{base_url}/x") as process,
        client_of(base_url) as client,
    ):
        assert post(client, "/orphans") == 409
        assert post(client, "/") == 201
        assert notes(postgres_url) == ["a"]
    assert "Exception in ASGI application" not in process.output()


async def test_response_middleware_is_a_part_of_the_request(
    database: Database, database_url: str
) -> None:
    """What it writes is committed with the rest, and what it makes of the status decides."""
    app = app_of(create)

    @app.on_response  # type: ignore[untyped-decorator]
    async def audit(request: Request, response: HTTPResponse) -> None:
        await write("audit")
        if "refuse" in request.args:
            response.status = 403

    served = DatabaseSessionMiddleware(app, database)
    async with lifespan(served):
        assert (await request(served, "POST", "/?refuse=1")).status == 403
        assert notes(database_url) == []
        assert (await request(served, "POST")).status == 201
    assert notes(database_url) == ["a", "audit"]


async def test_failed_commit_is_an_exception_like_any(deferring: Database) -> None:
    """Sanic's signal for exceptions tells of it, once."""
    told: list[type[BaseException]] = []
    app = app_of(create_orphan)

    @app.signal("http.lifecycle.exception")  # type: ignore[untyped-decorator]
    async def tell(request: Request, exception: BaseException) -> None:
        told.append(type(exception))

    served = DatabaseSessionMiddleware(app, deferring)
    async with lifespan(served):
        response = await request(served, "POST")
    assert (response.status, response.exception) == (409, None)
    assert told == [IntegrityError]


async def test_task_is_no_part_of_the_request(database: Database, database_url: str) -> None:
    """What `add_task()` runs when the request is over cannot use its session."""
    is_over = asyncio.Event()
    errors: asyncio.Queue[Exception] = asyncio.Queue()

    async def later() -> None:
        await is_over.wait()
        try:
            await write("later")
        except ScopeClosedError as error:
            errors.put_nowait(error)

    async def start(request: Request) -> HTTPResponse:
        await write("a")
        request.app.add_task(later())
        return empty(201)

    served = DatabaseSessionMiddleware(app_of(start), database)
    async with lifespan(served):
        await request(served, "POST")
        is_over.set()
        assert "async with session_scope()" in str(await errors.get())
    assert notes(database_url) == ["a"]
