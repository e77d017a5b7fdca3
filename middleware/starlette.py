"""Starlette and FastAPI: their exception handlers answer for a COMMIT that failed.

`ExceptionMiddleware` publishes its handlers in the ASGI scope as
`scope["starlette.exception_handlers"]`.
"""

from __future__ import annotations

from typing import NoReturn

from starlette.middleware.exceptions import ExceptionMiddleware

from repom.middleware.failed_commit import RaiseError
from repom.middleware.policy import Receive, Scope, Send


async def answer(raise_error: RaiseError, asgi_scope: Scope, receive: Receive, send: Send) -> None:
    """See `repom.middleware.failed_commit.answer`."""

    async def failing_app(asgi_scope: Scope, receive: Receive, send: Send) -> NoReturn:
        raise_error()

    for_errors, for_statuses = asgi_scope["starlette.exception_handlers"]
    # Starlette's own way to find and to call a handler.
    handling = ExceptionMiddleware(failing_app, handlers={**for_errors, **for_statuses})
    await handling(asgi_scope, receive, send)
