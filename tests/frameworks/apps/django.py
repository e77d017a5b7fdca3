"""Django, its core without channels. A process has one Django, so this module is all of it."""

from collections.abc import Callable
from typing import Any

import django
from django.conf import settings
from django.core.asgi import get_asgi_application
from django.core.exceptions import PermissionDenied
from django.http import HttpRequest, HttpResponse, JsonResponse, StreamingHttpResponse
from django.urls import path
from sqlalchemy.exc import IntegrityError

from repom import Database
from repom.middleware import DatabaseSessionMiddleware
from tests.frameworks import work

if not settings.configured:
    settings.configure(
        ROOT_URLCONF=__name__,
        ALLOWED_HOSTS=["*"],
        MIDDLEWARE=[f"{__name__}.Errors", "repom.middleware.django.RaiseFailedCommit"],
        LOGGING_CONFIG=None,
    )
    django.setup()


async def created(request: HttpRequest) -> HttpResponse:
    await work.create()
    return HttpResponse(status=201)


async def posted(request: HttpRequest) -> HttpResponse:
    await work.create(request.body.decode())
    return HttpResponse(status=201)


async def returned(request: HttpRequest) -> HttpResponse:
    await work.create()
    return HttpResponse(status=404)


async def raised(request: HttpRequest) -> HttpResponse:
    await work.create()
    raise PermissionDenied


async def handled(request: HttpRequest) -> HttpResponse:
    await work.create()
    raise work.Refused


async def crash(request: HttpRequest) -> HttpResponse:
    await work.create()
    raise work.Unforeseen


async def refused(request: HttpRequest) -> HttpResponse:
    await work.create_orphan()
    return HttpResponse(status=201)


async def doomed(request: HttpRequest) -> HttpResponse:
    await work.create_doomed()
    return HttpResponse(status=201)


def sync(request: HttpRequest) -> HttpResponse:
    work.create_sync()
    return HttpResponse(status=201)


def sync_refused(request: HttpRequest) -> HttpResponse:
    work.create_orphan_sync()
    return HttpResponse(status=201)


async def background(request: HttpRequest) -> HttpResponse:
    await work.create()
    work.start(work.later_on_its_own)
    return HttpResponse(status=201)


async def stream(request: HttpRequest) -> StreamingHttpResponse:
    return StreamingHttpResponse(work.body())


async def stream_broken(request: HttpRequest) -> StreamingHttpResponse:
    return StreamingHttpResponse(work.broken_body())


async def stream_refused(request: HttpRequest) -> StreamingHttpResponse:
    return StreamingHttpResponse(work.refused_body())


async def export(request: HttpRequest) -> StreamingHttpResponse:
    return StreamingHttpResponse(work.export(await work.cursor()))


class Errors:
    """A middleware of the old kind, which runs in a thread."""

    def __init__(self, get_response: Callable[[HttpRequest], HttpResponse]) -> None:
        self.get_response = get_response

    def __call__(self, request: HttpRequest) -> HttpResponse:
        return self.get_response(request)

    def process_exception(self, request: HttpRequest, error: Exception) -> HttpResponse | None:
        if isinstance(error, work.Refused):
            return JsonResponse({"detail": type(error).__name__}, status=422)
        if isinstance(error, IntegrityError):
            return JsonResponse({"detail": type(error).__name__}, status=409)
        return None


def handler500(request: HttpRequest) -> HttpResponse:
    return HttpResponse(b"of the site", status=500)


urlpatterns: list[Any] = [
    path(endpoint.__name__.replace("_", "-"), endpoint)
    for endpoint in (
        *(created, returned, raised, handled, crash, refused, doomed, sync, sync_refused),
        *(posted, background, stream, stream_broken, stream_refused, export),
    )
]


def make(database: Database, **options: Any) -> DatabaseSessionMiddleware:
    return DatabaseSessionMiddleware(get_asgi_application(), database, **options)
