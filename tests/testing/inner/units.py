"""Units of work, without requests: what they commit is committed for all others, and rolled back
with the test."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import delete, insert, select, text, update
from sqlalchemy.engine import Engine
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Session

from repom import (
    atomic,
    current_scope,
    current_session,
    get_database,
    on_commit,
    on_rollback,
    session_scope,
    sync_session_scope,
)
from repom.async_session import get_async_db_session, get_async_session
from repom.errors import (
    InnerCommitError,
    TransactionAbortedError,
    WouldDeadlockError,
)
from repom.session import get_db_session, get_db_transaction, get_session
from repom.testing import captured_on_commit_callbacks
from tests.testing.inner.app import Order, User, create, kind

pytestmark = pytest.mark.usefixtures("starts_empty")
many_writers = pytest.mark.skipif(kind == "sqlite", reason="SQLite has one writer at a time")
only_postgresql = pytest.mark.skipif(kind != "postgresql", reason="PostgreSQL's")


def add(session: Any, email: str) -> None:
    session.add(User(email=email))


@pytest.fixture
def starts_empty(db_test: Session) -> None:
    """Nothing of the tests before is there."""
    assert emails(db_test) == []


def emails(session: Session) -> list[str]:
    return list(session.scalars(select(User.email).order_by(User.email)))


# --- every way to have a session


async def test_async_units(db_test: Session) -> None:
    """They commit when left, and roll back when an error leaves them."""

    async def by_loop() -> None:
        async for session in get_async_db_session():
            add(session, "loop")
            return

    @atomic()
    async def by_decorator() -> None:
        add(current_session(), "decorator")

    async with session_scope() as session:
        add(session, "scope")
    async with atomic() as session:
        add(session, "atomic")
    async with get_async_db_session() as session:
        add(session, "with")
    await by_decorator()
    await by_loop()
    for opened in (session_scope, atomic, get_async_db_session):
        with pytest.raises(LookupError):
            async with opened() as session:
                add(session, "failed")
                await session.flush()
                raise LookupError
    assert emails(db_test) == ["atomic", "decorator", "loop", "scope", "with"]


async def test_manual_async_sessions(db_test: Session) -> None:
    """They commit when told to."""
    session = await get_async_session()
    add(session, "committed")
    await session.commit()
    add(session, "not committed")
    await session.flush()
    await session.close()
    async with get_database().sessionmaker() as session, session.begin():
        add(session, "sessionmaker")
    assert emails(db_test) == ["committed", "sessionmaker"]


def test_sync_units(db_test: Session) -> None:
    """As their async twins do."""

    def by_loop() -> None:
        for session in get_db_session():
            add(session, "loop")
            return

    with sync_session_scope() as session:
        add(session, "scope")
    with atomic() as session:
        add(session, "atomic")
    with get_db_transaction() as session:
        add(session, "transaction")
    by_loop()
    with get_session() as session:
        add(session, "manual")
        session.commit()
        add(session, "not committed")
        session.flush()
    with get_database().sync_sessionmaker.begin() as session:
        add(session, "sessionmaker")
    with pytest.raises(LookupError), sync_session_scope() as session:
        add(session, "failed")
        session.flush()
        raise LookupError
    assert emails(db_test) == ["atomic", "loop", "manual", "scope", "sessionmaker", "transaction"]


def test_factories_made_before_the_test(db_test: Session) -> None:
    """A session factory of the database, made at import, is one for the tests, too."""
    from tests.testing.inner.app import sessions, sync_sessions

    async def create() -> None:
        async with sessions.begin() as session:
            add(session, "async")

    asyncio.run(create())
    with sync_sessions.begin() as session:
        add(session, "sync")
    assert emails(db_test) == ["async", "sync"]


async def test_engines(db_test: Session, async_db_engine: AsyncEngine, db_engine: Engine) -> None:
    """Connections without a session, by the database's engines and the fixtures'."""
    database = get_database()
    for number, engine in enumerate((database.async_engine, async_db_engine)):
        async with engine.begin() as connection:
            await connection.execute(insert(User).values(email=f"async {number}"))
        async with engine.connect() as connection:
            await connection.execute(insert(User).values(email="not committed"))
    for number, sync_engine in enumerate((database.engine, db_engine)):
        with sync_engine.begin() as sync_connection:
            sync_connection.execute(insert(User).values(email=f"sync {number}"))
        with sync_engine.connect() as sync_connection:
            sync_connection.execute(insert(User).values(email="not committed"))
    await database.ping()
    await database.dispose()
    assert emails(db_test) == ["async 0", "async 1", "sync 0", "sync 1"]


async def test_autocommit(db_test: Session) -> None:
    """Each statement is a transaction of its own."""
    engine = get_database().async_engine.execution_options(isolation_level="AUTOCOMMIT")
    async with engine.connect() as connection:
        await connection.execute(insert(User).values(email="a"))
        with pytest.raises(IntegrityError):
            await connection.execute(insert(User).values(email="a"))
        await connection.rollback()
    assert emails(db_test) == ["a"]


async def test_isolation_level(db_test: Session) -> None:
    """There is one transaction, so it is that one's."""
    async with session_scope(isolation_level="SERIALIZABLE") as session:
        add(session, "a")
    assert emails(db_test) == ["a"]


