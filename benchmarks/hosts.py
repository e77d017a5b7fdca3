"""The two hosts of the endpoints: a bare ASGI application, and FastAPI."""

import json
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApp = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

Endpoint = Callable[..., Awaitable[dict[str, object]]]
OnShutdown = Callable[[], Awaitable[None]]


class Endpoints(NamedTuple):
    """One function for each case. Its parameter `key` comes from the path."""

    nothing: Endpoint
    select: Endpoint
    insert: Endpoint
    mixed: Endpoint
    service: Endpoint


#: The cases that write; the others are GET.
METHODS = {"insert": "POST", "mixed": "POST"}


async def _nothing() -> None:
    pass


def bare(endpoints: Endpoints, on_shutdown: OnShutdown = _nothing) -> ASGIApp:
    """The least that can be called an application: `/select/7` calls `endpoints.select(7)`."""
    routes = endpoints._asdict()

    async def app(scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await receive()
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await on_shutdown()
            await send({"type": "lifespan.shutdown.complete"})
            return
        _, name, key = scope["path"].split("/")
        body = json.dumps(await routes[name](int(key))).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(body)),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    return app


def fastapi(endpoints: Endpoints, on_shutdown: OnShutdown = _nothing, lifespan: Any = None) -> Any:
    """The same paths as a FastAPI application; `lifespan` is one that a contender brings."""
    from fastapi import FastAPI

    @asynccontextmanager
    async def live(app: FastAPI) -> AsyncIterator[None]:
        yield
        await on_shutdown()

    app = FastAPI(lifespan=lifespan or live)
    for name, endpoint in endpoints._asdict().items():
        app.add_api_route(f"/{name}/{{key}}", endpoint, methods=[METHODS.get(name, "GET")])
    return app
