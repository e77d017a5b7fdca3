"""What the tests of several tasks in one request share: an application, and one connection."""

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncAttrs
from sqlalchemy.orm import DeclarativeBase, Mapped

from repom import Database, current_session
from repom.middleware import DatabaseSessionMiddleware
from tests.middleware.notes import NOTE
from tests.support.asgi import request

ONE_CONNECTION: dict[str, Any] = {"pool_size": 1, "max_overflow": 0, "pool_timeout": 5}


class Base(AsyncAttrs, DeclarativeBase):
    pass


class Note(Base):
    __table__ = NOTE
    text: Mapped[str]


def app_of(database: Any, *endpoints: Callable[..., Any], **options: Any) -> FastAPI:
    """An application that answers `POST /<name of the endpoint>` with 201."""
    app = FastAPI()
    app.add_middleware(DatabaseSessionMiddleware, database, **options)
    for endpoint in endpoints:
        app.post(f"/{endpoint.__name__}", status_code=201)(endpoint)
    return app


async def post(app: FastAPI, endpoint: str, status: int = 201) -> BaseException | None:
    """Send a request, and return what has left the application."""
    response = await request(app, "POST", f"/{endpoint}")
    assert response.status == status, repr(response.exception)
    return response.exception


SLOW = {
    "sqlite": (
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT 100000)"
        " SELECT count(*) FROM n"
    ),
    "postgresql": "SELECT pg_sleep(0.1)",
    "mysql": "SELECT sleep(0.1)",
}


async def wait_in_the_database(database: Database) -> None:
    await current_session().execute(text(SLOW[database.url.get_backend_name()]))
