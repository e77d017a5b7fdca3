"""Litestar: the session as a dependency, and its exception handlers for a COMMIT that failed.

app = Litestar(
    [create_article],
    middleware=[DefineMiddleware(DatabaseSessionMiddleware)],
    dependencies={"session": Provide(provide_session)},
)
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from typing import Any

from litestar import Litestar, Request, Response
from litestar.exceptions import HTTPException
from litestar.exceptions.responses import create_exception_response
from litestar.status_codes import HTTP_500_INTERNAL_SERVER_ERROR
from litestar.types import ExceptionHandlersMap
from litestar.utils.scope.state import ScopeState
from sqlalchemy.ext.asyncio import AsyncSession

from repom.async_session import get_async_db_session
from repom.middleware.failed_commit import RaiseError
from repom.middleware.repeatable import copied
from repom.middleware.versions import refuse_old

refuse_old("litestar")


async def provide_session() -> AsyncGenerator[AsyncSession, None]:
    """The session of the request; a real generator function, as Litestar's `Provide` wants it.

    It ends nothing in a request that the middleware serves. Without the middleware it commits
    before the response is sent, and rolls back when an exception was raised.
    """
    async with get_async_db_session() as session:
        yield session


async def answer(raise_error: RaiseError, asgi_scope: Any, receive: Any, send: Any) -> None:
    """See `repom.middleware.failed_commit.answer`.

    Litestar takes a response that it has tried to send for one that has started, so its own
    middleware for exceptions does not answer here.
    """
    app: Litestar = asgi_scope["litestar_app"]
    request: Request[Any, Any, Any] = app.request_class(asgi_scope, receive, send)
    try:
        raise_error()
    except Exception as error:
        for hook in app.after_exception:
            await hook(error, asgi_scope)
        handlers = asgi_scope["route_handler"].resolve_exception_handlers()
        response = _handler_for(error, handlers)(request, error)
    await response.to_asgi_response(app=None, request=request)(asgi_scope, receive, send)


def restoring(asgi_scope: Any) -> Callable[[], None]:
    """What gives Litestar's own state of the connection its present content back.

    See `repom.middleware.repeatable`. Its middlewares outside of ours have the object, so it has
    to stay the same one.
    """
    state = ScopeState.from_scope(asgi_scope)
    saved = {name: copied(getattr(state, name)) for name in ScopeState.__slots__}

    def restore() -> None:
        for name, value in saved.items():
            setattr(state, name, copied(value))

    return restore


def _handler_for(error: Exception, handlers: ExceptionHandlersMap) -> Callable[..., Response[Any]]:
    """The handler that Litestar would take: by status, by class, then the one for 500."""
    keys: list[Any] = [*type(error).__mro__, HTTP_500_INTERNAL_SERVER_ERROR]
    if isinstance(error, HTTPException):
        keys = [error.status_code, *type(error).__mro__]
    found = next((handlers[key] for key in keys if key in handlers), None)
    return found or create_exception_response
