"""What is special to Falcon: its middleware, its threads, server-sent events.

What it shares with other frameworks is in tests/frameworks/test_table.py.
"""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import falcon
import falcon.asgi
import pytest
from falcon.asgi import Request, Response, SSEvent
from sqlalchemy.exc import IntegrityError

from repom import Database, current_sync_session
from repom.errors import NoScopeError, ScopeClosedError
from repom.middleware import DatabaseSessionMiddleware
from repom.middleware.falcon import RaiseFailedCommit
from tests.middleware.notes import NOWHERE, Sight, connections_in_use, notes, write
from tests.support.asgi import ASGIApp, request


def app_of(database: Database, resource: object, *middleware: Any) -> ASGIApp:
    app = falcon.asgi.App(middleware=list(middleware))
    app.add_route("/", resource)
    app.add_error_handler(IntegrityError, conflict)
    return DatabaseSessionMiddleware(app, database)


async def conflict(
    req: Request, resp: Response | None, error: IntegrityError, params: dict[str, Any]
) -> None:
    raise falcon.HTTPConflict(description=str(getattr(req.context, "user", None)))


class Orphans:
    async def on_post(self, req: Request, resp: Response) -> None:
        await write("a", parent=NOWHERE)
        resp.status = 201


# --- a failed COMMIT


async def test_components_before_ours_run_once_more(deferring: Database) -> None:
    """So the handler finds what they have prepared."""
    calls: list[str] = []

    class LogIn:
        async def process_request(self, req: Request, resp: Response) -> None:
            calls.append("before")
            req.context.user = "ada"

    class After:
        async def process_request(self, req: Request, resp: Response) -> None:
            calls.append("after")

    app = app_of(deferring, Orphans(), LogIn(), RaiseFailedCommit(), After())
    response = await request(app, "POST")
    assert (response.status, response.json()["description"]) == (409, "ada")
    assert calls == ["before", "after", "before"]


async def test_without_the_component(deferring: Database, deferring_url: str) -> None:
    """Falcon does not handle what its `send` raises: the failure leaves, nothing is sent."""
    response = await request(app_of(deferring, Orphans()), "POST")
    assert isinstance(response.exception, IntegrityError)
    assert response.sent == []
    assert notes(deferring_url) == []


# --- around the responder


async def test_process_response_is_a_part_of_the_request(
    database: Database, database_url: str
) -> None:
    """What it writes is committed with the rest, and what it makes of the status decides."""

    class Audit:
        async def process_response(
            self, req: Request, resp: Response, resource: object, req_succeeded: bool
        ) -> None:
            await write("audit")
            if "refuse" in req.params:
                resp.status = 403

    class Notes:
        async def on_post(self, req: Request, resp: Response) -> None:
            await write("a")

    app = app_of(database, Notes(), Audit())
    assert (await request(app, "POST", "/?refuse=1")).status == 403
    assert notes(database_url) == []
    assert (await request(app, "POST")).status == 200
    assert notes(database_url) == ["a", "audit"]


async def test_media_that_cannot_be_rendered(database: Database, database_url: str) -> None:
    """Falcon finds that out after the responder, and answers 500: nothing is committed."""

    class Notes:
        async def on_post(self, req: Request, resp: Response) -> None:
            await write("a")
            resp.media = object()

    assert (await request(app_of(database, Notes()), "POST")).status == 500
    assert notes(database_url) == []


async def test_server_sent_events(deferring: Database, deferring_url: str) -> None:
    """What the emitter writes is committed before the last message; a COMMIT that fails then is
    a broken stream."""

    class Events:
        async def on_post(self, req: Request, resp: Response) -> None:
            resp.sse = self.emit(req.get_param_as_int("parent"))

        async def emit(self, parent: int | None) -> AsyncIterator[SSEvent]:
            yield SSEvent(text="first")
            await write("a", parent=parent)
            yield SSEvent(text="second")

    app = app_of(deferring, Events())
    broken = await request(app, "POST", f"/?parent={NOWHERE}")
    assert (broken.status, broken.complete) == (200, False)
    assert notes(deferring_url) == []
    sight = Sight(deferring, deferring_url)
    response = await request(app, "POST", "/", on_message=sight)
    assert response.body == b"data: first\n\ndata: second\n\n"
    assert sight.seen[-2][1:] == ([], 1)
    assert sight.seen[-1] == ("body", ["a"], 0)


# --- threads and tasks


@pytest.mark.parametrize("way", [falcon.sync_to_async, asyncio.to_thread])
async def test_only_some_threads_know_the_request(database: Database, way: Any) -> None:
    """`falcon.sync_to_async()` hands no context variables over; `asyncio.to_thread()` does."""

    class Notes:
        async def on_post(self, req: Request, resp: Response) -> None:
            if way is asyncio.to_thread:
                await way(current_sync_session)
            else:
                with pytest.raises(NoScopeError):
                    await way(current_sync_session)

    assert (await request(app_of(database, Notes()), "POST")).status == 200


async def test_scheduled_work_is_no_part_of_the_request(database: Database) -> None:
    """`resp.schedule()` runs when the request may be over: its session cannot be used."""
    errors: asyncio.Queue[Exception] = asyncio.Queue()
    is_over = asyncio.Event()

    class Notes:
        async def on_post(self, req: Request, resp: Response) -> None:
            await write("a")
            resp.schedule(self.later)

        async def later(self) -> None:
            await is_over.wait()
            try:
                await write("later")
            except ScopeClosedError as error:
                errors.put_nowait(error)

    await request(app_of(database, Notes()), "POST")
    is_over.set()
    assert "async with session_scope()" in str(await errors.get())
    assert connections_in_use(database) == 0
