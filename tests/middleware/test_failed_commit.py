"""The second call of an application, in which its hook raises what COMMIT raised.

Applications without a framework, so that a test sees what is called and with what. How it goes in
each framework is in tests/frameworks/test_table.py and tests/integration.
"""

import contextlib
from collections.abc import Awaitable, Callable
from typing import Any

from sqlalchemy.exc import IntegrityError

from repom import Database, current_session
from repom.middleware import DatabaseSessionMiddleware
from repom.middleware.failed_commit import raise_for
from tests.middleware.notes import (
    NOWHERE,
    answer,
    chunk,
    connections_in_use,
    notes,
    start,
    write,
)
from tests.support.asgi import ASGIApp, Message, Receive, Response, Scope, Send, request

Answer = Callable[[Exception, Receive, Send], Awaitable[None]]


async def conflict(error: Exception, receive: Receive, send: Send) -> None:
    assert isinstance(error, IntegrityError)
    await answer(send, 409)


def framework(calls: list[Scope], handler: Answer = conflict, hook: bool = True) -> ASGIApp:
    """An application that handles what is raised inside, and nothing that its `send` raises."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        calls.append(dict(scope))
        try:
            if hook:
                raise_for(scope)
            await write("a", parent=NOWHERE)
        except Exception as error:
            await handler(error, receive, send)
        else:
            await answer(send, 201)

    return app


async def post(app: ASGIApp, database: Database, **options: Any) -> Response:
    response = await request(DatabaseSessionMiddleware(app, database), "POST", **options)
    assert connections_in_use(database) == 0
    return response


def starts(response: Response) -> list[Message]:
    return [each for each in response.messages if each["type"] == "http.response.start"]


async def test_hook_raises_the_failure_in_a_second_call(
    deferring: Database, deferring_url: str
) -> None:
    """The application answers in its own way; there is one response, and no row."""
    calls: list[Scope] = []
    response = await post(framework(calls), deferring)
    assert (response.status, response.complete, response.exception) == (409, True, None)
    assert len(starts(response)) == 1
    assert len(calls) == 2
    assert notes(deferring_url) == []


async def test_without_a_hook_there_is_no_second_call(
    deferring: Database, deferring_url: str
) -> None:
    """It would do the request's work once more. The failure leaves, and nothing is sent."""
    calls: list[Scope] = []
    response = await post(framework(calls, hook=False), deferring)
    assert isinstance(response.exception, IntegrityError)
    assert response.sent == []
    assert len(calls) == 1
    assert notes(deferring_url) == []


async def test_success_is_refused(deferring: Database) -> None:
    """A handler that answers 2xx would lie."""

    async def lie(error: Exception, receive: Receive, send: Send) -> None:
        await answer(send, 200)

    response = await post(framework([], lie), deferring)
    assert isinstance(response.exception, IntegrityError)
    assert response.sent == []


async def test_success_is_refused_also_if_the_framework_swallows_that(deferring: Database) -> None:
    """What `send` raises may be lost in the application; the failure leaves all the same."""

    async def lie(error: Exception, receive: Receive, send: Send) -> None:
        with contextlib.suppress(IntegrityError):
            await answer(send, 200)

    response = await post(framework([], lie), deferring)
    assert isinstance(response.exception, IntegrityError)
    assert response.sent == []


async def test_answer_without_the_hook_is_none(deferring: Database) -> None:
    """A second call that ends before the hook, as for a path that a mount has changed, says
    nothing about the failure, so that is what leaves."""
    calls: list[Scope] = []
    inner = framework(calls)

    async def mounting(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] != "/":
            await answer(send, 404)
            return
        scope["path"] = "/mounted"
        await inner(scope, receive, send)

    response = await post(mounting, deferring)
    assert isinstance(response.exception, IntegrityError)
    assert response.sent == []
    assert len(calls) == 1


async def test_second_call_has_an_empty_body(deferring: Database) -> None:
    """The first one has read it; applications that wait for its end do not wait for ever."""
    bodies: list[list[bytes]] = []

    async def reading(scope: Scope, receive: Receive, send: Send) -> None:
        bodies.append([])
        more = True
        while more:
            message = await receive()
            bodies[-1].append(message["body"])
            more = message["more_body"]
        await framework([])(scope, receive, send)

    response = await post(reading, deferring, body=[b"a", b"b"])
    assert response.status == 409
    assert bodies == [[b"a", b"b"], [b""]]


async def test_client_that_goes_away_is_noticed_in_the_second_call(deferring: Database) -> None:
    """After the empty body `receive` is that of the request."""
    received: list[str] = []

    async def until_disconnected(error: Exception, receive: Receive, send: Send) -> None:
        received.extend([(await receive())["type"] for _ in range(2)])
        await answer(send, 409)

    response = await post(framework([], until_disconnected), deferring, disconnect_after=0)
    assert received == ["http.request", "http.disconnect"]
    assert response.sent == []


async def test_handler_has_a_fresh_transaction(deferring: Database, deferring_url: str) -> None:
    """Which its own error status rolls back."""

    async def look(error: Exception, receive: Receive, send: Send) -> None:
        assert not current_session().in_transaction()
        await write("of the handler")
        await answer(send, 409)

    response = await post(framework([], look), deferring)
    assert (response.status, response.exception) == (409, None)
    assert notes(deferring_url) == []


async def test_handler_that_fails(deferring: Database) -> None:
    """What it raises leaves."""
    own = LookupError()

    async def fail(error: Exception, receive: Receive, send: Send) -> None:
        raise own

    response = await post(framework([], fail), deferring)
    assert response.exception is own
    assert response.sent == []


async def test_failure_after_the_start_has_no_second_call(
    deferring: Database, deferring_url: str
) -> None:
    """The client has its 200; nothing can be said any more but that the body is broken."""
    calls: list[Scope] = []

    async def streaming(scope: Scope, receive: Receive, send: Send) -> None:
        calls.append(scope)
        raise_for(scope)
        await send(start())
        await send(chunk(b"x", more=True))
        await write("a", parent=NOWHERE)
        await send(chunk())

    response = await post(streaming, deferring)
    assert (response.body, response.complete) == (b"x", False)
    assert len(calls) == 1
    assert notes(deferring_url) == []


async def test_nothing_of_it_stays(deferring: Database) -> None:
    """The next request with the same ASGI scope, by a layer that tries again, is a first call."""
    calls: list[Scope] = []
    app = DatabaseSessionMiddleware(framework(calls), deferring)

    async def twice(scope: Scope, receive: Receive, send: Send) -> None:
        async def ignore(message: Message) -> None:
            pass

        await app(scope, receive, ignore)
        await app(scope, receive, send)

    response = await request(twice, "POST")
    assert response.status == 409
    assert len(calls) == 4
    assert [each.get("repom.failed_commit") is not None for each in calls] == [False, True] * 2
