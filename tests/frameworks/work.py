"""What every one of the applications does with the database, at some depth of its code.

An application has an endpoint for each of these, written as its framework's users write it; see
`tests.frameworks.apps`.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

from sqlalchemy import event, select
from sqlalchemy.ext.asyncio import AsyncResult

from repom import current_session, session_scope
from tests.middleware.notes import NOTE, NOWHERE, write, write_sync

#: The tasks that an application has left to themselves.
tasks: set[asyncio.Task[None]] = set()


class Refused(Exception):  # noqa: N818
    """Has a handler in every application, which answers 422."""


class Unforeseen(Exception):  # noqa: N818
    """Has a handler in none."""


async def create(text: str = "a") -> None:
    """In a task of the request, which finds its session as any code does."""
    await asyncio.create_task(write(text))


async def create_orphan() -> None:
    """What COMMIT refuses, with an `IntegrityError`: every application answers 409 for it."""
    await write("a", parent=NOWHERE)


async def create_doomed() -> None:
    """What COMMIT refuses with an error that no application has a handler for."""

    def fail(session: object) -> None:
        raise Unforeseen

    await write("a")
    event.listen(current_session().sync_session, "before_commit", fail)


def create_sync(text: str = "a") -> None:
    """For sync code."""
    write_sync(text)


def create_orphan_sync() -> None:
    """For sync code: what COMMIT refuses."""
    write_sync("a", parent=NOWHERE)


async def later() -> None:
    """Background work that the framework runs in the request, after its response."""
    await write("later")


async def later_on_its_own() -> None:
    """Background work that outlives the request."""
    async with session_scope():
        await write("later")


def start(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """A task of the application's own, where the framework has nothing for it."""
    task = asyncio.create_task(work())
    tasks.add(task)
    task.add_done_callback(tasks.discard)


async def body() -> AsyncIterator[bytes]:
    """A body that writes while it is sent."""
    yield b"a"  # with which the response has started, in every framework
    for text in ("b", "c"):
        await write(text)
        yield text.encode()


async def broken_body() -> AsyncIterator[bytes]:
    """A body that fails in its middle."""
    yield b"a"
    await write("b")
    yield b"b"
    raise Unforeseen


async def refused_body() -> AsyncIterator[bytes]:
    """A body whose COMMIT fails."""
    yield b"a"
    await write("b", parent=NOWHERE)


async def cursor() -> AsyncResult[Any]:
    """What is read while the body is sent, opened before the response starts."""
    return await current_session().stream(select(NOTE.c.text).order_by(NOTE.c.text))


async def export(rows: AsyncResult[Any]) -> AsyncIterator[bytes]:
    """A body read from a cursor."""
    async for row in rows:
        yield row.text.encode()
