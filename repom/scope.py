"""The unit of work: what is open in it, and how code finds it."""

from __future__ import annotations

import asyncio
import threading
from contextvars import Token
from enum import Enum
from typing import Any, TypeVar

from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from repom import finish
from repom.branches import Branches
from repom.callbacks import NONE_REGISTERED, Callback, Callbacks
from repom.context import Surroundings, surroundings
from repom.database import Database
from repom.errors import (
    MixedSessionsError,
    TransactionError,
    WrongEventLoopError,
    WrongThreadError,
)
from repom.gate import scope_closed
from repom.observer import IGNORING, Observer, committing_apart
from repom.participant import AsyncParticipant, Participant, SyncParticipant
from repom.registry import DEFAULT, Databases
from repom.scope_options import ScopeOptions
from repom.turn import Turn

_P = TypeVar("_P", AsyncParticipant, SyncParticipant)


class ScopeState(Enum):
    OPEN = "open"
    ENDING = "ending"  # new work is refused, what is in flight finishes
    CLOSED = "closed"


# On Python 3.11 it costs as much as a call to look up a member of an enumeration.
OPEN, ENDING, CLOSED = ScopeState


class SessionScope:
    """One unit of work. Holds at most one session per database, opened on first use.

    Made by its owner: the middleware, `session_scope()`, or a generator dependency outside of
    both. Application code gets it by `current_scope()`.

    Args:
        options: how it is made.
        label: what it is, for logs: its `str()` is "POST /articles", or a name.

    Attributes:
        options: as given, like `label`.
        parent: the scope inside which this one was opened, if any.
        observer: who has to know what the database says in it, if anybody.
        branches: those of a unit of work that ends by a two-phase commit; set by its owner.
        attempt: how often the work was begun, this time included: more than 1 if it has lost a
            conflict and is repeated.
        is_used: whether it was ever asked for a session or a callback; or its owner wants to be
            told of everything, and has called `use()`.
        callbacks: what waits for the end of the transaction.
        turn: held while transactions are ended; of one that is used.
        participants: what takes part in it, in the order in which it is to commit.
    """

    __slots__ = (
        "__weakref__",
        "_mutex",
        "_rollback_only",
        "_state",
        "_token",
        "attempt",
        "branches",
        "callbacks",
        "is_used",
        "label",
        "observer",
        "options",
        "parent",
        "participants",
        "turn",
    )

    turn: Turn

    def __init__(self, options: ScopeOptions, label: object) -> None:
        self.options = options
        self.label = label
        self.parent: Surroundings | None = None
        self.observer: Observer | None = None
        self.branches: Branches | None = None
        self.attempt = 1
        self.is_used = False
        self.callbacks: Callbacks = NONE_REGISTERED
        self.participants: tuple[Participant, ...] = ()
        self._rollback_only = False
        self._state = OPEN
        self._token: Token[Surroundings | None] | None = None
        # Of its own: another one may be used by what the garbage collector finalizes meanwhile.
        self._mutex = threading.Lock()  # threads of one request may ask at the same time

    def __repr__(self) -> str:
        return f"<SessionScope {self.label} ({self._state.value})>"

    # --- for application code

    def session(self, database: str | Database = DEFAULT) -> AsyncSession:
        """The scope's `AsyncSession`; see `current_session`."""
        for found in self.participants:
            if (
                database in found.keys
                and isinstance(found, AsyncParticipant)
                and found.loop is asyncio._get_running_loop()
            ):
                return found.session
        return self._open_async(database)

    def sync_session(self, database: str | Database = DEFAULT) -> Session:
        """The scope's `Session`; see `current_sync_session`."""
        for found in self.participants:
            if database in found.keys and isinstance(found, SyncParticipant):
                return found.session
        return self._open_sync(database)

    @property
    def databases(self) -> Databases:
        """What its sessions are found by."""
        return self.options.databases

    @property
    def in_transaction(self) -> bool:
        """Whether something was begun that has not ended; a SELECT counts."""
        for participant in self.participants:
            if participant.sync_session._transaction is not None:
                return True
        return False

    @property
    def is_open(self) -> bool:
        """Whether it accepts work."""
        return self._state is OPEN

    @property
    def is_rollback_only(self) -> bool:
        """Whether `rollback_only()` was called."""
        return self._rollback_only

    def rollback_only(self) -> None:
        """Roll back at the end, whatever the outcome. The response stays as it is."""
        self._rollback_only = True

    async def commit(self) -> None:
        """Commit now, on purpose. What follows is another transaction.

        The callbacks registered by `on_commit` run. A later error undoes only what follows.

        Raises:
            TransactionError: `rollback_only()` was called before.
            ScopeClosedError: the scope has ended.
        """
        self._refuse_early_commit()
        with committing_apart():
            await finish.end(self, commit=True)

    def commit_sync(self) -> None:
        """The sync twin of `commit`, for `def` endpoints and `sync_session_scope()`.

        Raises:
            MixedSessionsError: the unit of work holds an `AsyncSession`.
        """
        self._refuse_early_commit()
        if any(isinstance(participant, AsyncParticipant) for participant in self.participants):
            raise MixedSessionsError(
                "commit_sync() was called where current_session() is in use, too: sync code "
                "cannot commit an AsyncSession.\n"
                "Write `await current_scope().commit()` in async code."
            )
        with committing_apart():
            finish.end_sync(self, commit=True)

    def on_commit(self, callback: Callback, database: str | Database = DEFAULT) -> None:
        """See `repom.on_commit`."""
        self.use()
        self.callbacks.on_commit(callback, self._savepoint(database))

    def on_rollback(self, callback: Callback, database: str | Database = DEFAULT) -> None:
        """See `repom.on_rollback`."""
        self.use()
        self.callbacks.on_rollback(callback, self._savepoint(database))

    # --- opening sessions

    def _open_async(self, key: str | Database) -> AsyncSession:
        loop = asyncio._get_running_loop()
        if loop is None:
            raise WrongThreadError(
                "current_session() was called in a thread without an event loop, where an "
                "AsyncSession cannot be used.\n"
                "Use current_sync_session() in `def` endpoints and threads."
            )
        self._refuse_if_over()
        if self.options.is_sync:
            raise MixedSessionsError(
                f"current_session() was called inside {self.label}, whose end cannot await that "
                "of an AsyncSession.\n"
                "Use current_sync_session() here, or open `async with session_scope()`."
            )
        return self._participant(key, AsyncParticipant, loop).session

    def _open_sync(self, key: str | Database) -> Session:
        self._refuse_if_over()
        return self._participant(key, SyncParticipant).session

    def _participant(
        self,
        key: str | Database,
        kind: type[_P],
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> _P:
        options = self.options
        database = options.databases[key]
        self.use()
        with self._mutex:
            self._refuse_if_over()  # a thread may have come here just before the end
            if loop is not None:
                self._refuse_other_loops(loop)
            found = self._taking_part(database)
            if found is None:
                found = kind(
                    key, database, options.begin, options.inner_commits, self.callbacks, self.label
                )
                # What a test commits, it rolls back in the end.
                if self.branches is not None and database.stand_in is None:
                    self.branches.take_part(found.sync_session, database)
                self.participants = self._in_order((*self.participants, found))
            elif key not in found.keys and isinstance(found, kind):
                found.keys += (key,)
        if not isinstance(found, kind):
            used, asked = "current_sync_session()", "current_session()"
            if kind is SyncParticipant:
                used, asked = asked, used
            raise MixedSessionsError(
                f"{asked} was called where {used} is already in use for database "
                f"{found.name!r}: two connections cannot share one transaction.\n"
                f"Use {used} in the whole request, or open a unit of work of its own."
            )
        return found

    def _refuse_other_loops(self, loop: asyncio.AbstractEventLoop) -> None:
        for found in self.participants:
            if isinstance(found, AsyncParticipant) and found.loop is not loop:
                raise WrongEventLoopError(
                    "this unit of work, and its connections, belong to another event loop.\n"
                    "Open one of its own on this loop: `async with session_scope() as session:`."
                )

    def use(self) -> None:
        """Make what requests that ask for nothing do not need."""
        if not self.is_used:
            with self._mutex:
                if not self.is_used:
                    self.callbacks = Callbacks()
                    self.turn = Turn()
                    self.is_used = True  # at last: others look at it without the mutex

    def _savepoint(self, key: str | Database) -> Any:
        # The last flush happens when new work is refused already, but what listens to it, as
        # "after_insert" does, is a part of the end.
        if not any(participant.gate.is_mine for participant in self.participants):
            self._refuse_if_over()
        participant = self._taking_part(self.options.databases[key])
        return participant and participant.gate.blocks.savepoint_here

    # --- for the owner: see `repom.finish`

    def _in_order(self, opened: tuple[Participant, ...]) -> tuple[Participant, ...]:
        if len(opened) == 1:
            return opened
        given = list(dict.fromkeys(database for _, database in self.options.databases.items()))
        places = {database: place for place, database in enumerate(given)}
        return tuple(sorted(opened, key=lambda each: places.get(each.database, len(given))))

    def _taking_part(self, database: Database) -> Participant | None:
        for participant in self.participants:
            if participant.database is database:
                return participant
        return None

    @property
    def has_work(self) -> bool:
        """Whether there is anything to end, or anybody waits for the end."""
        return self.in_transaction or not self.callbacks.is_empty

    @property
    def has_effects(self) -> bool:
        """Whether a commit may change anything, or somebody waits for it."""
        return self.has_work and not (self.options.begin.read_only and self.callbacks.is_empty)

    @property
    def is_quiet(self) -> bool:
        """Whether nothing is open and nobody is at work."""
        for participant in self.participants:  # noqa: SIM110 - asked at the end of every request
            if not participant.is_quiet:
                return False
        return True

    @property
    def has_open_cursor(self) -> bool:
        """Whether a result may still be read from the database."""
        for participant in self.participants:
            if participant.sync_session.repom_cursors.is_open:
                return True
        return False

    def enter(self) -> None:
        """Make this the scope of the running context."""
        self.parent = surroundings.get()
        self._token = surroundings.set(self)

    def leave(self) -> None:
        """Give the context back what it had before `enter`."""
        token, self._token = self._token, None
        if token is not None:
            try:
                surroundings.reset(token)
            except ValueError:
                # Left in another context than it was entered in, as generators can be. There
                # it stays, closed, and tells so whoever finds it.
                return

    def refuse_work(self) -> bool:
        """Refuse new work from now on; what is in flight may finish.

        Returns:
            Whether there is any. A scope that nobody has asked for anything is closed.
        """
        with self._mutex:
            if not self.is_used:
                self._state = CLOSED
                return False
            self._state = ENDING
            for participant in self.participants:
                participant.gate.closed = True
            return True

    def for_callback(self, *, is_sync: bool = False) -> SessionScope:
        """A unit of work for one callback: all as here, but a transaction of its own.

        So a callback neither ends what siblings have begun since, nor lets them in again.
        """
        options = self.options._replace(is_sync=is_sync)
        unit = SessionScope(options, f"a callback of {self.label}")
        unit.observer = IGNORING  # the work that waits for the end has ended
        return self._alike(unit)

    def again(self) -> SessionScope:
        """A unit of work for another attempt at what this one has lost."""
        unit = SessionScope(self.options, self.label)
        unit.attempt = self.attempt + 1
        return self._alike(unit)

    def _alike(self, unit: SessionScope) -> SessionScope:
        if self.branches is not None:
            unit.branches = Branches(self.options.databases)
        return unit

    def closed(self) -> None:
        """The scope is over: its sessions are no longer given out, nor kept alive.

        The scope itself may be, by tasks it has left behind and by the pooled connections that
        were opened in it: each has a copy of the context.
        """
        self._state = CLOSED
        self.participants = ()

    def _refuse_if_over(self) -> None:
        if self._state is not OPEN:
            raise scope_closed()

    def _refuse_early_commit(self) -> None:
        self._refuse_if_over()
        if self._rollback_only:
            raise TransactionError(
                "commit() after rollback_only(): this unit of work is going to be rolled back.\n"
                "Decide for one of them."
            )
