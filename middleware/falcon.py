"""Falcon: its error handlers answer for a COMMIT that failed.

    app = falcon.asgi.App(middleware=[RaiseFailedCommit()])
    asgi_app = DatabaseSessionMiddleware(app)

What `process_request` methods raise goes to the handlers of `app.add_error_handler`. Those of the
components before this one run once more for the failure.
"""

from __future__ import annotations

from falcon.asgi import Request, Response

from repom.middleware import failed_commit
from repom.middleware.versions import refuse_old

refuse_old("falcon")


class RaiseFailedCommit:
    """A component that raises what COMMIT raised, when Falcon is called for it."""

    async def process_request(self, req: Request, resp: Response) -> None:
        """Called before routing."""
        failed_commit.raise_for(req.scope)
