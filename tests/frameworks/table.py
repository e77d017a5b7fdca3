"""The table of docs/frameworks.md. Each cell has a test; see `tests.frameworks.test_table`."""

from dataclasses import dataclass, fields
from importlib import import_module
from typing import Any

from repom import Database
from tests.support.asgi import ASGIApp

NO = "-"


@dataclass(frozen=True)
class Framework:
    """A row: how its users do, in the framework's own words, what the column is about.

    A cell is what the application in `tests/frameworks/apps` really uses, or `NO`.
    """

    name: str
    install: str
    commit: str
    rollback: str
    failed_commit: str
    sync_code: str
    background: str
    websocket: str
    streaming: str

    @property
    def module(self) -> str:
        """Of its application, and the name under which it is installed."""
        return self.name.lower()

    def make(self, database: Database, **options: Any) -> ASGIApp:
        """Its application, behind the middleware, which has these options."""
        module = import_module(f"tests.frameworks.apps.{self.module}")
        app: ASGIApp = module.make(database, **options)
        return app

    def __str__(self) -> str:
        return "| " + " | ".join(getattr(self, field.name) for field in fields(self)) + " |"


SCOPE = "`session_scope()`"

TABLE = [
    Framework(
        name="Starlette",
        install="`add_middleware()`",
        commit="✓",
        rollback="`HTTPException`, `exception_handlers`",
        failed_commit="`exception_handlers`",
        sync_code="`def`",
        background="`BackgroundTask`",
        websocket=SCOPE,
        streaming="`StreamingResponse`",
    ),
    Framework(
        name="FastAPI",
        install="`add_middleware()`",
        commit="✓",
        rollback="`HTTPException`, `exception_handler()`",
        failed_commit="`exception_handler()`",
        sync_code="`def`",
        background="`BackgroundTasks`",
        websocket=SCOPE,
        streaming="`StreamingResponse`",
    ),
    Framework(
        name="Litestar",
        install="`DefineMiddleware`",
        commit="✓",
        rollback="`PermissionDeniedException`, `exception_handlers`",
        failed_commit="`exception_handlers`",
        sync_code="`sync_to_thread=True`",
        background="`BackgroundTask`",
        websocket=SCOPE,
        streaming="`Stream`",
    ),
    Framework(
        name="Quart",
        install="`app.asgi_app`",
        commit="✓",
        rollback="`abort()`, `errorhandler()`",
        failed_commit="`errorhandler()`",
        sync_code="`def`",
        background=f"`add_background_task()`, {SCOPE}",
        websocket=SCOPE,
        streaming="`AsyncIterator`",
    ),
    Framework(
        name="Falcon",
        install="`DatabaseSessionMiddleware()`",
        commit="✓",
        rollback="`HTTPForbidden`, `add_error_handler()`",
        failed_commit="`add_error_handler()`",
        sync_code="`asyncio.to_thread()`",
        background=f"`resp.schedule()`, {SCOPE}",
        websocket=SCOPE,
        streaming="`resp.stream`",
    ),
    Framework(
        name="Django",
        install="`DatabaseSessionMiddleware()`",
        commit="✓",
        rollback="`PermissionDenied`, `process_exception`, `handler500`",
        failed_commit="`process_exception`, `handler500`",
        sync_code="`def`",
        background=f"`create_task()`, {SCOPE}",
        websocket=NO,
        streaming="`StreamingHttpResponse`",
    ),
    Framework(
        name="BlackSheep",
        install="`DatabaseSessionMiddleware()`",
        commit="✓",
        rollback="`Forbidden`, `exceptions_handlers`",
        failed_commit="`exceptions_handlers`",
        sync_code="`asyncio.to_thread()`",
        background=f"`create_task()`, {SCOPE}",
        websocket=SCOPE,
        streaming="`StreamedContent`",
    ),
    Framework(
        name="Sanic",
        install="`DatabaseSessionMiddleware()`",
        commit="✓",
        rollback="`Forbidden`, `exception()`",
        failed_commit="`exception()`",
        sync_code="`asyncio.to_thread()`",
        background=f"`add_task()`, {SCOPE}",
        websocket=SCOPE,
        streaming="`respond()`",
    ),
]

#: The columns after the name.
COLUMNS = [field.name for field in fields(Framework)][1:]
