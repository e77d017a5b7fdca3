"""What is special to Django: sync and async code in one request, its middlewares and test clients.

The site is that of tests/frameworks/apps/django.py: a process has one. What Django shares with
other frameworks is in tests/frameworks/test_table.py.
"""

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
from asgiref.sync import async_to_sync, sync_to_async
from django.core.asgi import get_asgi_application
from django.http import HttpRequest, HttpResponse
from django.test import AsyncClient, Client, override_settings
from django.urls import path, reverse
from sqlalchemy.exc import IntegrityError

from repom import Database
from repom.errors import MixedSessionsError, NoScopeError
from repom.middleware import DatabaseSessionMiddleware
from tests.frameworks import work
from tests.frameworks.apps import django as site
from tests.frameworks.running import lowercasing
from tests.middleware.notes import connections_in_use, notes, write, write_sync
from tests.support.asgi import Response, request

HOOK = "repom.middleware.django.RaiseFailedCommit"
URLS = "urls_of_a_test"
View = Callable[[HttpRequest], Any]


@pytest.fixture
def urls(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module that stands for the URLs of a site; the test puts into it what it needs."""
    module = ModuleType(URLS)
    monkeypatch.setitem(sys.modules, URLS, module)
    return module


async def post(
    urls: Any, database: Database, view: View, middleware: list[str] | None = None
) -> Response:
    """What a site of one view answers."""
    urls.urlpatterns = [path("", view, name="index")]
    urls.Errors = site.Errors
    with override_settings(
        ROOT_URLCONF=URLS,
        MIDDLEWARE=[f"{URLS}.Errors", HOOK] if middleware is None else middleware,
    ):
        app = lowercasing(DatabaseSessionMiddleware(get_asgi_application(), database))
        response = await request(app, "POST")
    assert connections_in_use(database) == 0
    return response


# --- sync and async code


async def test_async_code_below_a_sync_view(
    urls: Any, database: Database, database_url: str
) -> None:
    """`async_to_sync()` runs it on the request's loop, where it has the request's session."""

    def view(request: HttpRequest) -> HttpResponse:
        async_to_sync(work.create)()
        return HttpResponse(status=201)

    assert (await post(urls, database, view)).status == 201
    assert notes(database_url) == ["a"]


async def test_sync_code_below_an_async_view(
    urls: Any, database: Database, database_url: str
) -> None:
    """`sync_to_async()` takes the context along, in both of its modes."""

    async def view(request: HttpRequest) -> HttpResponse:
        await sync_to_async(write_sync)("a")
        await sync_to_async(write_sync, thread_sensitive=False)("b")
        return HttpResponse(status=201)

    assert (await post(urls, database, view)).status == 201
    assert notes(database_url) == ["a", "b"]
    assert database.engine.pool.checkedout() == 0  # type: ignore[attr-defined]


async def test_both_sessions_in_one_request(
    urls: Any, database: Database, database_url: str
) -> None:
    """Two connections cannot share one transaction: an error says so, and nothing is written."""
    errors: list[Exception] = []

    def view(request: HttpRequest) -> HttpResponse:
        write_sync("a")
        try:
            async_to_sync(write)("b")
        except MixedSessionsError as error:
            errors.append(error)
            raise
        return HttpResponse(status=201)

    assert (await post(urls, database, view)).status == 500
    assert len(errors) == 1
    assert notes(database_url) == []


# --- a failed COMMIT


async def orphan(request: HttpRequest) -> HttpResponse:
    await work.create_orphan()
    return HttpResponse(status=201)


async def test_handler500_answers_for_what_no_middleware_does(
    urls: Any, deferring: Database
) -> None:
    """It is the one of the site's own URLs."""
    urls.handler500 = site.handler500
    response = await post(urls, deferring, orphan, [HOOK])
    assert (response.status, response.body, response.exception) == (500, b"of the site", None)


async def test_without_the_middleware(urls: Any, deferring: Database, deferring_url: str) -> None:
    """Django does not handle what its `send` raises: the failure leaves, nothing is sent."""
    response = await post(urls, deferring, orphan, [f"{URLS}.Errors"])
    assert isinstance(response.exception, IntegrityError)
    assert response.sent == []
    assert notes(deferring_url) == []


@pytest.mark.parametrize("view_is_sync", [False, True], ids=["async", "sync"])
async def test_error_handling_finds_the_urls_of_the_site(
    urls: Any, deferring: Database, view_is_sync: bool
) -> None:
    """`reverse()` and `request.urlconf` are as they are for the errors of views."""

    class Errors(site.Errors):
        def process_exception(self, request: HttpRequest, error: Exception) -> HttpResponse:
            urlconf = getattr(request, "urlconf", None)
            return HttpResponse(f"{reverse('index')} {urlconf}".encode(), status=409)

    def sync_orphan(request: HttpRequest) -> HttpResponse:
        work.create_orphan_sync()
        return HttpResponse(status=201)

    urls.Own = Errors
    view = sync_orphan if view_is_sync else orphan
    response = await post(urls, deferring, view, [f"{URLS}.Own", HOOK])
    assert (response.status, response.body) == (409, b"/ None")


async def test_urls_that_another_middleware_has_chosen(urls: Any, deferring: Database) -> None:
    """As one for several hosts does; the error handling finds those."""
    chosen: Any = ModuleType("chosen_urls")
    chosen.handler500 = lambda request: HttpResponse(b"chosen", status=500)
    chosen.urlpatterns = [path("", orphan)]

    class Choose:
        def __init__(self, get_response: View) -> None:
            self.get_response = get_response

        def __call__(self, request: Any) -> Any:
            request.urlconf = chosen
            return self.get_response(request)

    urls.Choose = Choose
    response = await post(urls, deferring, orphan, [f"{URLS}.Choose", HOOK])
    assert (response.status, response.body) == (500, b"chosen")


# --- Django's own test clients, which know no ASGI middleware


async def test_async_client(urls: Any) -> None:
    """There is no request of repom's around the view, which says so; the hook disturbs nothing."""
    found: list[Exception] = []

    async def view(request: HttpRequest) -> HttpResponse:
        with pytest.raises(NoScopeError) as error:
            await work.create()
        found.append(error.value)
        return HttpResponse(b"seen")

    urls.urlpatterns = [path("", view)]
    with override_settings(ROOT_URLCONF=URLS, MIDDLEWARE=[HOOK]):
        response = await AsyncClient().post("/")
    assert (response.content, len(found)) == (b"seen", 1)


def test_sync_client(urls: Any) -> None:
    """The same by WSGI."""

    def view(request: HttpRequest) -> HttpResponse:
        return HttpResponse(b"seen")

    urls.urlpatterns = [path("", view)]
    with override_settings(ROOT_URLCONF=URLS, MIDDLEWARE=[HOOK]):
        response: Any = Client().post("/")
    assert response.content == b"seen"
