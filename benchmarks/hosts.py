"""The two hosts of the endpoints: a bare ASGI application, and FastAPI."""

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, NamedTuple

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApp = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

Endpoint = Callable[..., Awaitable[dict[str, object]]]


class Endpoints(NamedTuple):
    """One function for each case. Its parameter `key` comes from the path."""

    nothing: Endpoint
    select: Endpoint
    insert: Endpoint
    mixed: Endpoint
    service: Endpoint


#: The cases that write; the others are GET.
METHODS = {"insert": "POST", "mixed": "POST"}


def bare(endpoints: Endpoints) -> ASGIApp:
    """The least that can be called an application: `/select/7` calls `endpoints.select(7)`."""
    routes = endpoints._asdict()

    async def app(scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _live(receive, send)
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


async def _live(receive: Receive, send: Send) -> None:
    await receive()
    await send({"type": "lifespan.startup.complete"})
    await receive()
    await send({"type": "lifespan.shutdown.complete"})


def fastapi(endpoints: Endpoints, **options: Any) -> Any:
    """The same paths as a FastAPI application; `options` are the class's own."""
    from fastapi import FastAPI

    app = FastAPI(**options)
    for name, endpoint in endpoints._asdict().items():
        app.add_api_route(f"/{name}/{{key}}", endpoint, methods=[METHODS.get(name, "GET")])
    return app
