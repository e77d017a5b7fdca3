"""Objects are watched while they are flushed or refreshed, and only then."""

from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import event, inspect, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import InstanceState, Session

from repom import sync_session_scope
from repom.database import Database
from tests.support.units import Note, database, postgres, sqlite

__all__ = ["database", "postgres", "sqlite"]


def assert_nothing_watched(session: Session, *notes: Note) -> None:
    """Fail if a change would cost more than SQLAlchemy makes it cost."""
    assert {type(inspect(note)) for note in notes} == {InstanceState}
    assert type(session.identity_map._modified) is set


def flush(session: Session, note: Note) -> None:
    note.remark = "changed"
    session.flush()


def fail_to_flush(session: Session, note: Note) -> None:
    note.remark = "changed"
    with pytest.raises(IntegrityError), session.begin_nested():
        session.add(Note(text=note.text))


def flush_nothing(session: Session, note: Note) -> None:
    note.remark = note.remark
    session.flush()


def refresh(session: Session, note: Note) -> None:
    session.refresh(note, iter(["remark"]))


def refresh_what_is_changed(session: Session, note: Note) -> None:
    note.text = "changed"  # flushed first
    session.refresh(note)


def block(session: Session, note: Note) -> None:
    with session.begin_nested():
        note.remark = "changed"


def block_that_expunges(session: Session, note: Note) -> None:
    with session.begin_nested():
        session.expunge_all()
        session.add(note)


@pytest.mark.parametrize(
    "work",
    [
        flush,
        fail_to_flush,
        flush_nothing,
        refresh,
        refresh_what_is_changed,
        block,
        block_that_expunges,
    ],
)
def test_nothing_is_watched_afterwards(
    sqlite: Database, work: Callable[[Session, Note], None]
) -> None:
    with sync_session_scope(sqlite) as session:
        note, other = Note(text="note"), Note(text="other")
        session.add_all([note, other])
        session.flush()
        work(session, note)
        assert_nothing_watched(session, note, other)
        note.remark = "changed again"
        session.flush()
        assert session.scalar(select(Note.remark).where(Note.id == note.id)) == "changed again"


def test_what_is_flushed_is_watched_and_found_as_ever(sqlite: Database) -> None:
    """SQLAlchemy's own functions take the state for what it is, and changes by the flush itself
    are made."""
    seen: list[Any] = []

    def look(session: Session, flush: Any) -> None:
        seen.append(type(inspect(note)))
        note.remark = "too late, as SQLAlchemy says"

    with sync_session_scope(sqlite) as session:
        note = Note(text="note")
        session.add(note)
        event.listen(session, "after_flush", look, once=True)
        session.flush()
        assert issubclass(seen[0], InstanceState)
        assert seen[0] is not InstanceState
        assert_nothing_watched(session, note)