def test_several_event_loops(db_test: Session) -> None:
    """One after the other, and at the same time."""

    async def create(email: str) -> None:
        async with session_scope() as session:
            add(session, email)

    for email in ("a", "b"):
        asyncio.run(create(email))
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(lambda email: asyncio.run(create(email)), ("c", "d")))
    assert emails(db_test) == ["a", "b", "c", "d"]


async def test_threads(db_test: Session) -> None:
    """Sync units in threads, while the test's loop runs."""

    def create(email: str) -> None:
        with sync_session_scope() as session:
            add(session, email)
            session.flush()

    await asyncio.gather(*(asyncio.to_thread(create, email) for email in "abcde"))
    assert emails(db_test) == ["a", "b", "c", "d", "e"]


async def test_sync_code_in_the_loop(db_test: Session, async_db_test: AsyncSession) -> None:
    """It blocks the loop, and gets what it waits for all the same."""
    add(async_db_test, "a")
    await async_db_test.flush()
    with sync_session_scope() as session:
        assert emails(session) == ["a"]
        add(session, "b")
    assert emails(db_test) == ["a", "b"]


# --- callbacks


async def test_callbacks(db_test: Session) -> None:
    """Called as in production: after the commit, with what is committed to be seen."""
    called: list[object] = []

    async def later() -> None:
        called.append(list(await current_session().scalars(select(User.email))))

    async with session_scope() as session:
        add(session, "a")
        on_commit(later)
        on_rollback(lambda: called.append("rolled back"))
        assert called == []
    assert called == [["a"]]
    with pytest.raises(LookupError):
        async with session_scope():
            on_commit(later)
            on_rollback(lambda: called.append("rolled back"))
            await create("b")
            raise LookupError
    assert called == [["a"], "rolled back"]


async def test_captured_callbacks(db_test: Session) -> None:
    """Those of what is committed, and not run; in a block with `execute`, run too."""
    from tests.testing.inner.app import committed

    with captured_on_commit_callbacks() as callbacks:
        async with session_scope():
            await create("a")
            with pytest.raises(LookupError):
                async with atomic():
                    await create("b")
                    raise LookupError
        assert len(callbacks) == 1
        with pytest.raises(LookupError):
            async with session_scope():
                await create("c")
                raise LookupError
    assert len(callbacks) == 1
    assert committed == []
    callbacks[0]()
    with captured_on_commit_callbacks(execute=True) as callbacks:
        async with session_scope():
            await create("d")
    assert len(callbacks) == 1
    async with session_scope():
        await create("e")
    assert committed == ["a", "d", "e"]
    assert len(callbacks) == 1


# --- units inside units


@many_writers
async def test_unit_inside_a_unit(db_test: Session) -> None:
    """It ends before the outer one, which goes on."""
    async with session_scope() as outer:
        add(outer, "outer")
        await outer.flush()
        async with session_scope() as inner:
            add(inner, "inner")
        with pytest.raises(LookupError):
            async with session_scope() as inner:
                add(inner, "failed")
                await inner.flush()
                raise LookupError
        add(outer, "outer again")
    assert emails(db_test) == ["inner", "outer", "outer again"]


