"""MySQL and MariaDB: transactions that the server has ended without a word."""

import threading
from collections.abc import AsyncIterator, Callable
from contextlib import closing
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError
from sqlalchemy.orm import Session

from repom.dialects.mysql import MySQL, errno
from repom.errors import TransactionAbortedError
from tests.dialects.drivers import Driver, open_driver
from tests.support.reader import ask, connect, execute, rows


@pytest.fixture(params=["aiomysql", "asyncmy", "pymysql"])
async def driver(request: pytest.FixtureRequest) -> AsyncIterator[Driver]:
    """Each driver, with a table that has the rows 1 and 2."""
    async with open_driver(request, request.param) as driver:
        execute(driver.url, "create table t (id integer primary key, n integer not null)")
        execute(driver.url, "insert into t values (1, 0), (2, 0)")
        yield driver


def run(sql: str) -> Callable[[Session], Any]:
    return lambda session: session.execute(text(sql))


def ids(url: str) -> set[int]:
    return {id_ for (id_,) in rows(url, "select id from t")}


def lose_a_deadlock(url: str) -> Callable[[Session], DBAPIError]:
    """Lock row 1 while a rival locks row 2, then want each other's; the rival has done more, so
    it is this session that InnoDB makes give way."""

    def work(session: Session) -> DBAPIError:
        session.execute(text("update t set n = 1 where id = 1"))
        with closing(connect(url)) as rival:
            rival.begin()
            ask(rival, "insert into t values " + ", ".join(f"({n}, 0)" for n in range(100, 150)))
            ask(rival, "update t set n = 2 where id = 2")
            thread = threading.Thread(
                target=ask, args=(rival, "update t set n = 2 where id = 1"), name="rival"
            )
            thread.start()
            # Whichever comes second closes the circle; who loses does not depend on it.
            with pytest.raises(OperationalError) as lost:
                session.execute(text("update t set n = 1 where id = 2"))
            thread.join()
            rival.rollback()
        assert errno(lost.value.orig or lost.value) == 1213
        return lost.value

    return work


async def test_a_swallowed_deadlock_is_refused_at_commit(driver: Driver) -> None:
    """The server has rolled back everything and would answer COMMIT with OK; the deadlock is the
    cause."""
    async with driver.work() as work:
        await work.do(run("insert into t values (3, 0)"))
        lost = await work.do(lose_a_deadlock(driver.url))
        await work.do(run("insert into t values (4, 0)"))
        refused = await work.commit()
    assert isinstance(refused, TransactionAbortedError)
    assert refused.__cause__ is lost.orig
    assert ids(driver.url) == {1, 2}


async def test_a_harmless_error_before_it_does_not_hide_a_deadlock(driver: Driver) -> None:
    """A duplicate key undoes its statement only; the deadlock is what counts."""

    def duplicate(session: Session) -> None:
        with pytest.raises(IntegrityError):
            session.execute(text("insert into t values (1, 0)"))

    async with driver.work() as work:
        await work.do(duplicate)
        lost = await work.do(lose_a_deadlock(driver.url))
        await work.do(duplicate)
        refused = await work.commit()
    assert isinstance(refused, TransactionAbortedError)
    assert refused.__cause__ is lost.orig


async def test_a_savepoint_does_not_heal_a_deadlock(driver: Driver) -> None:
    """It is gone with the transaction, and so is what was written before it."""

    def in_savepoint(session: Session) -> None:
        connection = session.connection()
        connection.execute(text("insert into t values (3, 0)"))
        connection.execute(text("savepoint x"))
        lose_a_deadlock(driver.url)(session)
        with pytest.raises(OperationalError, match="SAVEPOINT x does not exist"):
            connection.execute(text("rollback to savepoint x"))
        with connection.begin_nested():
            connection.execute(text("insert into t values (4, 0)"))
        nested = connection.begin_nested()
        nested.rollback()

    async with driver.work() as work:
        await work.do(in_savepoint)
        assert isinstance(await work.commit(), TransactionAbortedError)
    assert ids(driver.url) == {1, 2}


