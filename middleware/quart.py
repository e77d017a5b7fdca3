"""Quart: its error handlers answer for a COMMIT that failed.

    app.asgi_app = DatabaseSessionMiddleware(app.asgi_app)
    app.before_request(raise_failed_commit)

What `before_request` functions raise goes to the handlers of `app.errorhandler`. Those functions
run once more for the failure: the ones that were added before this one do, those after it do not.
"""

from __future__ import annotations

from quart import request

from repom.middleware import failed_commit
from repom.middleware.versions import refuse_old

refuse_old("quart")


async def raise_failed_commit() -> None:
    """Raise what COMMIT raised, when Quart is called for it."""
    failed_commit.raise_for(request.scope)