@many_writers
async def test_parallel_writers_inside_a_unit(db_test: Session) -> None:
    """The outer unit waits for them; each is its own."""

    async def work(number: int) -> None:
        async with session_scope() as session:
            add(session, f"{number}")
            await session.flush()
            await asyncio.sleep(0.01)
            add(session, f"{number} more")
            if number == 2:
                raise LookupError

    async with session_scope() as outer:
        add(outer, "outer")
        await outer.flush()
        results = await asyncio.gather(*map(work, range(4)), return_exceptions=True)
        assert [repr(result) for result in results if result] == ["LookupError()"]
    assert emails(db_test) == ["0", "0 more", "1", "1 more", "3", "3 more", "outer"]


async def test_parallel_writers(db_test: Session) -> None:
    """Units of tasks take turns."""

    async def work(number: int) -> None:
        async with session_scope() as session:
            await session.execute(select(User))
            await asyncio.sleep(0)
            add(session, f"{number}")
            await session.flush()
            await asyncio.sleep(0)
            add(session, f"{number} more")

    await asyncio.gather(*map(work, range(10)))
    assert emails(db_test) == [f"{n}{more}" for n in range(10) for more in ("", " more")]


async def test_who_only_reads_keeps_nobody_waiting(db_test: Session) -> None:
    """Nor is it an outer unit: what is committed while it is open stays when it fails."""
    if get_database().url.database is None:
        pytest.skip("a memory database has no readers beside its writer")
    with pytest.raises(LookupError):
        async with session_scope(sqlite_begin="DEFERRED") as reader:
            assert (await reader.scalars(select(User.email))).all() == []
            async with session_scope() as session:
                add(session, "a")
            await asyncio.create_task(create_in_a_scope("b"))
            assert (await reader.scalars(select(User.email))).all() == ["a", "b"]
            raise LookupError
    assert emails(db_test) == ["a", "b"]


async def create_in_a_scope(email: str) -> None:
    async with session_scope():
        await create(email)


@many_writers
async def test_savepoints_of_units_inside_units(db_test: Session) -> None:
    """SQLAlchemy gives them the same names on each of its connections."""
    async with session_scope() as outer, outer.begin_nested():
        add(outer, "a")
        await outer.flush()
        async with session_scope() as inner, inner.begin_nested():
            add(inner, "b")
        add(outer, "c")
    assert emails(db_test) == ["a", "b", "c"]


async def test_result_that_is_still_to_be_read(db_test: Session) -> None:
    """It has all its rows, whatever others do meanwhile, also if it is read bit by bit."""
    for number in range(300):
        add(db_test, f"{number:03}")
    db_test.commit()
    query = select(User.email).order_by(User.email)
    async with session_scope(sqlite_begin="DEFERRED") as session:
        result = await session.execute(query)
        streamed = await session.stream(query, execution_options={"yield_per": 10})
        first = await streamed.fetchone()
        db_test.execute(delete(User).where(User.email > "100"))
        db_test.commit()
        assert len(result.all()) == 300
        assert first is not None
        assert len([row async for row in streamed]) == 299
    assert len(emails(db_test)) == 101


@many_writers
async def test_manual_sessions_used_in_turns(db_test: Session) -> None:
    """Two sessions of one task, open at the same time: what each commits is committed."""
    one = await get_async_session()
    other = await get_async_session()
    add(one, "a")
    await one.flush()
    add(other, "b")
    await other.flush()
    add(one, "c")
    await one.flush()
    await one.commit()
    add(other, "d")
    await other.commit()
    add(one, "e")
    await one.rollback()
    await one.close()
    await other.close()
    assert emails(db_test) == ["a", "b", "c", "d"]


@many_writers
@pytest.mark.filterwarnings("default::repom.testing.SharedConnectionWarning")
async def test_independent_unit_after_an_error_of_the_outer_one(db_test: Session) -> None:
    """To write down what went wrong, for instance: it stays when the outer one is rolled back,
    if the database has undone that already. Else a warning says that in production it would."""
    add(db_test, "a")
    db_test.flush()
    with pytest.raises(LookupError):
        async with session_scope() as outer:
            try:
                await outer.execute(insert(User).values(email="a"))
            except IntegrityError:
                async with session_scope() as inner:
                    add(inner, "went wrong")
                raise LookupError from None
    assert emails(db_test) == (["a", "went wrong"] if kind == "postgresql" else ["a"])


