"""The replicas that a database is read from: which of them is fit, and which one is next.

Nobody watches them in the background. The unit of work that finds a reader unchecked for a while
asks it, one at a time; the others go by what is known meanwhile, and without that to the writer.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy import Engine, event
from sqlalchemy.util import await_only, greenlet_spawn
from sqlalchemy.util.concurrency import in_greenlet

from repom.errors import ConfigurationError
from repom.own_writes import OwnWrites
from repom.replication import IS_THERE, replication_of, wait_for_cluster
from repom.urls import safe

if TYPE_CHECKING:
    from repom.database import Database

logger = logging.getLogger("repom")

T = TypeVar("T")

#: Seconds after which a reader is asked again how it is doing, if it is wanted.
CHECK_EVERY = 1.0
#: Seconds after which one is that was found to be down, and that its answer may take.
RETRY_AFTER = 5.0
ANSWER_WITHIN = 2.0


class Reader:
    """One replica, and what is known of it.

    Attributes:
        database: it alone.
        in_flight: how many units of work are reading from it.
        turn: when it was chosen last, counted in choices.
        replayed: the position in the writer's log up to which it has everything, at least.
        is_fit: whether it can be read from, as far as is known.
        is_causal: whether it waits by itself for what was committed elsewhere.
        known_until: until when that is believed, in the time of `time.monotonic()`.
        is_being_asked: whether somebody does that just now.
        is_reported: whether the log says that it is left out.
    """

    def __init__(self, database: Database[Any, Any]) -> None:
        self.database = database
        self.in_flight = 0
        self.turn = 0
        self.replayed = 0
        self.is_fit = False
        self.is_causal = False
        self.known_until = 0.0
        self.next_check = 0.0
        self.is_being_asked = False
        self.is_reported = False

    def __repr__(self) -> str:
        state = "fit" if self.is_fit else "left out"
        return f"<Reader {safe(self.database.url)}: {state}, {self.in_flight} in flight>"


class Lag:
    """What the writer had written, and when; a reader without it is too far behind.

    Args:
        limit: seconds that a reader may be behind.
    """

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self._positions: deque[tuple[float, int]] = deque()

    def note(self, now: float, position: int) -> None:
        """The writer has got to `position`."""
        self._positions.append((now, position))

    def required(self, now: float) -> int:
        """What a reader must have by now.

        That is what was known of the writer `limit` seconds ago. If nobody has asked it for
        longer than that, then what is known by now: a bound that is not too kind.
        """
        earliest = now - self.limit - 2 * CHECK_EVERY
        while len(self._positions) > 1 and self._positions[0][0] < earliest:
            self._positions.popleft()
        return self._positions[0][1] if self._positions else 0


class Readers:
    """The replicas of one database.

    Args:
        writer: that database.
        databases: the replicas, one object each.
        max_lag: seconds that one may be behind.

    Attributes:
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
        self.window = max_lag + 4 * CHECK_EVERY
        url = writer.url.set(password=None, username=None, query={})
        self.key = hashlib.sha256(str(url).encode()).hexdigest()[:8]
        self._writer = writer
        self._replication = replication_of(writer.url)
        self._lag = Lag(max_lag)
        self._mutex = threading.Lock()
        self._turns = 0
        for reader in self.all:
            reader.database.on_engine = self._made_engine

    def __repr__(self) -> str:
        return f"<Readers {self.all}>"

    # --- choosing

    def choose(
        self, own: OwnWrites | None, tried: Iterable[Reader] = (), *, is_async: bool
    ) -> Reader | None:
        """The reader for a unit of work; None for the writer. Whoever gets one calls `left`.

        Args:
            own: what the reader must have.
            tried: those that could not be connected to.
            is_async: whether it is one of an async session.
        """
        may_ask = in_greenlet() or not is_async
        if may_ask:
            self._check_those_due(is_async)
        position = own.positions.get(self.key, 0) if own is not None else 0
        only_writer = own is not None and own.needs_writer(self.key)
        for reader in self._fit(tried):
            if not reader.is_causal:
                if only_writer:
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

    def failed(self, reader: Reader, error: Exception) -> None:
        """`reader` could not be connected to."""
        self._leave_out(reader, f"{type(error).__name__}: {error}")

    def _fit(self, tried: Iterable[Reader]) -> list[Reader]:
        now = time.monotonic()
        fit = [
            reader
            for reader in self.all
            if reader.is_fit and now < reader.known_until and reader not in tried
        ]
        # Of those with the same load the one that has waited longest.
        return sorted(fit, key=lambda reader: (reader.in_flight, reader.turn))

    # --- how they are doing

    def _check_those_due(self, is_async: bool) -> None:
        now = time.monotonic()
        with self._mutex:
            due = [r for r in self.all if not r.is_being_asked and now >= r.next_check]
            for reader in due:
                reader.is_being_asked = True
        if not due:
            return
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
            position = _ask(self._writer, self._replication.flushed, is_async)
        except Exception:
            # The readers go on without it, by what is known.
            logger.debug("%r does not tell its position", self._writer, exc_info=True)
        else:
            self._lag.note(time.monotonic(), position)

    def _ask(self, reader: Reader, is_async: bool) -> None:
        question = self._replication.replayed if self._replication is not None else IS_THERE
        try:
            answer = _ask(reader.database, question, is_async)
        except Exception as error:
            self._leave_out(reader, f"{type(error).__name__}: {error}")
            return
        now = time.monotonic()
        if self._replication is not None:
            reader.replayed = answer or 0
        missing = self._lag.required(now) - reader.replayed if self._replication else 0
        if missing > 0:
            self._leave_out(
                reader, f"it is {missing} bytes of the writer's log behind", for_=CHECK_EVERY
            )
            return
        if not reader.is_fit:
            logger.info("%s is read from", safe(reader.database.url))
        reader.is_fit, reader.is_reported = True, False
        reader.next_check = now + CHECK_EVERY
        reader.known_until = now + 3 * CHECK_EVERY

    def _leave_out(self, reader: Reader, why: str, *, for_: float = RETRY_AFTER) -> None:
        # At its first check it may be behind by what has been written in the last moments only.
        if not reader.is_reported and (reader.is_fit or for_ == RETRY_AFTER):
            reader.is_reported = True
            logger.warning(
                "%s is not read from until it recovers: %s", safe(reader.database.url), why
            )
        reader.is_fit = False
        reader.next_check = time.monotonic() + for_

    # --- the writer

    async def position(self) -> int | None:
        """A position behind all that was committed before; None if the writer does not tell."""
        replication = self._replication
        if replication is None:
            return None
        try:
            async with asyncio.timeout(ANSWER_WITHIN):
                return await self._ask_writer(replication.written)
        except Exception:
            logger.warning(
                "%r has not told the position of what was committed; its client reads from it "
                "for %g s.",
                self._writer,
                self.window,
                exc_info=True,
            )
            return None

    async def _ask_writer(self, question: str) -> int:
        if self._writer_is_async:
            return await greenlet_spawn(_question, self._writer, question, True)
        return await asyncio.to_thread(_question, self._writer, question, False)

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


def _ask(database: Database[Any, Any], question: str, is_async: bool) -> Any:
    """The answer of a server, which has a time limit in async code."""
    if not is_async:
        return _question(database, question, False)
    return await_only(_within(ANSWER_WITHIN, _question, database, question, True))


async def _within(seconds: float, function: Callable[..., T], *args: Any) -> T:
    async with asyncio.timeout(seconds):
        return await greenlet_spawn(function, *args)


def _question(database: Database[Any, Any], question: str, is_async: bool) -> Any:
    engine = database.engine_for_reading(is_async=is_async)
    with engine.connect() as connection:
        return connection.exec_driver_sql(question).scalar()
