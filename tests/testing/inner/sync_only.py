"""An application of sync code only, with the driver that it has in production."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import delete, insert, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from repom import atomic, current_sync_session, get_database, sync_session_scope
from repom.errors import ConfigurationError, TransactionAbortedError
from repom.testing import test_client
from tests.testing.inner.app import Order, User, app, kind


def emails(session: Session) -> list[str]:
    return list(session.scalars(select(User.email).order_by(User.email)))


@pytest.fixture(autouse=True)
def starts_empty(db_test: Session) -> None:
    """Nothing of the tests before is there."""
    assert emails(db_test) == []


@pytest.fixture
def client(db_test: Session) -> Iterator[Any]:
    with test_client(app, raise_server_exceptions=False) as client:
        yield client


def test_driver(db_test: Session) -> None:
    """It is the sync one."""
    assert not db_test.connection().dialect.is_async
    assert not get_database().engine.dialect.is_async


def test_requests(db_test: Session, client: Any) -> None:
    """Endpoints and dependencies that are no coroutines."""
    db_test.add(User(email="a"))
    db_test.flush()
    assert client.post("/users/sync?email=b").json() == ["a", "b"]
    assert client.post("/users/sync/depends?email=c").status_code == 200
    assert client.post("/users/sync/depends?email=c").status_code == 409
    assert emails(db_test) == ["a", "b", "c"]


def test_async_code(client: Any) -> None:
    """Is told that it cannot share the connection, and how it could."""
    with pytest.raises(ConfigurationError, match="Leave only_sync out"):
        get_database().sessionmaker()
    assert client.post("/users?email=a").status_code == 500


def test_units(db_test: Session) -> None:
    """Commits, rollbacks and savepoints."""
    with sync_session_scope() as session:
        session.add(User(email="a"))
        with pytest.raises(LookupError), atomic():
            current_sync_session().add(User(email="b"))
            current_sync_session().flush()
            raise LookupError
        session.add(User(email="c"))
    with pytest.raises(LookupError), sync_session_scope() as session:
        session.add(User(email="d"))
        session.flush()
        raise LookupError
    assert emails(db_test) == ["a", "c"]


def test_threads(db_test: Session) -> None:
    """They take turns."""

    def create(number: int) -> None:
        with sync_session_scope() as session:
            session.add(User(email=f"{number}"))
            session.flush()
            session.add(User(email=f"{number} more"))

    with ThreadPoolExecutor(5) as threads:
        list(threads.map(create, range(10)))
    assert emails(db_test) == [f"{n}{more}" for n in range(10) for more in ("", " more")]


def test_result_that_is_still_to_be_read(db_test: Session) -> None:
    """It has all its rows, whatever others do meanwhile."""
    db_test.add_all([User(email=f"{n:03}") for n in range(300)])
    db_test.commit()
    query = select(User.email).order_by(User.email)
    result = db_test.execute(query)
    streamed = db_test.execute(query, execution_options={"yield_per": 10})
    assert streamed.fetchone() is not None
    with sync_session_scope() as session:
        session.execute(delete(User).where(User.email > "100"))
    assert len(result.all()) == 300
    assert len(streamed.all()) == 299
    assert len(emails(db_test)) == 101


@pytest.mark.skipif(kind == "mysql", reason="MariaDB checks at once")
def test_deferred_constraint(db_test: Session) -> None:
    """Checked by a commit."""
    with pytest.raises(IntegrityError), sync_session_scope() as session:
        session.add(Order(user_id=1))
        session.flush()
    assert db_test.scalars(select(Order)).all() == []


@pytest.mark.skipif(kind != "postgresql", reason="PostgreSQL's")
def test_aborted_transaction() -> None:
    """An error that was swallowed comes back."""
    with (
        pytest.raises(TransactionAbortedError),
        sync_session_scope() as session,
        pytest.raises(IntegrityError),
    ):
        session.execute(insert(User), [{"email": "a"}, {"email": "a"}])
