"""Django: its own error handling answers for a COMMIT that failed.

    MIDDLEWARE = [..., "repom.middleware.django.RaiseFailedCommit"]     # the last one
    application = DatabaseSessionMiddleware(get_asgi_application())

It is raised as if by the view, as with `ATOMIC_REQUESTS`: the `process_exception` of the other
middlewares is asked, then `handler500`. The middlewares run once more for that.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from asgiref.sync import markcoroutinefunction
from django.core.handlers.asgi import ASGIRequest
from django.http import HttpRequest, HttpResponseBase
from django.urls import re_path, set_urlconf

from repom.middleware import failed_commit
from repom.middleware.versions import refuse_old

refuse_old("django")


class RaiseFailedCommit:
    """A middleware that raises what COMMIT raised, when Django is called for it."""

    async_capable = True
    sync_capable = False

    def __init__(self, get_response: Callable[[HttpRequest], Awaitable[HttpResponseBase]]) -> None:
        self.get_response = get_response
        markcoroutinefunction(self)

    async def __call__(self, request: HttpRequest) -> HttpResponseBase:
        # Django's own test client makes requests without ASGI.
        if isinstance(request, ASGIRequest) and failed_commit.is_second_call(request.scope):
            return await self._raise_in_a_view(request)
        return await self.get_response(request)

    async def _raise_in_a_view(self, request: Any) -> HttpResponseBase:
        # `process_exception` is asked only about what a view raises.
        request.urlconf_of_the_site = getattr(request, "urlconf", None)
        request.urlconf = _EVERY_PATH
        return await self.get_response(request)


async def _raise_failed_commit(request: Any) -> None:
    """The view. Who handles the error finds the URLs of the site again."""
    request.urlconf = request.urlconf_of_the_site
    set_urlconf(request.urlconf)
    failed_commit.raise_for(request.scope)


#: One object, and hashable: Django keeps a resolver for each.
_EVERY_PATH = (re_path("", _raise_failed_commit),)
