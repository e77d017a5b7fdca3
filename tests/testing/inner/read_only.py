"""Units of work that only read, in tests: the database refuses their writes there, too."""

from typing import Any

import pytest
from sqlalchemy import select, text
from sqlalchemy.orm import Session

from repom import atomic, session_scope, sync_session_scope
from repom.errors import ReadOnlyError
from tests.testing.inner.app import User

pytestmark = pytest.mark.usefixtures("starts_empty")
both = pytest.mark.parametrize("read_only", [True, "snapshot"])


@pytest.fixture
def starts_empty(db_test: Session) -> None:
    """Nothing of the tests before is there."""
    assert emails(db_test) == []


def emails(session: Session) -> list[str]:
    return list(session.scalars(select(User.email).order_by(User.email)))


@both
async def test_what_it_sees(db_test: Session, read_only: Any) -> None:
    """The work of the test's session and of units before, also of one inside of it."""
    db_test.add(User(email="a"))
    db_test.flush()
    async with session_scope() as session:
        session.add(User(email="b"))
    async with session_scope(read_only=read_only) as session:
        async with atomic():
            assert await session.run_sync(emails) == ["a", "b"]
        async with session_scope() as inner:
            inner.add(User(email="c"))
    with sync_session_scope(read_only=read_only) as sync_session:
        assert emails(sync_session) == ["a", "b", "c"]


@both
async def test_a_write_is_refused(db_test: Session, read_only: Any) -> None:
    """By a flush, by text, when the unit ends, and also when the error is swallowed."""
    with pytest.raises(ReadOnlyError):
        async with session_scope(read_only=read_only) as session:
            session.add(User(email="at its end"))
    with pytest.raises(ReadOnlyError):
        async with session_scope(read_only=read_only) as session:
            session.add(User(email="a"))
            with pytest.raises(ReadOnlyError):
                await session.flush()
    with pytest.raises(ReadOnlyError), sync_session_scope(read_only=read_only) as sync_session:
        assert emails(sync_session) == []
        with pytest.raises(ReadOnlyError):
            sync_session.execute(text("INSERT INTO users (email) VALUES ('a')"))
    assert emails(db_test) == []


@both
async def test_what_comes_after_a_refused_write(db_test: Session, read_only: Any) -> None:
    """The unit goes on reading, if it was in a block of its own, and others write."""
    async with session_scope(read_only=read_only) as session:
        with pytest.raises(ReadOnlyError):
            async with atomic():
                session.add(User(email="a"))
        assert await session.run_sync(emails) == []
    async with session_scope() as session:
        session.add(User(email="b"))
    db_test.add(User(email="c"))
    db_test.flush()
    assert emails(db_test) == ["b", "c"]


async def test_a_stream(db_test: Session) -> None:
    """It gives all rows."""
    db_test.add_all([User(email="a"), User(email="b")])
    db_test.flush()
    async with session_scope(read_only=True) as session:
        rows = await session.stream_scalars(select(User.email).order_by(User.email))
        assert [row async for row in rows] == ["a", "b"]
