"""The ASGI layer of repom.

from repom.middleware import DatabaseSessionMiddleware

app.add_middleware(DatabaseSessionMiddleware)
"""

from repom.middleware.policy import commits_on_2xx, commits_on_success, safe_methods
from repom.middleware.session import DatabaseSessionMiddleware

__all__ = ["DatabaseSessionMiddleware", "commits_on_2xx", "commits_on_success", "safe_methods"]
