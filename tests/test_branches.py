"""Units of work that end by a two-phase commit, on real servers."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError, IntegrityError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from repom import (
    atomic,
    current_scope,
    current_session,
    current_sync_session,
    on_commit,
    run_transaction,
    session_scope,
    sync_session_scope,
)
from repom.context import surroundings
from repom.current import Outside
from repom.database import Database
from repom.errors import (
    CommitOutcomeUnknown,
    CommitPendingError,
    TransactionAbortedError,
    TransactionError,
    TwoPhaseUnavailableError,
)
from repom.middleware import DatabaseSessionMiddleware
from repom.recovery import Recovery
from repom.registry import Databases
from repom.transaction_ids import TransactionId, fingerprint
from tests.support.asgi import LifespanFailed, lifespan, request
from tests.support.faultproxy import FaultProxy
from tests.support.private_postgres import preparing_server, preparing_url
from tests.support.reader import execute, rows

__all__ = ["preparing_server", "preparing_url"]

INSERT = text("INSERT INTO t VALUES (:id)")


def with_driver(url: str, driver: str) -> str:
    parsed = make_url(url)
    return parsed.set(drivername=f"{parsed.get_backend_name()}+{driver}").render_as_string(False)


class Pair:
    """A PostgreSQL and a MariaDB, each with a table `t`."""

    def __init__(self, pg_url: str, my_url: str) -> None:
        self.pg_url, self.my_url = pg_url, my_url
        self._known: set[str] = set()
        for url in (pg_url, my_url):
            execute(url, "CREATE TABLE t (id INTEGER PRIMARY KEY)")
        execute(self.pg_url, "CREATE TABLE late (id INTEGER REFERENCES t INITIALLY DEFERRED)")

    def written(self) -> tuple[set[int], set[int]]:
        """The ids that are committed on each."""
        urls = (self.pg_url, self.my_url)
        pg, my = ({id_ for (id_,) in rows(url, "SELECT id FROM t")} for url in urls)
        return pg, my

    def used_as(self, *databases: Database) -> None:
        self._known.add(fingerprint(database.url for database in databases))

    def roll_back_the_rest(self) -> int:
        """Roll back what a test has left prepared on MariaDB; return how much that was."""
        ids = [TransactionId.parse(row[3].decode()) for row in rows(self.my_url, "XA RECOVER")]
        left = [id_ for id_ in ids if id_ is not None and id_.known in self._known]
        for id_ in left:
            execute(self.my_url, f"XA ROLLBACK '{id_}'")
        return len(left)

    def prepared(self) -> list[str]:
        """What is prepared on PostgreSQL."""
        return [gid for (gid,) in rows(self.pg_url, "SELECT gid FROM pg_prepared_xacts")]


@pytest.fixture
def pair(preparing_url: str, mysql_url: str) -> Iterator[Pair]:
    pair = Pair(preparing_url, mysql_url)
    yield pair
    assert pair.roll_back_the_rest() == 0


@contextmanager
def named(**databases: Database) -> Iterator[None]:
    """Where databases have these names, as inside an application."""
    outside = Outside(Databases(databases), place="a test", advice="")
    token = surroundings.set(outside)
    try:
        yield
    finally:
        surroundings.reset(token)


@contextmanager
def both(
    pair: Pair, *, pg: str = "psycopg", my: str = "aiomysql", pg_url: str = ""
) -> Iterator[tuple[Database, Database]]:
    """The two databases by the names "pg" and "my"."""
    databases = (
        Database(with_driver(pg_url or pair.pg_url, pg)),
        Database(with_driver(pair.my_url, my)),
    )
    pair.used_as(*databases)
    with named(pg=databases[0], my=databases[1]):
        yield databases


def recover(*databases: Database) -> str:
    """End what is left, by the URLs that the application has used; return how."""
    recovery = Recovery({database.url.drivername: database for database in databases})
    # The server of MariaDB tells also of what other tests do there.
    (unit,) = (unit for unit in recovery.find() if recovery.verdict(unit) != "unknown")
    how = recovery.verdict(unit)
    recovery.end(unit, how)
    assert all(recovery.verdict(unit) == "unknown" for unit in recovery.find())
    return how


async def insert(name: str, id_: int = 1) -> None:
    await current_session(name).execute(INSERT, {"id": id_})


async def work_on(order: tuple[str, ...], id_: int = 1) -> None:
    for name in order:
        await insert(name, id_)


ORDERS = [("pg", "my"), ("my", "pg")]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("my", ["aiomysql", "asyncmy"])
async def test_all_commit(pair: Pair, my: str, order: tuple[str, str]) -> None:
    pytest.importorskip(my)
    called = []
    with both(pair, my=my) as databases:
        async with session_scope(order[0], two_phase=True):
            await work_on(order)
            on_commit(lambda: called.append(pair.written()))
        for database in databases:
            await database.dispose()
    assert pair.written() == ({1}, {1})
    assert called == [({1}, {1})]


@pytest.mark.parametrize("pg", ["psycopg", "psycopg2"])
def test_sync_sessions(pair: Pair, pg: str) -> None:
    with both(pair, pg=pg, my="pymysql") as databases:
        with sync_session_scope("pg", two_phase=True):
            for name in ("pg", "my"):
                current_sync_session(name).execute(INSERT, {"id": 1})
        with pytest.raises(ZeroDivisionError), sync_session_scope("my", two_phase=True):
            for name in ("my", "pg"):
                current_sync_session(name).execute(INSERT, {"id": 2})
            raise ZeroDivisionError
        for database in databases:
            database.dispose_sync()
    assert pair.written() == ({1}, {1})


@pytest.mark.parametrize("order", ORDERS)
async def test_a_prepare_that_fails_rolls_all_back(pair: Pair, order: tuple[str, str]) -> None:
    """A constraint that is checked late is checked by PREPARE: nothing is committed yet. The
    connections can be used again."""
    with both(pair) as databases:
        for _ in range(2):
            with pytest.raises(IntegrityError):
                async with session_scope("pg", two_phase=True):
                    await work_on(order)
                    await current_session("pg").execute(text("INSERT INTO late VALUES (77)"))
            assert pair.written() == (set(), set())
        async with session_scope("pg", two_phase=True):
            await work_on(order)
        for database in databases:
            await database.dispose()
    assert pair.written() == ({1}, {1})


async def test_a_swallowed_error_is_refused(pair: Pair) -> None:
    """PostgreSQL would answer PREPARE with a silent rollback."""
    with both(pair) as databases:
        with pytest.raises(TransactionAbortedError) as refused:
            async with session_scope("my", two_phase=True):
                await insert("my")
                with pytest.raises(DBAPIError):
                    await current_session("pg").execute(text("SELECT * FROM nope"))
        assert "nope" in str(refused.value.__cause__)
        for database in databases:
            await database.dispose()
    assert pair.written() == (set(), set())


async def test_savepoints(pair: Pair) -> None:
    with both(pair) as databases:
        async with session_scope("pg", two_phase=True):
            for name in ("pg", "my"):
                await insert(name)
                with pytest.raises(IntegrityError):
                    async with atomic(name):
                        await insert(name, 2)
                        await insert(name, 1)
        for database in databases:
            await database.dispose()
    assert pair.written() == ({1}, {1})


async def test_a_deadlock_on_mysql(pair: Pair) -> None:
    """The server has rolled its branch back and wants to hear so: that connection is as good as
    before."""
    execute(pair.my_url, "INSERT INTO t VALUES (1), (2)")
    update = text("UPDATE t SET id = id + 100 WHERE id = :id")
    with both(pair) as databases:
        signal = text("SIGNAL SQLSTATE '40001' SET MYSQL_ERRNO = 1213, MESSAGE_TEXT = 'Deadlock'")
        with pytest.raises(DBAPIError):
            async with session_scope("my", two_phase=True):
                await insert("pg")
                await current_session("my").execute(update, {"id": 1})
                await current_session("my").execute(signal)
        async with session_scope("my", two_phase=True):
            await work_on(("pg", "my"), 3)
        for database in databases:
            await database.dispose()
    assert pair.written() == ({3}, {1, 2, 3})


async def test_one_database_commits_in_one_phase(pair: Pair) -> None:
    """What the others do not take part in costs no PREPARE, and leaves nothing behind."""
    async with FaultProxy(pair.pg_url + "?sslmode=disable") as proxy:
        with both(pair, pg_url=proxy.url) as databases:
            async with session_scope("pg", two_phase=True):
                await insert("pg")
            async with session_scope("my", two_phase=True):
                await insert("my")
            for database in databases:
                await database.dispose()
        assert proxy.sent(b"PREPARE") == 0
    assert pair.written() == ({1}, {1})


async def test_what_mariadb_is_asked(pair: Pair) -> None:
    """As much as the guide says, and nothing when the connection goes back to its pool."""
    async with FaultProxy(pair.my_url) as proxy:
        databases = (
            Database(with_driver(pair.pg_url, "psycopg")),
            Database(with_driver(proxy.url, "aiomysql")),
        )
        pair.used_as(*databases)
        with named(pg=databases[0], my=databases[1]):
            for number, order in enumerate([("my",), ("pg", "my")], start=1):
                async with session_scope("pg", two_phase=True):
                    await work_on(order, 10 * number)  # connects
                before = proxy.round_trips
                async with session_scope("pg", two_phase=True):
                    await work_on(order, 10 * number + 1)
                # The statement, XA BEGIN, XA END, and one COMMIT, or PREPARE and COMMIT.
                assert proxy.round_trips - before == 3 + number
            for database in databases:
                await database.dispose()


async def test_early_commits_begin_anew(pair: Pair) -> None:
    """`current_scope().commit()` is a two-phase commit, too, and the next one has other ids."""
    with both(pair) as databases:
        async with session_scope("pg", two_phase=True):
            await work_on(("pg", "my"), 1)
            await current_scope().commit()
            assert pair.written() == ({1}, {1})
            await work_on(("my", "pg"), 2)
        for database in databases:
            await database.dispose()
    assert pair.written() == ({1, 2}, {1, 2})


async def test_the_first_transaction_must_not_end_before_the_others(pair: Pair) -> None:
    """Recovery would take it for committed. It may where no other was open."""
    with both(pair) as databases:
        with pytest.raises(TransactionError, match="was ended before"):
            async with session_scope("pg", two_phase=True) as session:
                await work_on(("pg", "my"))
                await session.rollback()
                await work_on(("pg",), 2)
        assert pair.written() == (set(), set())
        async with session_scope("pg", two_phase=True) as session:
            await insert("pg")
            await session.rollback()
            await work_on(("my", "pg"), 3)
        for database in databases:
            await database.dispose()
    assert pair.written() == ({3}, {3})


async def test_repeated_after_a_conflict(pair: Pair) -> None:
    attempts: list[int] = []

    async def work() -> None:
        await work_on(("my", "pg"), len(attempts))
        attempts.append(len(attempts))
        if len(attempts) == 1:
            raise_conflict = "DO $$ BEGIN RAISE SQLSTATE '40001'; END $$"
            await current_session("pg").execute(text(raise_conflict))

    with both(pair) as databases:
        await run_transaction(work, database="my", two_phase=True)
        for database in databases:
            await database.dispose()
    assert pair.written() == ({1}, {1})


async def test_what_only_reads_prepares_nothing(pair: Pair) -> None:
    """It has nothing to commit."""
    with both(pair) as databases:
        async with session_scope("pg", read_only=True, two_phase=True):
            for name in ("pg", "my"):
                assert await current_session(name).scalar(text("SELECT count(*) FROM t")) == 0
        for database in databases:
            await database.dispose()


# --- lost connections


@pytest.mark.parametrize("when", ["before", "after"])
async def test_lost_in_the_commit_that_decides(pair: Pair, when: Any) -> None:
    """Nobody knows; recovery finds out, and ends the rest alike."""
    async with FaultProxy(pair.pg_url + "?sslmode=disable") as proxy:
        with both(pair, pg_url=proxy.url) as databases:
            proxy.cut(b"COMMIT PREPARED", when)
            with pytest.raises(CommitOutcomeUnknown):
                async with session_scope("pg", two_phase=True):
                    await work_on(("pg", "my"))
            for database in databases:
                await database.dispose()
            # In a thread, since the proxy is in the loop.
            how = await asyncio.to_thread(recover, *databases)
    assert how == ("roll back" if when == "before" else "commit")
    assert pair.written() == ((set(), set()) if when == "before" else ({1}, {1}))


async def test_lost_in_the_commit_of_another(pair: Pair) -> None:
    """It is committed, and one database has yet to hear of it."""
    async with FaultProxy(pair.pg_url + "?sslmode=disable") as proxy:
        with both(pair, pg_url=proxy.url) as databases:
            proxy.cut(b"COMMIT PREPARED", "before")
            with pytest.raises(CommitPendingError) as caught:
                async with session_scope("my", two_phase=True):
                    await work_on(("my", "pg"))
            # The scope's own database was asked for as the default one.
            assert (caught.value.committed, caught.value.pending) == (["default"], ["pg"])
            assert caught.value.unit in pair.prepared()[0]
            assert pair.written() == (set(), {1})
            for database in databases:
                await database.dispose()
            assert await asyncio.to_thread(recover, *databases) == "commit"
    assert pair.written() == ({1}, {1})


async def test_a_branch_that_has_only_read(pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    """It takes part like the others; and MariaDB rolls it back in a way of its own."""
    async with FaultProxy(pair.pg_url + "?sslmode=disable") as proxy:
        with both(pair, pg_url=proxy.url) as databases:
            async with session_scope("my", two_phase=True) as session:
                await session.execute(text("SELECT * FROM t"))
                await insert("pg")
            assert pair.written() == ({1}, set())
            proxy.cut(b"PREPARE TRANSACTION", "after")
            with pytest.raises(DBAPIError):
                async with session_scope("my", two_phase=True) as session:
                    await session.execute(text("SELECT * FROM t"))
                    await insert("pg", 2)
            assert "was not committed" in caplog.text
            for database in databases:
                await database.dispose()
            assert await asyncio.to_thread(recover, *databases) == "roll back"
    assert pair.written() == ({1}, set())


@pytest.mark.parametrize("when", ["before", "after"])
async def test_lost_in_prepare(pair: Pair, when: Any, caplog: pytest.LogCaptureFixture) -> None:
    """It may be prepared, so the one before it stays so, as the sign that nothing is committed."""
    async with FaultProxy(pair.pg_url + "?sslmode=disable") as proxy:
        with both(pair, pg_url=proxy.url) as databases:
            proxy.cut(b"PREPARE TRANSACTION", when)
            with pytest.raises(DBAPIError):
                async with session_scope("my", two_phase=True):
                    await work_on(("my", "pg"))
            assert "was not committed" in caplog.text
            assert len(pair.prepared()) == (when == "after")
            for database in databases:
                await database.dispose()
            assert await asyncio.to_thread(recover, *databases) == "roll back"
    assert pair.written() == (set(), set())


# --- where it cannot be done


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("postgresql+asyncpg://h/d", "postgresql\\+psycopg://"),
        ("sqlite://", "sqlite\\+aiosqlite has no two-phase commit"),
    ],
)
async def test_drivers_without_it(url: str, told: str) -> None:
    """Refused at the first use, and by the middleware when the application starts."""
    database = Database(url)
    with named(default=database), pytest.raises(TwoPhaseUnavailableError, match=told):
        async with session_scope(two_phase=True):
            raise AssertionError
    app = DatabaseSessionMiddleware(Starlette(), database, two_phase=True)
    with pytest.raises(LifespanFailed, match=told):
        async with lifespan(app):
            raise AssertionError


async def test_a_server_that_prepares_nothing(postgres_url: str, mysql_url: str) -> None:
    """PostgreSQL as it is installed: the error says which setting to change. Nothing is left."""
    if rows(postgres_url, "SHOW max_prepared_transactions") != [("0",)]:
        pytest.skip("this server prepares transactions")
    pair = Pair(postgres_url, mysql_url)
    with both(pair) as databases:
        for order in ORDERS:
            with pytest.raises(TwoPhaseUnavailableError, match="Set max_prepared_transactions"):
                async with session_scope("pg", two_phase=True):
                    await work_on(order)
        for database in databases:
            await database.dispose()
    assert pair.written() == (set(), set())


async def test_a_database_without_a_name(pair: Pair) -> None:
    """Recovery would not know of it."""
    with both(pair) as (pg, _):
        stranger = Database(with_driver(pair.my_url, "aiomysql"))
        with pytest.raises(TwoPhaseUnavailableError, match="has no name"):
            async with session_scope("pg", two_phase=True):
                await insert("pg")
                current_session(stranger)
        await pg.dispose()
    assert pair.written() == (set(), set())


# --- the middleware


def serve(
    endpoint: Callable[[Request], Any], pg: Database, my: Database, **options: Any
) -> Starlette:
    app = Starlette(routes=[Route("/", endpoint, methods=["POST"])])
    app.add_middleware(
        DatabaseSessionMiddleware, database={"pg": pg, "my": my}, two_phase=True, **options
    )
    return app


async def test_requests(pair: Pair) -> None:
    """A 201 is committed on both, an error on neither."""

    async def endpoint(request: Request) -> Response:
        status = int(request.query_params["status"])
        await work_on(("pg", "my"), status)
        return Response(status_code=status)

    with both(pair) as (pg, my):
        app = serve(endpoint, pg, my)
        async with lifespan(app):
            for status in (201, 409):
                assert (await request(app, "POST", f"/?status={status}")).status == status
    assert pair.written() == ({201}, {201})


async def test_a_request_that_is_repeated(pair: Pair) -> None:
    """A conflict that PREPARE finds has left nothing, and every attempt has its own branches."""
    execute(
        pair.pg_url,
        "CREATE FUNCTION lose() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN RAISE EXCEPTION 'conflict' USING ERRCODE = '40001'; END $$;"
        " CREATE CONSTRAINT TRIGGER lose AFTER INSERT ON t DEFERRABLE INITIALLY DEFERRED"
        " FOR EACH ROW WHEN (NEW.id = 1) EXECUTE FUNCTION lose()",
    )

    async def endpoint(request: Request) -> Response:
        await work_on(("my", "pg"), current_scope().attempt)
        return Response(status_code=201)

    with both(pair) as (pg, my):
        assert (await request(serve(endpoint, pg, my, retries=1), "POST")).status == 201
        await pg.dispose()
        await my.dispose()
    assert pair.written() == ({2}, {2})


async def test_a_request_of_which_a_part_is_pending(
    pair: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    """The client is not told that all is well, and the log says what is left to do."""

    async def endpoint(request: Request) -> Response:
        await work_on(("my", "pg"))
        return Response(status_code=201)

    async with FaultProxy(pair.pg_url + "?sslmode=disable") as proxy:
        with both(pair, pg_url=proxy.url) as (pg, my):
            app = serve(endpoint, pg, my)
            proxy.cut(b"COMMIT PREPARED", "before")
            answer = await request(app, "POST")
            assert answer.status == 500
            assert isinstance(answer.exception, CommitPendingError)
            assert "COMMIT of POST / is not confirmed by all databases" in caplog.text
            await pg.dispose()
            await my.dispose()
            assert await asyncio.to_thread(recover, pg, my) == "commit"
    assert pair.written() == ({1}, {1})
