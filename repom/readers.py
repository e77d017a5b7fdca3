"""The replicas that a database is read from: which one is next, and who asks how they are doing.

Nobody watches them in the background. The unit of work that finds a reader unchecked for a while
asks it, one at a time; the others go by what is known meanwhile, and without that to the writer.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import threading
import time
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from sqlalchemy import Engine, event
from sqlalchemy.util.concurrency import in_greenlet

from repom.errors import ConfigurationError
from repom.own_writes import OwnWrites
from repom.reader import CHECK_EVERY, Lag, Reader
from repom.replication import ALIVE, ask, ask_async, replication_of, wait_for_cluster

if TYPE_CHECKING:
    from repom.database import Database

logger = logging.getLogger("repom")


class Readers:
    """The replicas of one database.

    Args:
        writer: that database.
        databases: the replicas, one object each.
        max_lag: seconds that one may be behind.

    Attributes:
        all: these.
        key: names the database in the token of a client, without telling anything of it.
        window: seconds after which what was written is on every reader that is fit.
    """

    def __init__(
        self,
        writer: Database[Any, Any],
        databases: Sequence[Database[Any, Any]],
        *,
        max_lag: float,
    ) -> None:
        self.all = [Reader(database) for database in databases]
        for reader in self.all:
            reader.database.on_engine = self._made_engine
        url = writer.url.set(password=None, username=None, query={})
        self.key = hashlib.sha256(str(url).encode()).hexdigest()[:8]
        self.window = max_lag + 4 * CHECK_EVERY
        self._writer = writer
        self._replication = replication_of(writer.url)
        self._lag = Lag(max_lag)
        self._turns = 0
        self._mutex = threading.Lock()

    def __repr__(self) -> str:
        return f"<Readers {self.all}>"

    # --- choosing

    def choose(self, own: OwnWrites | None, *, is_async: bool) -> Reader | None:
        """The reader for a unit of work; None for the writer. Whoever gets one calls `left`.

        Args:
            own: what the reader must have.
            is_async: whether it is one of an async session.
        """
        may_ask = in_greenlet() or not is_async
        if may_ask:
            self._ask_those_due(is_async)
        position = own.positions.get(self.key, 0) if own is not None else 0
        needs_writer = own is not None and own.needs_writer(self.key)
        for reader in self._usable():
            if not reader.is_causal:
                if needs_writer:
                    continue
                if reader.replayed < position and may_ask:
                    self._ask(reader, is_async)
                if reader.replayed < position or not reader.is_fit:
                    continue
            with self._mutex:
                reader.in_flight += 1
                self._turns += 1
                reader.turn = self._turns
            return reader
        return None

    def left(self, reader: Reader) -> None:
        """A unit of work has ended that was reading from `reader`."""
        with self._mutex:
            reader.in_flight -= 1

    def _usable(self) -> list[Reader]:
        now = time.monotonic()
        usable = [reader for reader in self.all if reader.is_usable(now)]
        # Of those with the same load the one that has waited longest.
        return sorted(usable, key=lambda reader: (reader.in_flight, reader.turn))

    # --- asking

    def _ask_those_due(self, is_async: bool) -> None:
        now = time.monotonic()
        if not any(reader.is_due(now) for reader in self.all):
            return
        with self._mutex:
            due = [reader for reader in self.all if reader.is_due(now)]
            for reader in due:
                reader.is_being_asked = True
        try:
            # First, so that a reader that has everything has at least this.
            self._note_position(is_async)
            for reader in due:
                self._ask(reader, is_async)
        finally:
            for reader in due:
                reader.is_being_asked = False

    def _note_position(self, is_async: bool) -> None:
        if self._replication is None:
            return
        try:
            position = ask(self._writer, self._replication.flushed, is_async=is_async)
        except Exception:
            # The readers go on without it, by what is known.
            logger.debug("%r does not tell its position", self._writer, exc_info=True)
        else:
            self._lag.note(time.monotonic(), position)

    def _ask(self, reader: Reader, is_async: bool) -> None:
        question = self._replication.replayed if self._replication is not None else ALIVE
        try:
            answer = ask(reader.database, question, is_async=is_async)
        except Exception as error:
            reader.failed(time.monotonic(), error)
        else:
            now = time.monotonic()
            replayed = answer or 0 if self._replication is not None else 0
            reader.answered(now, replayed, self._lag.required(now))

    async def position(self) -> int | None:
        """A position behind all that was committed before; None if the writer does not tell."""
        replication = self._replication
        if replication is None:
            return None
        try:
            if self._writer_is_async:
                position: int = await ask_async(self._writer, replication.written)
            else:
                position = await asyncio.to_thread(
                    ask, self._writer, replication.written, is_async=False
                )
        except Exception:
            logger.warning(
                "%r has not told the position of what was committed; its client reads from it "
                "for %g s.",
                self._writer,
                self.window,
                exc_info=True,
            )
            return None
        return position

    @cached_property
    def _writer_is_async(self) -> bool:
        try:
            self._writer.async_support()
        except ConfigurationError:
            return False
        return True

    # --- engines

    def _made_engine(self, database: Database[Any, Any], engine: Engine) -> None:
        if database.url.get_backend_name() in ("mysql", "mariadb"):
            reader = next(reader for reader in self.all if reader.database is database)

            def connected(dbapi_connection: Any, record: Any) -> None:
                reader.is_causal = wait_for_cluster(dbapi_connection)

            event.listen(engine, "connect", connected)
        if self._writer.on_engine is not None:
            self._writer.on_engine(self._writer, engine)
