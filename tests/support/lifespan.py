"""The lifespan of an application, run as a server runs it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from tests.support.protocol import ASGIApp, Message, ProtocolViolation, field
from tests.support.server import OnMessage, call_hook, end_app, raise_errors, run_app


class LifespanFailed(Exception):  # noqa: N818
    """The application said `failed`, or ended without an answer, at startup or shutdown."""


class Lifespan:
    """A running lifespan.

    Attributes:
        state: what the application left for its requests.
        messages: what the application has sent.
        exception: what left the application, if anything.
    """

    def __init__(self, app: ASGIApp, on_message: OnMessage | None) -> None:
        self.state: dict[str, Any] = {}
        self.messages: list[Message] = []
        self.exception: BaseException | None = None
        self.errors: list[BaseException] = []
        self._on_message = on_message
        self._inbox: asyncio.Queue[Message] = asyncio.Queue()
        self._asked = ""  # "startup" or "shutdown" while an answer is awaited
        self._answered = asyncio.Event()
        scope = {
            "type": "lifespan",
            "asgi": {"version": "3.0", "spec_version": "2.0"},
            "state": self.state,
        }
        self._task = asyncio.create_task(run_app(app, scope, self._inbox.get, self._send))

    async def _send(self, message: Message) -> None:
        kind, asked = message.get("type"), self._asked
        try:
            if not asked or kind not in (f"lifespan.{asked}.complete", f"lifespan.{asked}.failed"):
                raise ProtocolViolation(f"{kind!r} sent while {asked or 'nothing'} was asked for")
            field(message, "message", str, "")
        except ProtocolViolation as violation:
            self.errors.append(violation)
            self._answered.set()  # do not wait for more from an application that is wrong
            raise
        self._asked = ""
        self.messages.append({**message})
        await call_hook(self._on_message, message, self.errors)
        self._answered.set()

    async def ask(self, what: str) -> None:
        """Tell the application to start up or to shut down, and wait for its answer."""
        self._asked = what
        self._answered.clear()
        self._inbox.put_nowait({"type": f"lifespan.{what}"})
        answer = asyncio.create_task(self._answered.wait())
        await asyncio.wait({answer, self._task}, return_when=asyncio.FIRST_COMPLETED)
        answer.cancel()
        raise_errors(self.errors)
        if not self._answered.is_set():
            error = self._task.result()
            raise LifespanFailed(f"the application did not answer lifespan.{what}") from error
        if self.messages[-1]["type"].endswith(".failed"):
            reason = self.messages[-1].get("message", "")
            # Applications raise right after they have said so; a server does not wait for it.
            done, _ = await asyncio.wait({self._task}, timeout=0.1)
            cause = self._task.result() if done else None
            raise LifespanFailed(f"{what} failed: {reason}") from cause

    async def end(self) -> None:
        """Wait until the application has ended, which it must without an error."""
        self.exception = await end_app(self._task)
        if self.exception is not None:
            raise LifespanFailed("the application raised after its shutdown") from self.exception

    async def abandon(self) -> None:
        """Leave no task behind when startup or shutdown came to nothing."""
        if not self._task.done():
            self._task.cancel()
            await asyncio.wait({self._task})


@asynccontextmanager
async def lifespan(app: ASGIApp, *, on_message: OnMessage | None = None) -> AsyncIterator[Lifespan]:
    """Start `app` up, run the block, and shut `app` down, also when the block raises.

    Raises:
        LifespanFailed: with the application's own message, its exception as the cause.
        ProtocolViolation: the application broke the protocol, whatever it made of the error.
    """
    running = Lifespan(app, on_message)
    try:
        await running.ask("startup")
        try:
            yield running
        finally:
            await running.ask("shutdown")
            await running.end()
    finally:
        await running.abandon()
        raise_errors(running.errors)