@pytest.mark.skipif(kind != "sqlite", reason="SQLite has one writer at a time")
async def test_writer_inside_a_writer_is_refused_as_in_production(db_test: Session) -> None:
    """It would wait for the lock that the outer one holds."""
    async with session_scope() as outer:
        add(outer, "a")
        await outer.flush()
        with pytest.raises(WouldDeadlockError, match="enclosing"):
            async with session_scope() as inner:
                add(inner, "b")
    assert emails(db_test) == ["a"]


async def test_unit_that_waits_for_one_that_does_not_end(
    db_test: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says so, and where both are."""
    monkeypatch.setattr("repom.testing.turns.TURN_TIMEOUT", 0.2)

    if get_database().url.database is None:
        pytest.skip("a memory database has no readers beside its writer")

    async def work() -> None:
        async with session_scope(sqlite_begin="DEFERRED") as session:
            await session.execute(select(User))

    started = asyncio.create_task(asyncio.sleep(0))  # before the outer one, so not inside of it
    inner = asyncio.create_task(_after(started, work))
    async with session_scope() as outer:
        add(outer, "a")
        await outer.flush()
        with pytest.raises(WouldDeadlockError, match=r"test_units.py:\d+ has waited 0.2 s .*"):
            await inner
        add(outer, "b")
    assert emails(db_test) == ["a", "b"]


async def _after(first: Any, work: Any) -> None:
    await first
    await asyncio.sleep(0.05)
    await work()


# --- what COMMIT would say


@pytest.mark.skipif(kind == "mysql", reason="MariaDB checks at once")
async def test_deferred_constraint(db_test: Session) -> None:
    """Checked by every commit, and not before it."""
    async with session_scope() as session:
        order = Order(user_id=1)
        session.add(order)
        await session.flush()
        session.add(User(id=1, email="a"))
    with pytest.raises(IntegrityError):
        async with session_scope() as session:
            session.add(Order(user_id=2))
            await session.flush()
    with pytest.raises(IntegrityError):
        async with session_scope() as session:
            await session.delete(await session.get(User, 1))
    async with session_scope() as session:  # deferred again
        await session.delete(await session.get(User, 1))
        await session.flush()
        await session.delete(await session.get(Order, order.id))
    assert emails(db_test) == []


@only_postgresql
async def test_aborted_transaction(db_test: Session) -> None:
    """An error that was swallowed comes back when it is committed."""
    add(db_test, "a")
    db_test.flush()
    with pytest.raises(TransactionAbortedError) as caught:
        async with session_scope() as session:
            with pytest.raises(IntegrityError):
                await session.execute(insert(User).values(email="a"))
    assert "duplicate key" in str(caught.value.__cause__)
    with (
        pytest.raises(TransactionAbortedError),
        sync_session_scope() as sync_session,
        pytest.raises(IntegrityError),
    ):
        sync_session.execute(insert(User).values(email="a"))
    assert emails(db_test) == ["a"]


@only_postgresql
async def test_statement_in_an_aborted_transaction(db_test: Session) -> None:
    """Is refused, also when others have worked meanwhile; a savepoint heals what it encloses."""
    session = await get_async_session()
    add(session, "a")
    await session.flush()
    with pytest.raises(IntegrityError):
        async with session.begin_nested():
            await session.execute(insert(User).values(email="a"))
    with pytest.raises(IntegrityError):
        await session.execute(insert(User).values(email="a"))
    add(db_test, "b")
    db_test.flush()
    with pytest.raises(DBAPIError, match="current transaction is aborted"):
        await session.execute(select(User))
    await session.rollback()
    add(session, "c")
    await session.commit()
    await session.close()
    assert emails(db_test) == ["b", "c"]


# --- the transaction of the test


@pytest.mark.parametrize("sql", ["COMMIT", "rollback", "BEGIN", "  commit work"])
async def test_transaction_ended_by_hand(async_db_test: AsyncSession, sql: str) -> None:
    """Is refused, with the name of the test."""
    add(async_db_test, "a")
    await async_db_test.flush()
    with pytest.raises(InnerCommitError, match=r"test_units.py::test_transaction_ended_by_hand"):
        await async_db_test.execute(text(sql))
    assert (await async_db_test.scalars(select(User.email))).all() == ["a"]


DDL = ["CREATE TABLE more (id INTEGER)", "DROP TABLE orders", "ALTER TABLE users ADD more INTEGER"]


@pytest.mark.parametrize("sql", DDL)
async def test_schema_changed_by_a_test(async_db_test: AsyncSession, sql: str) -> None:
    """Is rolled back, too; MariaDB cannot, so there it is refused."""
    if kind == "mysql":
        with pytest.raises(InnerCommitError, match="commits before and after"):
            await async_db_test.execute(text(sql))
    else:
        await async_db_test.execute(text(sql))
    add(async_db_test, "a")
    await async_db_test.commit()
    assert (await async_db_test.scalars(select(User.email))).all() == ["a"]


async def test_all_tables_are_as_before(db_test: Session) -> None:
    """After the tests above."""
    assert db_test.scalars(select(Order)).all() == []


async def test_savepoints_of_the_test(async_db_test: AsyncSession) -> None:
    """Nested, released and rolled back."""
    add(async_db_test, "a")
    async with async_db_test.begin_nested():
        add(async_db_test, "b")
        with pytest.raises(LookupError):
            async with async_db_test.begin_nested():
                add(async_db_test, "c")
                await async_db_test.flush()
                raise LookupError
        async with session_scope(sqlite_begin="DEFERRED") as session:
            add(session, "d")
    await async_db_test.commit()
    found = (await async_db_test.scalars(select(User.email).order_by(User.email))).all()
    assert found == ["a", "b", "d"]


async def test_rollback_only(db_test: Session) -> None:
    """As ever."""
    async with session_scope():
        current_scope().rollback_only()
        await create("a")
    assert emails(db_test) == []


async def test_bulk_and_lastrowid(async_db_test: AsyncSession) -> None:
    """What SQLAlchemy reads off a cursor is there: keys, counts, many rows at once."""
    async_db_test.add_all([User(email=f"{n}") for n in range(10)])
    await async_db_test.flush()
    rows = [{"email": f"x{n}"} for n in range(10)]
    await async_db_test.execute(insert(User), rows)
    connection = await async_db_test.connection()
    await connection.execute(insert(User), [{"email": f"y{n}"} for n in range(3)])
    changed: Any = await async_db_test.execute(
        update(User).where(User.email.like("x%")).values(email=User.email + "!")
    )
    assert changed.rowcount == 10
    found = (await async_db_test.scalars(select(User).order_by(User.id))).all()
    assert len(found) == 23
    assert len({user.id for user in found}) == 23
    streamed = await async_db_test.stream_scalars(select(User.email).order_by(User.id))
    assert [email async for email in streamed] == [user.email for user in found]


async def test_cancelled_statement(db_test: Session) -> None:
    """Its unit of work is undone, and the connection goes on."""
    slow = {
        "postgresql": "SELECT pg_sleep(20)",
        "mysql": "SELECT SLEEP(0.3)",
        "sqlite": "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n"
        " WHERE i < 1000000) SELECT max(i) FROM n",
    }
    for _ in range(3):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05), session_scope() as session:
                add(session, "a")
                await session.flush()
                await session.execute(text(slow[kind]))
        assert emails(db_test) == []
    async with session_scope() as session:
        add(session, "a")
    assert emails(db_test) == ["a"]


def test_thread_that_outlives_its_unit(db_test: Session) -> None:
    """Blocked by another thread's unit, it gets its turn when that ends."""
    begun, go_on = threading.Event(), threading.Event()

    def first() -> None:
        with sync_session_scope(sqlite_begin="DEFERRED") as session:
            add(session, "first")
            session.flush()
            begun.set()
            assert go_on.wait(10)

    def second() -> None:
        with sync_session_scope(sqlite_begin="DEFERRED") as session:
            assert emails(session) == ["first"]

    with ThreadPoolExecutor(2) as threads:
        one = threads.submit(first)
        assert begun.wait(10)
        other = threads.submit(second)
        go_on.set()
        one.result()
        other.result()
    assert emails(db_test) == ["first"]


_kept: list[Any] = []


async def test_session_kept_for_later() -> None:
    """For the next test."""
    _kept.append(await get_async_session())


async def test_session_of_a_test_that_has_ended(db_test: Session) -> None:
    """Opens a connection of the test that uses it."""
    session = _kept.pop()
    add(session, "a")
    await session.commit()
    await session.close()
    assert emails(db_test) == ["a"]
