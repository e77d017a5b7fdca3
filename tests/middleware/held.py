"""A database whose COMMIT waits until the test lets it go on."""

import asyncio
import sqlite3
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing
from typing import Any

from repom import Database
from tests.middleware.notes import notes_database
from tests.support.reader import ask, connect, execute, is_postgres

PATIENCE = 10.0  # seconds until COMMIT must have been reached, or is let go on by itself

_HOLD = """
CREATE FUNCTION hold() RETURNS trigger LANGUAGE plpgsql AS
  $$ BEGIN PERFORM pg_advisory_xact_lock_shared(1); RETURN NULL; END $$;
-- Deferred triggers run by name: this one before the check of the foreign key, "RI_...".
CREATE CONSTRAINT TRIGGER "A hold" AFTER INSERT ON note
  DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION hold()
"""


class HeldCommit:
    """What the test sees of a COMMIT.

    Attributes:
        database: where it happens.
        release: lets COMMIT go on, this one and those that follow.
    """

    def __init__(
        self, database: Database, is_reached: Callable[[], bool], release: Callable[[], object]
    ) -> None:
        self.database = database
        self.release = release
        self._is_reached = is_reached

    async def reached(self) -> None:
        """Wait until a COMMIT is in flight."""
        end = time.monotonic() + PATIENCE
        while not self._is_reached():
            if time.monotonic() > end:
                raise TimeoutError(f"nobody has committed for {PATIENCE} s")
            await asyncio.sleep(0.001)


@asynccontextmanager
async def held_commit(url: str) -> AsyncIterator[HeldCommit]:
    """A database of notes, on PostgreSQL or SQLite, whose COMMIT of a new note is held."""
    make = _held_by_postgres if is_postgres(url) else _held_by_sqlite
    async with make(url) as held:
        try:
            yield held
        finally:
            held.release()


@asynccontextmanager
async def _held_by_postgres(url: str) -> AsyncIterator[HeldCommit]:
    async with notes_database(url) as database:
        execute(url, _HOLD)
        with closing(connect(url)) as connection:
            ask(connection, "SELECT pg_advisory_lock(1)")
            waiting = (
                "SELECT 1 FROM pg_locks JOIN pg_database d ON d.oid = database"
                " WHERE datname = current_database() AND locktype = 'advisory' AND NOT granted"
            )
            yield HeldCommit(
                database,
                lambda: bool(ask(connection, waiting)),
                lambda: ask(connection, "SELECT pg_advisory_unlock_all()"),
            )


@asynccontextmanager
async def _held_by_sqlite(url: str) -> AsyncIterator[HeldCommit]:
    reached, released = threading.Event(), threading.Event()

    class Held(sqlite3.Connection):
        def commit(self) -> None:
            reached.set()
            released.wait(PATIENCE)
            super().commit()

    kwargs: dict[str, Any] = {"connect_args": {"factory": Held}}
    async with notes_database(url, engine_kwargs=kwargs) as database:
        yield HeldCommit(database, reached.is_set, released.set)
