"""The recorder of requests: it calls an application as a server does, and says what happened."""

import asyncio
import doctest
from contextvars import ContextVar
from typing import Any

import pytest

from tests.support import asgi
from tests.support.asgi import (
    ASGIApp,
    Message,
    Receive,
    Scope,
    Send,
    request,
)

START: Message = {"type": "http.response.start", "status": 200}
END: Message = {"type": "http.response.body"}
MORE: Message = {"type": "http.response.body", "body": b"x", "more_body": True}


def sending(*messages: Message) -> ASGIApp:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        for message in messages:
            await send(message)

    return app


async def test_response() -> None:
    """The response says what arrived, in which order and when."""
    app = sending({**START, "headers": [(b"x-a", b"1")]}, MORE, {**END, "body": b"y"})
    response = await request(app)
    assert (response.status, response.body, response.complete) == (200, b"xy", True)
    assert (response.header("X-A"), response.header("x-b")) == ("1", None)
    assert [sent.number for sent in response.sent] == [0, 1, 2]
    assert sorted(response.sent, key=lambda sent: sent.at) == response.sent
    assert response.messages[0]["type"] == "http.response.start"
    assert (await request(sending(START, {**END, "body": b"[1]"}))).json() == [1]


async def test_unfinished_responses_are_reported_not_raised() -> None:
    """No response, half a response and an exception are results that a test looks at."""
    assert (await request(sending())).status is None
    half = await request(sending(START, MORE))
    assert (half.status, half.body, half.complete) == (200, b"x", False)

    async def broken(scope: Scope, receive: Receive, send: Send) -> None:
        await send(START)
        raise ZeroDivisionError

    response = await request(broken)
    assert isinstance(response.exception, ZeroDivisionError)
    assert response.status == 200


async def test_a_failed_assertion_in_an_application_fails_the_test() -> None:
    """An application that a test has written may assert."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(START)
        assert scope["method"] == "PUT", "no PUT"

    with pytest.raises(AssertionError, match="no PUT"):
        await request(app)


async def test_scope_and_receive() -> None:
    """The application gets a complete scope, the body in its chunks, and then a disconnect."""
    seen: dict[str, Any] = {}
    received: list[Message] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.update(scope)
        received.extend([await receive(), await receive()])
        waiting = asyncio.create_task(receive_into(receive))
        await asyncio.sleep(0)
        assert not waiting.done()
        await send(START)
        await send(END)
        await waiting

    async def receive_into(receive: Receive) -> None:
        received.append(await receive())

    await request(
        app,
        "POST",
        "/caf%C3%A9?a=%20",
        headers={"X-A": "1"},
        body=[b"a", b"b"],
        state={"k": 1},
        scope={"root_path": "/r"},
    )
    assert (seen["path"], seen["raw_path"]) == ("/café", b"/caf%C3%A9")
    assert (seen["method"], seen["query_string"], seen["root_path"]) == ("POST", b"a=%20", "/r")
    assert seen["headers"][1:] == [(b"x-a", b"1"), (b"content-length", b"2")]
    assert (seen["state"], seen["asgi"]["spec_version"]) == ({"k": 1}, "2.4")
    assert [(m["type"], m.get("body"), m.get("more_body")) for m in received] == [
        ("http.request", b"a", True),
        ("http.request", b"b", False),
        ("http.disconnect", None, None),
    ]


async def test_on_message_is_called_before_the_application_goes_on() -> None:
    """The hook sees each message at the moment it leaves; what fails in it fails the test."""
    order: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        for message in (START, END):
            await send(message)
            order.append("sent")

    async def look(message: Message) -> None:
        await asyncio.sleep(0)
        order.append(message["type"])

    await request(app, on_message=look)
    assert order == ["http.response.start", "sent", "http.response.body", "sent"]

    with pytest.raises(pytest.fail.Exception, match="not committed"):
        await request(app, on_message=lambda message: pytest.fail("not committed"))


@pytest.mark.parametrize("after", [0, 1, 2])
async def test_disconnect(after: int) -> None:
    """Once the client is gone receive() says so, send() raises OSError, and nothing arrives."""
    outcome: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            for message in (START, MORE, END):
                await send(message)
        except OSError:
            outcome.append("OSError")
        assert (await receive())["type"] == "http.request"
        outcome.append((await receive())["type"])

    response = await request(app, disconnect_after=after)
    assert (len(response.sent), response.complete) == (after, False)
    assert outcome == ["OSError", "http.disconnect"]
    response = await request(app, disconnect_after=after, after_disconnect="ignore")
    assert (len(response.sent), response.exception, outcome[2:]) == (
        after,
        None,
        ["http.disconnect"],
    )


async def test_cancellation_reaches_the_application_and_the_test() -> None:
    """Cancelling a request cancels the application; one that cancels itself has failed."""
    entered, seen = asyncio.Event(), []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        entered.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            seen.append("cancelled")
            raise

    task = asyncio.create_task(request(app))
    await entered.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert seen == ["cancelled"]

    async def cancels_itself(scope: Scope, receive: Receive, send: Send) -> None:
        raise asyncio.CancelledError

    assert isinstance((await request(cancels_itself)).exception, asyncio.CancelledError)


async def test_context_variables_stay_in_their_request() -> None:
    """What a request sets in its context is not seen by the next one, as behind a server."""
    variable: ContextVar[int] = ContextVar("variable", default=0)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        assert variable.get() == 0
        variable.set(1)
        await sending(START, END)(scope, receive, send)

    for _ in range(2):
        assert (await request(app)).exception is None


def test_the_examples_in_the_docstrings_work() -> None:
    """What the docstrings show is run."""
    outcome = doctest.testmod(asgi)
    assert outcome.attempted
    assert not outcome.failed
