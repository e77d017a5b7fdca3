"""What the requests of these tests write: one table, and an application of one endpoint."""

from collections.abc import Callable
from typing import Any

from sqlalchemy import ForeignKey, MetaData, insert
from sqlalchemy.ext.asyncio import AsyncAttrs
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from repom import current_session, current_sync_session
from repom.database import Database
from repom.middleware import DatabaseSessionMiddleware
from tests.dialects.drivers import Driver
from tests.support.reader import execute, rows

#: The async drivers of the servers, as named in `tests.dialects.drivers`.
ASYNC_SERVERS = ("asyncpg", "psycopg", "aiomysql", "asyncmy")


class Base(AsyncAttrs, DeclarativeBase):
    metadata = MetaData()


class Entry(Base):
    __tablename__ = "entry"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    amount: Mapped[int] = mapped_column(default=0)
    ghosts: Mapped[list["Ghost"]] = relationship()


class Ghost(Base):
    """Its table is never created, so every query for it fails."""

    __tablename__ = "ghost"
    id: Mapped[int] = mapped_column(primary_key=True)
    entry_id: Mapped[int] = mapped_column(ForeignKey(Entry.id))


def prepare(url: str) -> None:
    execute(url, "CREATE TABLE entry (id INTEGER PRIMARY KEY, amount INTEGER NOT NULL)")
    execute(url, "INSERT INTO entry VALUES (1, 0)")


def written(url: str) -> set[int]:
    """The entries that a request has written, as they are committed."""
    return {id_ for (id_,) in rows(url, "SELECT id FROM entry WHERE id <> 1")}


def add(session: Session, id_: int = 2) -> None:
    session.execute(insert(Entry).values(id=id_))


def serve(database: Database, endpoint: Callable[[Request], Any], **options: Any) -> Starlette:
    """An application of one endpoint; one in a thread, if that is a `def`.

    Args:
        options: of the middleware.
    """
    app = Starlette(routes=[Route("/", endpoint, methods=["POST"])])
    app.add_middleware(DatabaseSessionMiddleware, database=database, **options)
    return app


def answering(
    driver: Driver, work: Callable[[Session], object], status: int = 201, **options: Any
) -> Starlette:
    """An application that does `work` with the session of the request, and then answers."""

    async def endpoint(request: Request) -> Response:
        await current_session().run_sync(work)
        return Response(status_code=status)

    def endpoint_in_thread(request: Request) -> Response:
        work(current_sync_session())
        return Response(status_code=status)

    return serve(driver.database, endpoint if driver.is_async else endpoint_in_thread, **options)