async def test_after_a_rollback_the_connection_may_commit_again(driver: Driver) -> None:
    """A deadlock that was taken for what it is, by rolling back and trying again."""
    async with driver.work() as work:
        await work.do(lose_a_deadlock(driver.url))
        await work.do(Session.rollback)
        await work.do(run("insert into t values (3, 0)"))
        assert await work.commit() is None
    assert ids(driver.url) == {1, 2, 3}


async def test_a_changed_snapshot_is_refused_at_commit(driver: Driver) -> None:
    """MariaDB's innodb_snapshot_isolation, its default since 11.6.2, rolls everything back when
    a row has changed since the transaction first looked (error 1020)."""
    if not rows(driver.url, "show variables like 'innodb_snapshot_isolation'"):
        pytest.skip("this server has no innodb_snapshot_isolation")

    def work_(session: Session) -> DBAPIError:
        session.execute(text("set session innodb_snapshot_isolation = on"))
        session.execute(text("select * from t"))
        session.execute(text("insert into t values (3, 0)"))
        execute(driver.url, "update t set n = 2 where id = 1")
        with pytest.raises(OperationalError, match="1020") as changed:
            session.execute(text("update t set n = 1 where id = 1"))
        session.execute(text("insert into t values (4, 0)"))
        return changed.value

    async with driver.work() as work:
        changed = await work.do(work_)
        refused = await work.commit()
    assert isinstance(refused, TransactionAbortedError)
    assert refused.__cause__ is changed.orig
    assert ids(driver.url) == {1, 2}


async def test_a_lock_that_was_not_got_undoes_its_statement_only(driver: Driver) -> None:
    """Error 1205, as servers are configured by default: COMMIT commits all the rest."""

    def work_(session: Session) -> None:
        session.execute(text("insert into t values (3, 0)"))
        with closing(connect(driver.url)) as rival:
            rival.begin()
            ask(rival, "update t set n = 2 where id = 1")
            with pytest.raises(OperationalError, match="1205"):
                session.execute(text("select * from t where id = 1 for update nowait"))
            rival.rollback()

    async with driver.work() as work:
        await work.do(work_)
        assert await work.commit() is None
    assert ids(driver.url) == {1, 2, 3}


@pytest.mark.parametrize(
    ("row", "aborts"),
    [
        (("innodb_rollback_on_timeout", "ON"), True),
        (("innodb_rollback_on_timeout", "1"), True),
        (("innodb_rollback_on_timeout", "OFF"), False),
        (None, False),  # a server without InnoDB
    ],
)
def test_a_server_that_rolls_back_on_timeout_is_asked(row: Any, aborts: bool) -> None:
    """innodb_rollback_on_timeout can be set only when the server starts, so its answer is played
    here."""

    class Server:
        def cursor(self) -> "Server":
            return self

        def execute(self, sql: str) -> None:
            assert "innodb_rollback_on_timeout" in sql

        def fetchone(self) -> Any:
            return row

        def close(self) -> None:
            self.closed = True

    server = Server()
    support = MySQL(make_url("mysql+pymysql://"), {}, is_async=False)
    support._ask_server(server, None)
    assert support.aborts(Exception(1205, "Lock wait timeout exceeded"), None) == aborts
    assert server.closed
    other = MySQL(make_url("mysql+pymysql://"), {}, is_async=False)
    assert not other.aborts(Exception(1205, "Lock wait timeout exceeded"), None)


@pytest.mark.parametrize(
    ("error", "number"),
    [(Exception(1213, "x"), 1213), (Exception("no number"), None), (Exception(), None)],
)
def test_errno(error: Exception, number: int | None) -> None:
    """The first argument, where it is a number."""
    assert errno(error) == number
