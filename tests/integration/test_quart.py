"""What is special to Quart: the order of its hooks, background tasks, sync generators.

What it shares with other frameworks is in tests/frameworks/test_table.py.
"""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from quart import Blueprint, Quart, g
from sqlalchemy.exc import IntegrityError

from repom import Database, on_commit, session_scope
from repom.errors import ScopeClosedError
from repom.middleware import DatabaseSessionMiddleware
from repom.middleware.quart import raise_failed_commit
from tests.middleware.notes import (
    NOWHERE,
    notes,
    write,
    write_sync,
)
from tests.support.asgi import request
from tests.support.polling import until

Answer = tuple[Any, int]


def app_of(database: Database) -> Any:
    app = Quart(__name__)
    app.asgi_app = DatabaseSessionMiddleware(app.asgi_app, database)  # type: ignore[method-assign]
    return app


async def create_orphan() -> Answer:
    await write("a", parent=NOWHERE)
    return "", 201


async def conflict(error: Exception) -> Answer:
    return {"user": g.get("user")}, 409


# --- a failed COMMIT


async def test_hooks_before_ours_run_once_more(deferring: Database) -> None:
    """So the handler finds what they have prepared; those after ours do not."""
    calls: list[str] = []

    async def log_in() -> None:
        calls.append("before")
        g.user = "ada"

    async def after() -> None:
        calls.append("after")

    app = app_of(deferring)
    app.post("/")(create_orphan)
    app.register_error_handler(IntegrityError, conflict)
    for hook in (log_in, raise_failed_commit, after):
        app.before_request(hook)
    response = await request(app, "POST")
    assert (response.status, response.json()) == (409, {"user": "ada"})
    assert calls == ["before", "after", "before"]


async def test_handler_of_a_blueprint_answers(deferring: Database) -> None:
    """As it does for what its views raise."""
    blueprint = Blueprint("notes", __name__)
    blueprint.post("/")(create_orphan)
    blueprint.register_error_handler(IntegrityError, conflict)
    app = app_of(deferring)
    app.register_blueprint(blueprint)
    app.before_request(raise_failed_commit)
    assert (await request(app, "POST")).status == 409


async def test_without_the_hook(deferring: Database, deferring_url: str) -> None:
    """Quart does not handle what its `send` raises: the failure leaves, nothing is sent."""
    app = app_of(deferring)
    app.post("/")(create_orphan)
    app.register_error_handler(IntegrityError, conflict)
    response = await request(app, "POST")
    assert isinstance(response.exception, IntegrityError)
    assert response.sent == []
    assert notes(deferring_url) == []


async def test_body_of_the_request_is_read_once(deferring: Database) -> None:
    """The second time it is empty, and nobody waits for it."""
    from quart import request as quart_request

    bodies: list[Any] = []

    async def read() -> None:
        bodies.append(await quart_request.get_data())

    app = app_of(deferring)
    app.post("/")(create_orphan)
    app.register_error_handler(IntegrityError, conflict)
    app.before_request(read)
    app.before_request(raise_failed_commit)
    response = await request(app, "POST", body=[b"a", b"b"])
    assert response.status == 409
    assert bodies == [b"ab", b""]


# --- background tasks


async def test_background_task_is_no_part_of_the_request(
    database: Database, database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """One that outlives the request cannot use its session; Quart logs the error that says so."""
    response_is_sent = asyncio.Event()
    app = app_of(database)

    async def later() -> None:
        await response_is_sent.wait()
        await write("later")

    @app.post("/")  # type: ignore[untyped-decorator]
    async def create() -> Answer:
        await write("a")
        app.add_background_task(later)
        return "", 201

    await request(app, "POST")
    response_is_sent.set()
    await until(lambda: not app.background_tasks)
    assert notes(database_url) == ["a"]
    logged = [record.exc_info and record.exc_info[0] for record in caplog.records]
    assert ScopeClosedError in logged


@pytest.mark.parametrize("status", [201, 404])
async def test_background_task_started_by_on_commit(
    database: Database, database_url: str, status: int
) -> None:
    """It begins when the work that it is about is committed, or never."""
    seen: list[list[str]] = []
    app = app_of(database)

    async def later() -> None:
        async with session_scope():
            seen.append(notes(database_url))
            await write("later")

    @app.post("/")  # type: ignore[untyped-decorator]
    async def create() -> Answer:
        await write("a")
        on_commit(lambda: app.add_background_task(later))
        return "", status

    await request(app, "POST")
    await until(lambda: not app.background_tasks)
    assert seen == ([["a"]] if status == 201 else [])
    assert notes(database_url) == (["a", "later"] if status == 201 else [])


# --- bodies


async def test_body_of_a_sync_generator(database: Database, database_url: str) -> None:
    """Quart runs it in threads, one after the other: they share the request's sync session."""
    app = app_of(database)

    @app.post("/")  # type: ignore[untyped-decorator]
    def create() -> Iterator[bytes]:
        for text in "abc":
            write_sync(text)
            yield text.encode()

    response = await request(app, "POST")
    assert (response.body, response.complete, response.exception) == (b"abc", True, None)
    assert notes(database_url) == ["a", "b", "c"]
    assert database.engine.pool.checkedout() == 0  # type: ignore[attr-defined]
