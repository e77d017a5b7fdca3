"""What a server does alike for every kind of connection: build the scope, run the application."""

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, Literal
from urllib.parse import unquote

import pytest

from tests.support.protocol import ASGIApp, Message, Receive, Scope, Send

Headers = Mapping[str, str] | Sequence[tuple[str | bytes, str | bytes]]
OnMessage = Callable[[Message], Awaitable[object] | object]

PATIENCE = 5.0  # seconds that an application has to end, or to answer, once it was told to


class ClientDisconnected(OSError):  # noqa: N818
    """Raised by `send()` once the client is gone, as the specification asks since 2.4."""


def connection_scope(
    kind: Literal["http", "websocket"],
    target: str,
    headers: Headers,
    extensions: Iterable[str],
    state: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Return the scope that a server builds for a connection to `target`."""
    pairs = headers.items() if isinstance(headers, Mapping) else headers
    raw = [(_latin(name).lower(), _latin(value)) for name, value in pairs]
    if not any(name == b"host" for name, _ in raw):
        raw.insert(0, (b"host", b"testserver"))
    path, _, query = target.partition("?")
    return {
        "type": kind,
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "scheme": "http" if kind == "http" else "ws",
        "path": unquote(path),
        "raw_path": path.encode("ascii"),
        "query_string": query.encode("ascii"),
        "root_path": "",
        "headers": raw,
        "client": ("127.0.0.1", 50000),
        "server": ("testserver", 80),
        "state": dict(state or {}),
        "extensions": {name: {} for name in extensions},
    }


def _latin(text: str | bytes) -> bytes:
    return text if isinstance(text, bytes) else text.encode("latin-1")


async def run_app(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> BaseException | None:
    """Run an application to its end and return what left it, if anything.

    It gets a task of its own, as servers give it, so that a context variable which it sets is
    not seen by the next request. Cancelling the caller cancels the application, and is raised
    here once that has ended; an application that cancels itself is reported like any failure.
    """

    async def call() -> None:
        await app(scope, receive, send)

    try:
        await asyncio.create_task(call(), name=f"{scope['type']} {scope.get('path', '')}")
    except asyncio.CancelledError as cancelled:
        caller = asyncio.current_task()
        if caller is not None and caller.cancelling():
            raise
        return cancelled
    except Exception as error:
        return error
    return None


async def end_app(task: asyncio.Task[BaseException | None]) -> BaseException | None:
    """Wait until an application that was told to end has ended; return what left it."""
    done, _ = await asyncio.wait({task}, timeout=PATIENCE)
    if not done:
        task.cancel()
        await asyncio.wait({task}, timeout=PATIENCE)
        raise TimeoutError(f"the application did not end within {PATIENCE} s of the disconnect")
    return task.result()


async def call_hook(hook: OnMessage | None, message: Message, errors: list[BaseException]) -> None:
    """Show a message to the test; its failure is the test's, not the application's."""
    if hook is None:
        return
    try:
        result = hook(message)
        if inspect.isawaitable(result):
            await result
    except (Exception, pytest.fail.Exception) as error:
        errors.append(error)


def raise_errors(errors: list[BaseException], left: BaseException | None = None) -> None:
    """Raise the first of the errors; the others are its notes.

    Args:
        left: what left the application. An `AssertionError` is the test's own, from an
            application written in the test, and belongs to the errors.
    """
    if isinstance(left, AssertionError) and left not in errors:
        errors = [*errors, left]
    if errors:
        first, *others = errors
        for other in others:
            first.add_note(f"and then {type(other).__name__}: {other}")
        raise first
