"""`session_class=` flows through wherever the `Database` itself is given.

A name says nothing of the class, so there it is SQLAlchemy's.

These files are checked by mypy --strict and pyright (`make lint`), and not run.
"""

# pyright: reportUnnecessaryTypeIgnoreComment=true

from typing import assert_type

from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from sqlmodel import Session as SQLModelSession
from sqlmodel.ext.asyncio.session import AsyncSession as SQLModelAsyncSession

from repom import (
    Database,
    atomic,
    current_session,
    current_sync_session,
    session_scope,
    sync_session_scope,
)
from repom.async_session import get_async_db_session, get_async_session
from repom.middleware import DatabaseSessionMiddleware
from repom.session import get_db_session, get_db_transaction, get_session

plain = Database("sqlite://")
sqlmodel = Database(
    "sqlite://", session_class=SQLModelAsyncSession, sync_session_class=SQLModelSession
)
only_async = Database("sqlite://", session_class=SQLModelAsyncSession)

assert_type(plain, Database)
assert_type(plain, Database[AsyncSession, Session])
assert_type(sqlmodel, Database[SQLModelAsyncSession, SQLModelSession])
assert_type(only_async, Database[SQLModelAsyncSession, Session])
assert_type(Database.from_config(), Database)


async def async_sessions() -> None:
    assert_type(sqlmodel.sessionmaker(), SQLModelAsyncSession)
    assert_type(current_session(sqlmodel), SQLModelAsyncSession)
    assert_type(await get_async_session(sqlmodel), SQLModelAsyncSession)
    async with session_scope(sqlmodel) as session:
        assert_type(session, SQLModelAsyncSession)
    async with sqlmodel.sessionmaker.begin() as session:
        assert_type(session, SQLModelAsyncSession)
    async with get_async_db_session(sqlmodel) as session:
        assert_type(session, SQLModelAsyncSession)
    async for session in get_async_db_session(sqlmodel):
        assert_type(session, SQLModelAsyncSession)
    async with atomic(sqlmodel) as session:
        assert_type(session, SQLModelAsyncSession)
    async with atomic(only_async) as session:
        assert_type(session, SQLModelAsyncSession)


def sync_sessions() -> None:
    assert_type(sqlmodel.sync_sessionmaker(), SQLModelSession)
    assert_type(current_sync_session(sqlmodel), SQLModelSession)
    assert_type(current_sync_session(only_async), Session)
    assert_type(get_session(sqlmodel), SQLModelSession)
    with sync_session_scope(sqlmodel) as session:
        assert_type(session, SQLModelSession)
    with get_db_session(sqlmodel) as session:
        assert_type(session, SQLModelSession)
    for session in get_db_transaction(sqlmodel):
        assert_type(session, SQLModelSession)
    with atomic(sqlmodel) as session:
        assert_type(session, SQLModelSession)


def takes_any(database: Database) -> None:
    """A database with session classes of its own is still one."""
    DatabaseSessionMiddleware(lambda scope, receive, send: anything(), database)


async def anything() -> None: ...


takes_any(sqlmodel)

# --- refused


class NoSession: ...


Database("sqlite://", session_class=NoSession)  # type: ignore[type-var]
Database("sqlite://", session_class=Session)  # type: ignore[type-var]
Database("sqlite://", sync_session_class=AsyncSession)  # type: ignore[type-var]
