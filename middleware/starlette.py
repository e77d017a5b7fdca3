"""Starlette and FastAPI: their exception handlers answer for a COMMIT that failed.

`ExceptionMiddleware` publishes its handlers in the ASGI scope as
`scope["starlette.exception_handlers"]`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from inspect import iscoroutinefunction
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from repom.middleware.policy import Message, Scope


async def handle(
    failure: Exception,
    asgi_scope: Scope,
    receive: Callable[[], Awaitable[Message]],
    send: Callable[[Message], Awaitable[None]],
) -> None:
    """Let the handler registered for `failure` answer; do nothing if there is none.

    Args:
        failure: what COMMIT raised.
        asgi_scope: the request, with the handlers in it.
        receive: of the request.
        send: refuses a response that would not tell of an error.

    Raises:
        Exception: what the handler, or sending its response, raised.
    """
    handlers, _ = asgi_scope["starlette.exception_handlers"]
    handler = _look_up(handlers, failure)
    if handler is None:
        return
    request = Request(asgi_scope, receive, send)
    if iscoroutinefunction(handler):
        response: Response | None = await handler(request, failure)
    else:
        response = await run_in_threadpool(handler, request, failure)
    if response is not None:
        await response(asgi_scope, receive, send)


def _look_up(handlers: Mapping[Any, Any], failure: Exception) -> Any:
    for kind in type(failure).__mro__:
        if kind in handlers:
            return handlers[kind]
    return None
