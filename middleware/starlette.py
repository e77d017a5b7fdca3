"""Starlette and FastAPI: their exception handlers answer for a COMMIT that failed.

`ExceptionMiddleware` publishes its handlers in the ASGI scope as
`scope["starlette.exception_handlers"]`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from starlette.middleware.exceptions import ExceptionMiddleware

from repom.middleware.policy import Message, Scope


async def handle(
    failing_app: Callable[..., Awaitable[Any]],
    asgi_scope: Scope,
    receive: Callable[[], Awaitable[Message]],
    send: Callable[[Message], Awaitable[None]],
) -> None:
    """Let the handler registered for what `failing_app` raises answer.

    Args:
        failing_app: an ASGI app that raises what COMMIT raised.
        asgi_scope: the request, with the handlers in it.
        receive: of the request.
        send: refuses a response that would not tell of an error.

    Raises:
        Exception: what `failing_app` raised, if no handler is registered for it; what the
            handler, or sending its response, raised.
    """
    for_errors, for_statuses = asgi_scope["starlette.exception_handlers"]
    # Starlette's own way to find and to call a handler.
    handling = ExceptionMiddleware(failing_app, handlers={**for_errors, **for_statuses})
    await handling(asgi_scope, receive, send)
