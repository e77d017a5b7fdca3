"""Changes of objects that would be lost, because another task is about to forget or undo them.

A change is no statement: it waits for nothing, so no gate can stop it. A flush that is under
way has read by then what it writes, and takes its objects for clean when it is done. A refresh
overwrites them. And when a savepoint is rolled back, SQLAlchemy forgets what was changed in the
meantime, by whomever.

So objects are watched, but only meanwhile: code that has its session for itself pays a little
for its flushes, and for nothing else.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy.orm import InstanceState

from repom.errors import ConcurrentSessionUse
from repom.gate import Gate, name_here


class Watching:
    """What a managed session knows of this.

    Attributes:
        repom_doom: why its transaction must not be committed, if it must not.
    """

    repom_doom: str | None = None
    # The states that a flush has made `_Watched`, and what was watched before it.
    _repom_flush: tuple[list[InstanceState[Any]], Collection[str] | None] | None = None
    _repom_watched_names: Collection[str] | None = None  # None for all
    _repom_watchers = 0  # of which each wants to know of the first change to a clean object


def doom(session: Any, reason: str) -> ConcurrentSessionUse:
    """Let the transaction never be committed, also if the error is swallowed.

    Returns:
        That error.
    """
    session.repom_doom = reason
    return doomed(session)


def doomed(session: Any) -> ConcurrentSessionUse:
    """The error for the COMMIT of a doomed transaction."""
    return ConcurrentSessionUse(
        f"{session.repom_doom}\n"
        "This transaction can only be rolled back. Give tasks that write at the same time a "
        "transaction each: `async with session_scope() as session:`."
    )


# --- flushes and refreshes: who changes what they are at work on is refused


def flush_began(session: Any) -> None:
    """A flush is about to write the objects that are new or changed by now."""
    states = _watch((*session._new, *session.identity_map._modified))
    names = session._repom_watched_names
    session._repom_flush = states, names
    if names is not None:  # not set in vain, see `Participant._manage`
        session._repom_watched_names = None
    watch_clean(session)


def flush_ended(session: Any) -> None:
    """It is done, or was found to have nothing to do."""
    if session._repom_flush is not None:
        states, names = session._repom_flush
        session._repom_flush = None
        if names is not None:
            session._repom_watched_names = names
        _let_go(states)
        unwatch_clean(session)


@contextmanager
def refreshing(session: Any, instance: Any, names: Collection[str] | None) -> Iterator[None]:
    """The block overwrites attributes of `instance`."""
    state = getattr(instance, "_sa_instance_state", None)
    states = _watch(() if state is None else (state,))
    session._repom_watched_names = names
    try:
        yield
    finally:
        session._repom_watched_names = None
        _let_go(states)


class _Watched(InstanceState[Any]):
    """The state of an object that is being flushed or refreshed."""

    __slots__ = ()

    def _modified_event(self, dict_: Any, attr: Any, *args: Any, **kwargs: Any) -> None:
        session: Any = self.session
        names = session and session._repom_watched_names
        if names is None or attr is None or attr.key in names:
            _refuse_others(session)
        super()._modified_event(dict_, attr, *args, **kwargs)

    def _expire(self, dict_: Any, modified_set: Any) -> None:
        _refuse_others(self.session)
        super()._expire(dict_, modified_set)

    def _expire_attributes(self, dict_: Any, *args: Any, **kwargs: Any) -> None:
        _refuse_others(self.session)
        super()._expire_attributes(dict_, *args, **kwargs)


def _watch(states: Iterable[InstanceState[Any]]) -> list[InstanceState[Any]]:
    watched = [state for state in states if type(state) is InstanceState]
    for state in watched:
        state.__class__ = _Watched
    return watched


def _let_go(states: Iterable[InstanceState[Any]]) -> None:
    for state in states:
        state.__class__ = InstanceState


def _refuse_others(session: Any) -> None:
    if session is None:  # it has been expunged meanwhile
        return
    gate: Gate = session.repom_gate
    if not gate.is_mine:
        gate.refuse_if_over()
        raise doom(
            session,
            f"task {name_here()!r} changed an object while task {gate.inside!r} was flushing or "
            "refreshing it on the session that both use: the change would have been lost.",
        )


# --- savepoints: the first change to a clean object is noted, in case that it is undone


def watch_clean(session: Any) -> None:
    """Know from now on who changes an object that is not changed yet."""
    session._repom_watchers += 1
    identity_map = session.identity_map
    if type(identity_map._modified) is set:
        identity_map._modified = _Modified(identity_map._modified)
        identity_map._modified.session = session


def unwatch_clean(session: Any) -> None:
    """Undo one `watch_clean`."""
    session._repom_watchers -= 1
    identity_map = session.identity_map
    if not session._repom_watchers and type(identity_map._modified) is _Modified:
        identity_map._modified = set(identity_map._modified)


class _Modified(set[InstanceState[Any]]):
    """The changed objects of a session."""

    __slots__ = ("session",)

    session: Any

    def add(self, state: InstanceState[Any]) -> None:
        if self.session._flushing:
            _refuse_others(self.session)
        self.session.repom_gate.blocks.disturb()
        super().add(state)
