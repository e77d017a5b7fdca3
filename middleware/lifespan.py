"""The start and the end of the application."""

from __future__ import annotations

import logging

from repom.errors import ConfigurationError
from repom.middleware.exchange import ASGIApp, Receive, Send
from repom.middleware.policy import Message, Scope
from repom.registry import Databases, configured_so_far

logger = logging.getLogger("repom.middleware")


async def run_lifespan(
    app: ASGIApp, databases: Databases, asgi_scope: Scope, receive: Receive, send: Send
) -> None:
    """Let the app start and stop; check the databases before, and dispose of them after it.

    What is wrong with the configuration is known now, so it stops the start: said by
    `lifespan.startup.failed`, since servers take an exception for an app without lifespan.
    """
    started = False

    async def checking_receive() -> Message:
        nonlocal started
        message = await receive()
        if message["type"] == "lifespan.startup" and not started:
            started = True
            try:
                check(databases)
            except ConfigurationError as error:
                await send({"type": "lifespan.startup.failed", "message": str(error)})
                raise
        return message

    async def disposing_send(message: Message) -> None:
        if message["type"] in ("lifespan.shutdown.complete", "lifespan.shutdown.failed"):
            await dispose(databases)
        await send(message)

    try:
        await app(asgi_scope, checking_receive, disposing_send)
    finally:
        await dispose(databases)  # again costs nothing, and an app may have raised


def check(databases: Databases) -> None:
    """Raise what the first request would: unusable URL, missing driver, unwritable file."""
    for _, database in databases.items() or [("default", databases["default"])]:
        database.check()


async def dispose(databases: Databases) -> None:
    """Close the pooled connections of all the databases that may be in use."""
    given = [database for _, database in databases.items()]
    for database in dict.fromkeys([*given, *configured_so_far()]):
        try:
            await database.dispose()
        except Exception:
            # The others still have to be disposed of, and the server still waits for its answer.
            logger.exception("disposing of %r failed", database)
