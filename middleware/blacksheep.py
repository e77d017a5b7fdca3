"""BlackSheep: its exception handlers answer for a COMMIT that failed.

    app.middlewares.append(raise_failed_commit)
    asgi_app = DatabaseSessionMiddleware(app)

What middlewares raise goes to the handlers of `app.exception_handler`. Those before this one run
once more for the failure.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from blacksheep import Request, Response

from repom.middleware import failed_commit
from repom.middleware.versions import refuse_old

refuse_old("blacksheep")


async def raise_failed_commit(
    request: Request, handler: Callable[[Request], Awaitable[Response]]
) -> Response:
    """Raise what COMMIT raised, when BlackSheep is called for it."""
    failed_commit.raise_for(request.scope)
    return await handler(request)
