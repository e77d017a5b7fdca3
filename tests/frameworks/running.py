"""An application of the table, started, as a server would call it."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from repom import Database
from tests.frameworks.table import Framework
from tests.support.asgi import ASGIApp, Message, Receive, Scope, Send, lifespan

#: They raise when a server starts them, which servers take for "needs no start".
WITHOUT_LIFESPAN = {"Django"}


@asynccontextmanager
async def running(
    framework: Framework, database: Database, **options: Any
) -> AsyncIterator[ASGIApp]:
    """The framework's application, between its start and its end."""
    app = lowercasing(framework.make(database, **options))
    if framework.name in WITHOUT_LIFESPAN:
        yield app
    else:
        async with lifespan(app):
            yield app


def lowercasing(app: ASGIApp) -> ASGIApp:
    """`app`, with the names of its headers in lower case: Django's are not, and servers do that."""

    async def outermost(scope: Scope, receive: Receive, send: Send) -> None:
        async def lowercasing_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [(name.lower(), value) for name, value in message["headers"]]
            await send(message)

        await app(scope, receive, lowercasing_send)

    return outermost
