"""The connection of a session: its savepoints, its COMMIT, and what it executes."""

import asyncio
from contextlib import suppress
from typing import Any

import pytest
from sqlalchemy import insert

from repom import current_session, gate, session_scope, sync_session_scope
from repom.database import Database
from repom.errors import InnerCommitError
from repom.managed import InnerCommits
from tests.support.units import Note, database, texts

__all__ = ["database"]


async def test_savepoint_of_the_connection_that_nobody_has_ended(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends with the transaction, and keeps nobody out of the next one."""
    monkeypatch.setattr(gate, "BLOCK_TIMEOUT", 1)
    committed = asyncio.Event()

    async def sibling() -> None:
        await committed.wait()
        await current_session().execute(insert(Note).values(text="in the next transaction"))

    async with session_scope(database, inner_commits="allow") as session:
        task = asyncio.create_task(sibling())
        connection = await session.connection()
        await connection.begin_nested()
        await connection.execute(insert(Note).values(text="in the savepoint"))
        await session.commit()
        committed.set()
        await task
    assert texts(database) == ["in the savepoint", "in the next transaction"]


def test_savepoints_of_a_sync_session(database: Database) -> None:
    """The connection's are what they are in async code, but for threads, which share them."""
    with sync_session_scope(database) as session:
        connection = session.connection()
        for name, fails in (("kept", False), ("undone", True)):
            with suppress(LookupError), connection.begin_nested():
                connection.execute(insert(Note).values(text=name))
                if fails:
                    raise LookupError
        savepoint = connection.begin_nested()
        connection.execute(insert(Note).values(text="closed"))
        savepoint.close()
    assert texts(database) == ["kept"]


@pytest.mark.parametrize(
    ("inner_commits", "stays"), [("defer", []), ("forbid", []), ("allow", ["a"])]
)
async def test_commit_of_the_connection(
    database: Database, inner_commits: InnerCommits, stays: list[str]
) -> None:
    """It means what that of the session does, and an error after it undoes what is not allowed."""
    with suppress(LookupError, InnerCommitError):
        async with session_scope(database, inner_commits=inner_commits) as session:
            connection = await session.connection()
            await connection.execute(insert(Note).values(text="a"))
            await connection.commit()
            assert inner_commits != "forbid"
            raise LookupError
    assert texts(database) == stays


def test_commit_of_a_sync_connection(database: Database) -> None:
    """What follows it is a part of the same transaction."""
    with sync_session_scope(database) as session:
        connection = session.connection()
        connection.execute(insert(Note).values(text="a"))
        connection.commit()
        session.execute(insert(Note).values(text="b"))
    assert texts(database) == ["a", "b"]


def test_arguments_mean_what_they_mean_in_sqlalchemy(database: Database) -> None:
    """Two rows in two arguments, as SQLAlchemy 1 took them, are refused and never halved; with a
    session or without."""
    rows: Any = ({"text": "a"}, {"text": "b"})
    by_hand = f"insert into {Note.__tablename__} (text) values ('%s')"
    with database.engine.begin() as connection:
        for execute in (connection.execute, connection.scalar):
            with pytest.raises(TypeError, match="positional"):
                execute(insert(Note), *rows)
        connection.exec_driver_sql(by_hand % "raw", None, {"x": 1})
    with sync_session_scope(database) as session:
        connection = session.connection()
        for execute in (connection.execute, connection.scalar):
            with pytest.raises(TypeError, match="positional"):
                execute(insert(Note), *rows)
        connection.exec_driver_sql(by_hand % "managed", None, {"x": 1})
    assert texts(database) == ["raw", "managed"]
