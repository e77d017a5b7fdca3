"""The usual events of a session are found at once, and are heard as they always were."""

from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import event, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from repom import Database, session_scope
from tests.support.units import Note, database, postgres, sqlite

__all__ = ["database", "postgres", "sqlite"]


async def work(database: Database) -> None:
    async with session_scope(database) as session:
        session.add(Note(text=uuid4().hex))


async def test_a_session_is_asked_for_no_listener_twice(
    sqlite: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a SELECT and an INSERT look for is there, from the second session of a class on."""
    await work(sqlite)
    asked: list[str] = []
    async with session_scope(sqlite) as session:
        kind = type(session.sync_session.dispatch)
        look = kind.__getattr__

        def asks(dispatch: Any, name: str) -> Any:
            asked.append(name)
            return look(dispatch, name)

        monkeypatch.setattr(kind, "__getattr__", asks)
        session.add(Note(text="b"))
        await session.flush()
        (await session.scalars(select(Note))).all()
    assert asked == []


async def test_listeners_of_one_session_hear_of_no_other(sqlite: Database) -> None:
    """They are shared no more than they would be without this."""
    heard: list[Session] = []
    await work(sqlite)
    async with session_scope(sqlite) as session:
        event.listen(session.sync_session, "before_commit", lambda session: heard.append(session))
        session.add(Note(text="b"))
        mine = session.sync_session
    await work(sqlite)
    assert heard == [mine]


async def test_listeners_of_all_sessions_are_heard_whenever_they_come(sqlite: Database) -> None:
    """Also those that are registered, and removed, after a session has been there."""
    heard: list[Session] = []

    def hear(session: Session) -> None:
        heard.append(session)

    await work(sqlite)
    event.listen(Session, "before_commit", hear)
    try:
        await work(sqlite)
    finally:
        event.remove(Session, "before_commit", hear)
    await work(sqlite)
    assert len(heard) == 1


async def test_a_session_that_listens_to_itself_is_heard(sqlite_url: str) -> None:
    """Its listeners are there before anything else is."""
    heard: list[Session] = []

    class Listening(Session):
        def __init__(self, *args: object, **kwargs: object) -> None:
            super().__init__(*args, **kwargs)  # type: ignore[arg-type]
            event.listen(self, "after_begin", lambda *_: heard.append(self))

    class AsyncListening(AsyncSession):
        sync_session_class = Listening

    database = Database(sqlite_url, session_class=AsyncListening)
    for number in range(3):
        async with session_scope(database) as session:
            await session.execute(select(1))
        assert heard[number:] == [session.sync_session]
    await database.dispose()
