"""What the tests of the middleware write, and how they see it from outside: one table of notes."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from sqlalchemy import Column, Integer, MetaData, String, Table, insert

from repom import Database, current_session, current_sync_session
from repom.config import reset_config
from repom.middleware import DatabaseSessionMiddleware
from repom.registry import forget_configured, get_database
from tests.support.asgi import ASGIApp, Message, Receive, Scope, Send
from tests.support.reader import execute, rows

NOTE = Table(
    "note",
    MetaData(),
    Column("id", Integer, primary_key=True),
    Column("text", String(100)),
    Column("parent", Integer),
)

#: No note has this id: one that names it as its parent is refused, by COMMIT.
NOWHERE = 4711


def create_notes(url: str) -> None:
    """Make the table; where the database can do that, a wrong parent is found at COMMIT."""
    key = {"sqlite": "INTEGER PRIMARY KEY", "postgresql": "SERIAL PRIMARY KEY"}
    kind = url.partition(":")[0]
    deferred = "" if kind == "mysql" else "REFERENCES note (id) DEFERRABLE INITIALLY DEFERRED"
    execute(
        url,
        f"CREATE TABLE note (id {key.get(kind, 'INTEGER PRIMARY KEY AUTO_INCREMENT')},"
        f" text VARCHAR(100) UNIQUE, parent INTEGER {deferred})",
    )


@asynccontextmanager
async def notes_database(url: str, **kwargs: Any) -> AsyncIterator[Database]:
    """A `Database` at `url` with an empty table of notes."""
    create_notes(url)
    database = Database(url, **kwargs)
    try:
        yield database
    finally:
        await database.dispose()


@asynccontextmanager
async def configured_notes_database(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Database]:
    """The same, as the default database of the configuration."""
    create_notes(url)
    monkeypatch.delenv("CONFIG_HOOK", raising=False)
    monkeypatch.setenv("REPOM_DATABASE_URL", url)
    reset_config()
    forget_configured()
    try:
        yield get_database()
    finally:
        await get_database().dispose()
        reset_config()
        forget_configured()


def notes(url: str) -> list[str]:
    """The texts of the committed notes, asked on a connection of its own."""
    return [text for (text,) in rows(url, "SELECT text FROM note ORDER BY id")]


async def write(text: str, parent: int | None = None) -> None:
    """Write a note in the transaction of the request; COMMIT refuses it if `parent` is wrong."""
    await current_session().execute(insert(NOTE).values(text=text, parent=parent))


def write_sync(text: str, parent: int | None = None) -> None:
    """The sync twin of `write`, for `def` endpoints."""
    current_sync_session().execute(insert(NOTE).values(text=text, parent=parent))


def connections_in_use(database: Database) -> int:
    """How many connections of the running loop's pool are out of it."""
    checked_out: int = database.async_engine.pool.checkedout()  # type: ignore[attr-defined]
    return checked_out


# --- raw ASGI applications


def start(status: int = 200, *headers: tuple[bytes, bytes], **more: Any) -> Message:
    """The message that starts a response."""
    return {"type": "http.response.start", "status": status, "headers": list(headers), **more}


def chunk(body: bytes = b"", *, more: bool = False) -> Message:
    """A message of a body; the last one, unless there is more."""
    return {"type": "http.response.body", "body": body, "more_body": more}


async def answer(send: Send, status: int = 200) -> None:
    """Send a whole response, without a body."""
    await send(start(status))
    await send(chunk())


def responding(respond: Callable[[Send], Awaitable[object]]) -> ASGIApp:
    """An application that only has to know how to send."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await respond(send)

    return app


def serve(
    database: Database, respond: Callable[[Send], Awaitable[object]], **options: Any
) -> ASGIApp:
    """An application behind the middleware that only has to know how to send."""
    return DatabaseSessionMiddleware(responding(respond), database, **options)


class Sight:
    """What a client and a second connection see, at each message that reaches the wire."""

    def __init__(self, database: Database, url: str) -> None:
        self.seen: list[tuple[str, list[str], int]] = []
        self._database = database
        self._url = url

    def __call__(self, message: Message) -> None:
        kind = message["type"].rpartition(".")[2]
        self.seen.append((kind, notes(self._url), connections_in_use(self._database)))
