"""The lifespan runner: an application is started and stopped for real, or the test knows why."""

import asyncio

import pytest

from tests.support.asgi import (
    ASGIApp,
    LifespanFailed,
    Message,
    ProtocolViolation,
    Receive,
    Scope,
    Send,
    lifespan,
)


def answering(startup: Message, shutdown: Message, error: Exception | None = None) -> ASGIApp:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        assert await receive() == {"type": "lifespan.startup"}
        scope["state"]["started"] = True
        await send(startup)
        assert await receive() == {"type": "lifespan.shutdown"}
        await send(shutdown)
        if error is not None:
            raise error

    return app


UP: Message = {"type": "lifespan.startup.complete"}
DOWN: Message = {"type": "lifespan.shutdown.complete"}


async def test_startup_and_shutdown() -> None:
    """The block runs between the two answers, and sees what startup left for the requests."""
    async with lifespan(answering(UP, DOWN)) as running:
        assert running.messages == [UP]
        assert running.state == {"started": True}
    assert running.messages == [UP, DOWN]


async def test_shutdown_also_after_an_error() -> None:
    """A test that fails in the block still shuts the application down."""
    seen: list[str] = []
    with pytest.raises(ZeroDivisionError):
        async with lifespan(answering(UP, DOWN), on_message=lambda m: seen.append(m["type"])):
            raise ZeroDivisionError
    assert seen == [UP["type"], DOWN["type"]]


@pytest.mark.parametrize(
    ("startup", "shutdown", "says"),
    [
        (
            {"type": "lifespan.startup.failed", "message": "no disk"},
            DOWN,
            "startup failed: no disk",
        ),
        (UP, {"type": "lifespan.shutdown.failed"}, "shutdown failed"),
    ],
)
async def test_failure(startup: Message, shutdown: Message, says: str) -> None:
    """A failed startup or shutdown raises, with the application's message."""
    with pytest.raises(LifespanFailed, match=says):
        async with lifespan(answering(startup, shutdown)):
            pass


async def test_exceptions_are_the_cause() -> None:
    """What the application raises at startup, or after its shutdown, is not lost."""

    async def broken(scope: Scope, receive: Receive, send: Send) -> None:
        raise ZeroDivisionError

    with pytest.raises(LifespanFailed, match=r"did not answer lifespan\.startup") as failed:
        async with lifespan(broken):
            pass
    assert isinstance(failed.value.__cause__, ZeroDivisionError)
    with pytest.raises(LifespanFailed, match="after its shutdown"):
        async with lifespan(answering(UP, DOWN, ZeroDivisionError())):
            pass


@pytest.mark.parametrize("wrong", [DOWN, {"type": "lifespan.started"}, {**UP, "message": 1}])
async def test_violation(wrong: Message) -> None:
    """A wrong answer is reported, and does not leave the test waiting, even if swallowed."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send(wrong)
        except ProtocolViolation:
            await asyncio.Event().wait()

    with pytest.raises(ProtocolViolation):
        async with lifespan(app):
            pass


async def test_two_answers() -> None:
    """Startup is answered once."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(UP)
        await send(UP)

    with pytest.raises(ProtocolViolation, match="while nothing was asked for"):
        async with lifespan(app):
            pass
