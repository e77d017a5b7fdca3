"""One session of a scope, on one database: how it is made, and where its steps run."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Coroutine
from typing import Any

import anyio
import anyio.to_thread
from anyio.lowlevel import RunVar
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from repom.begin import BeginOptions
from repom.callbacks import Callbacks
from repom.cursors import Cursors
from repom.database import Database
from repom.ending import Action, Step, Steps
from repom.errors import CommitOutcomeUnknown, TransactionError
from repom.gate import Gate, TaskGate, ThreadGate
from repom.greenlets import spawn, spawning_class
from repom.managed import InnerCommits, ManagedSession, managed_class
from repom.read_only import read_only_class
from repom.reader_session import RoutedSession, reader_class, writer_class
from repom.readers import Readers
from repom.session_events import expect_usual_events
from repom.shield import Ending

# Of their own: on the endpoints' limiter, endpoints that wait for a pooled connection would
# keep those that could give one back from ending. And without a limit: there are no more of
# them than connections in the pool, and one that waits for a slow statement keeps none waiting.
_limiter: RunVar[anyio.CapacityLimiter] = RunVar("repom_ending_threads")


class Participant:
    """What sync and async sessions have in common.

    Attributes:
        keys: what the database was asked for by, in the order in which it was.
        database: where it works.
        sync_session: the `Session` that does the work, also of an `AsyncSession`.
    """

    __slots__ = ("database", "gate", "keys", "sync_session")

    keys: tuple[str | Database, ...]
    database: Database
    sync_session: Any  # an instance of managed_class(...)
    gate: Gate

    @property
    def name(self) -> str:
        """The name of the database, for messages."""
        key = self.keys[0]
        return key if isinstance(key, str) else repr(key)

    @property
    def in_transaction(self) -> bool:
        """Whether there is something to commit; Core and bulk statements count."""
        return self.sync_session._transaction is not None

    @property
    def has_changes(self) -> bool:
        """Whether there is anything to flush, or a flush would refuse to; see `commit_steps`.

        If not, it is not worth a greenlet or a thread.
        """
        session = self.sync_session
        return session.repom_doom is not None or not session._is_clean()

    @property
    def is_quiet(self) -> bool:
        """Whether nothing is open and nobody is at work, so that closing needs no IO."""
        return self.sync_session._transaction is None and self.gate.is_free

    def let_go(self) -> None:
        """Close the session when it is quiet: that is no IO, and only lets the objects go."""
        session = self.sync_session
        if session.repom_class.close is Session.close:
            session.expunge_all()  # which is all that it would do
        else:
            session.end("close")

    def performing(self, action: Action) -> Coroutine[Any, Any, None]:
        """One step of the end, to be awaited on the event loop."""
        raise NotImplementedError  # pragma: no cover - each kind has its own

    def _manage(
        self, gate: Gate, inner_commits: InnerCommits, callbacks: Callbacks, label: object
    ) -> None:
        self.gate = gate
        session = self.sync_session
        expect_usual_events(session)
        session.repom_gate = gate
        session.repom_inner_commits = inner_commits
        session.repom_callbacks = callbacks
        session.repom_cursors = Cursors()
        session.repom_label = label
        # What a flush sets. As long as all sessions get their attributes in the same order, and not
        # many more of them, Python keeps the names once; else each has a dict of its own, 1.3 KiB.
        session._repom_flush = None
        session._repom_watchers = 0


def _class_for(
    base: type[Session], begin: BeginOptions, database: Database
) -> type[ManagedSession]:
    if database.readers is not None and database.stand_in is None:
        return reader_class(base) if begin.read_only else writer_class(base)
    return read_only_class(base) if begin.read_only else managed_class(base)


def _route(session: Session, readers: Readers, begin: BeginOptions, *, is_async: bool) -> None:
    if isinstance(session, RoutedSession):  # not in a test, whose connection has no readers
        session.repom_route(readers, begin, is_async=is_async)


class AsyncParticipant(Participant):
    """An `AsyncSession`.

    Attributes:
        loop: the event loop that first asked for it, on which it lives.
    """

    __slots__ = ("loop", "session")

    def __init__(
        self,
        key: str | Database,
        database: Database,
        begin: BeginOptions,
        inner_commits: InnerCommits,
        callbacks: Callbacks,
        label: object,
    ) -> None:
        self.keys: tuple[str | Database, ...] = (key,)
        self.database = database
        kwargs = database.session_kwargs
        base = kwargs.get("sync_session_class") or database.session_class.sync_session_class
        self.loop = asyncio.get_running_loop()
        self.session: AsyncSession = spawning_class(database.session_class)(
            database.async_bind(begin),
            **{**kwargs, "sync_session_class": _class_for(base, begin, database)},
        )
        self.sync_session = self.session.sync_session
        if database.readers is not None:
            _route(self.sync_session, database.readers, begin, is_async=True)
        self._manage(TaskGate(), inner_commits, callbacks, label)

    def performing(self, action: Action) -> Coroutine[Any, Any, None]:
        return spawn(self.sync_session.end, action)


class SyncParticipant(Participant):
    """A `Session`, for `def` endpoints and scripts."""

    __slots__ = ("_abandoned", "session")

    def __init__(
        self,
        key: str | Database,
        database: Database,
        begin: BeginOptions,
        inner_commits: InnerCommits,
        callbacks: Callbacks,
        label: object,
    ) -> None:
        self.keys: tuple[str | Database, ...] = (key,)
        self.database = database
        base = database.sync_session_class
        managed = _class_for(base, begin, database)
        self.session: Session = managed(database.sync_bind(begin), **database.session_kwargs)
        self.sync_session = self.session
        if database.readers is not None:
            _route(self.sync_session, database.readers, begin, is_async=False)
        self._abandoned = False
        self._manage(ThreadGate(), inner_commits, callbacks, label)

    async def performing(self, action: Action) -> None:
        if self._abandoned:
            return
        try:
            await anyio.to_thread.run_sync(self.perform_sync, action, limiter=_threads())
        except asyncio.CancelledError:  # by the time limit, for nobody else can
            # A thread cannot be stopped. Another one closes the session when that is done.
            self._abandoned = True
            threading.Thread(target=self.perform_sync, args=("close",), daemon=True).start()
            raise

    def perform_sync(self, action: Action) -> None:
        """Do one step of the end, in this thread."""
        self.sync_session.end(action)


async def perform(steps: Steps) -> None:
    """Do the steps from the event loop."""
    try:
        step = next(steps)
        while True:
            try:
                await step.party.performing(step.action)  # type: ignore[attr-defined]
            except BaseException as error:
                step = steps.throw(_past_limit(step, error) or error)
            else:
                step = next(steps)
    except StopIteration:
        return


def _past_limit(step: Step, error: BaseException) -> TransactionError | None:
    """The error for a step that was cut off by the time limit of the end."""
    task = asyncio.current_task()
    if not (
        isinstance(error, asyncio.CancelledError) and isinstance(task, Ending) and task.is_late
    ):
        return None
    if step.action == "commit":
        return CommitOutcomeUnknown(
            f"COMMIT on database {step.party.name!r} did not end within its time limit: the "
            "database may have committed, or not.\n"
            "Look there before doing the work again; repom never retries it."
        )
    return TransactionError(
        f"{step.action} on database {step.party.name!r} did not end within its time limit."
    )


def perform_sync(steps: Steps) -> None:
    """Do the steps in this thread; all parties are sync ones."""
    try:
        step = next(steps)
        while True:
            try:
                step.party.perform_sync(step.action)  # type: ignore[attr-defined]
            except BaseException as error:
                step = steps.throw(error)
            else:
                step = next(steps)
    except StopIteration:
        return


def _threads() -> anyio.CapacityLimiter:
    try:
        return _limiter.get()
    except LookupError:
        limiter = anyio.CapacityLimiter(math.inf)
        _limiter.set(limiter)
        return limiter
