"""The start and the end of the application."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from repom.database import Database
from repom.loops import CLOSE_TIMEOUT
from repom.middleware.policy import ASGIApp, Message, Receive, Scope, Send
from repom.registry import Databases, configured_so_far
from repom.shield import run_to_end

logger = logging.getLogger("repom.middleware")


async def run_lifespan(
    app: ASGIApp, databases: Databases, asgi_scope: Scope, receive: Receive, send: Send
) -> None:
    """Let the app start and stop, and dispose of the databases after it."""

    async def disposing_send(message: Message) -> None:
        if message["type"] in ("lifespan.shutdown.complete", "lifespan.shutdown.failed"):
            await dispose(databases)
        await send(message)

    try:
        await app(asgi_scope, receive, disposing_send)
    finally:
        await dispose(databases)  # again costs nothing, and an app may have raised


async def refuse_to_start(error: Exception, receive: Receive, send: Send) -> None:
    """Tell the server that the application cannot start.

    Said by a message, since servers take an exception for an app without lifespan.
    """
    await receive()
    await send({"type": "lifespan.startup.failed", "message": f"{type(error).__name__}: {error}"})


def check(databases: Databases, *, two_phase: bool = False) -> None:
    """Raise what the first request would: unusable URL, missing driver, unwritable file."""
    for database in databases.to_check():
        database.check()
        if two_phase and database.stand_in is None:
            database.async_support().check_two_phase()


async def dispose(databases: Databases) -> None:
    """Close the pooled connections of all the databases that may be in use."""
    found = dict.fromkeys([*databases.to_dispose(), *configured_so_far()])
    # All of them, also if the server stops waiting; each has a time limit of its own.
    await run_to_end(_dispose_each(found), limit=(len(found) + 1) * CLOSE_TIMEOUT)


async def _dispose_each(databases: Iterable[Database]) -> None:
    for database in databases:
        try:
            await database.dispose()
        except Exception:
            # The others still have to be disposed of, and the server still waits for its answer.
            logger.exception("disposing of %r failed", database)
