"""What the functions give that find or make a session.

These files are checked by mypy --strict and pyright (`make lint`), and not run.
"""

# pyright: reportUnnecessaryTypeIgnoreComment=true

import asyncio
from typing import assert_type

from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from repom import (
    Database,
    SessionScope,
    current_scope,
    current_session,
    current_sync_session,
    get_database,
    on_commit,
    session_scope,
    sync_session_scope,
)
from repom.async_session import get_async_db_session, get_async_session
from repom.session import get_db_session, get_db_transaction, get_session


def by_name_or_database(database: Database, either: str | Database) -> None:
    assert_type(current_session(), AsyncSession)
    assert_type(current_session("reports"), AsyncSession)
    assert_type(current_session(database), AsyncSession)
    assert_type(current_session(either), AsyncSession)
    assert_type(current_sync_session(), Session)
    assert_type(current_sync_session("reports"), Session)
    assert_type(current_sync_session(either), Session)
    assert_type(get_session(), Session)
    assert_type(current_scope(), SessionScope)
    assert_type(get_database("reports"), Database)


async def as_values() -> None:
    assert_type(await asyncio.to_thread(current_sync_session), Session)
    assert_type(await get_async_session(), AsyncSession)


async def async_blocks(database: Database) -> None:
    async with session_scope() as session:
        assert_type(session, AsyncSession)
    async with session_scope(database, isolation_level="SERIALIZABLE") as session:
        assert_type(session, AsyncSession)
    async with get_async_db_session() as session:
        assert_type(session, AsyncSession)
    async for session in get_async_db_session("reports"):
        assert_type(session, AsyncSession)


def sync_blocks(database: Database) -> None:
    with sync_session_scope() as session:
        assert_type(session, Session)
    with get_db_session(database) as session:
        assert_type(session, Session)
    for session in get_db_transaction():
        assert_type(session, Session)


async def callbacks() -> None:
    async def call() -> None: ...

    on_commit(call)
    on_commit(lambda: None)


# --- refused


async def wrong_kind_of_block() -> None:
    with session_scope():  # type: ignore[attr-defined]
        pass
    async with sync_session_scope():  # type: ignore[attr-defined]
        pass
    with get_async_db_session():  # type: ignore[attr-defined]
        pass
    for _ in get_async_db_session():  # type: ignore[attr-defined]
        pass
    async with get_db_session():  # type: ignore[attr-defined]
        pass


async def wrong_arguments() -> None:
    current_session(1)  # type: ignore[call-overload]
    session_scope(isolation="SERIALIZABLE")  # type: ignore[call-arg]
    session_scope(inner_commits="never")  # type: ignore[arg-type]
    session_scope(sqlite_begin="EXCLUSIVE")  # type: ignore[arg-type]
    await current_session()  # type: ignore[misc]
