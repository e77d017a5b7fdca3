"""The table of docs/frameworks.md, cell by cell: one application in the idiom of each framework.

A column has a test of its name, which every framework has to pass, and which says what the column
means. What is special to one framework is in the file of its name in tests/integration.
"""

import http.client
import re
from pathlib import Path

import pytest
from sqlalchemy import insert

from repom import Database
from tests.frameworks import work
from tests.frameworks.running import WITHOUT_LIFESPAN, running
from tests.frameworks.table import COLUMNS, NO, TABLE, Framework
from tests.integration.test_sockets import client_of, post
from tests.middleware.notes import (
    NOTE,
    Sight,
    connections_in_use,
    create_notes,
    notes,
    notes_database,
)
from tests.support.asgi import Message, request, websocket
from tests.support.polling import block_until, until
from tests.support.reader import connections, execute
from tests.support.sockets import serve

APPS = Path(__file__).parent / "apps"
DOCS = Path(__file__).parents[2] / "docs"

every_framework = pytest.mark.parametrize("framework", TABLE, ids=lambda each: each.module)

START, BODY = "http.response.start", "http.response.body"


def kinds(messages: list[Message]) -> list[str]:
    return [message["type"] for message in messages]


# --- the columns


@every_framework
def test_install(framework: Framework, postgres_url: str) -> None:
    """Installed as its users do it, behind a real server: the client has what was promised, and
    when the server has stopped no connection is left."""
    create_notes(postgres_url)
    app = framework.make(Database(postgres_url))
    lifespan = "off" if framework.name in WITHOUT_LIFESPAN else "on"
    with serve(app, lifespan=lifespan) as base_url, client_of(base_url) as client:
        for path, status in {"/returned": 404, "/refused": 409}.items():
            assert (path, post(client, path)) == (path, status)
        assert post(client, "/created") == 201
        assert notes(postgres_url) == ["a"]
        client.request("POST", "/stream-broken")
        with pytest.raises(http.client.IncompleteRead):
            client.getresponse().read()
    assert notes(postgres_url) == ["a"]
    block_until(lambda: not connections(postgres_url))


@every_framework
async def test_commit(framework: Framework, database: Database, database_url: str) -> None:
    """`current_session()` in a task of the request, at some depth, is the request's; what it has
    written is committed, and its connection is back, when the first message leaves."""
    sight = Sight(database, database_url)
    async with running(framework, database) as app:
        response = await request(app, "POST", "/created", on_message=sight)
    assert (response.status, response.complete, response.exception) == (201, True, None)
    assert sight.seen[0] == ("start", ["a"], 0)


@every_framework
async def test_rollback(framework: Framework, database: Database, database_url: str) -> None:
    """An error that is returned, raised for the client, raised and answered by a handler of the
    application, or not foreseen by anybody: nothing of the request is there when it leaves."""
    statuses = {"/returned": 404, "/raised": 403, "/handled": 422, "/crash": 500}
    sight = Sight(database, database_url)
    async with running(framework, database) as app:
        for path, status in statuses.items():
            response = await request(app, "POST", path, on_message=sight)
            assert (path, response.status, response.complete) == (path, status, True)
    assert {(rows != [], in_use) for _, rows, in_use in sight.seen} == {(False, 0)}


@every_framework
async def test_failed_commit(framework: Framework, deferring: Database, deferring_url: str) -> None:
    """The application's own handler answers for what COMMIT raises; what has no handler is a
    500. One response, and never a success."""
    sight = Sight(deferring, deferring_url)
    async with running(framework, deferring) as app:
        refused = await request(app, "POST", "/refused", on_message=sight)
        doomed = await request(app, "POST", "/doomed", on_message=sight)
        assert (await request(app, "POST", "/created")).status == 201
    assert (refused.status, refused.complete, refused.exception) == (409, True, None)
    assert b"IntegrityError" in refused.body
    assert (doomed.status, doomed.complete) == (500, True)
    assert kinds(refused.messages).count(START) == kinds(doomed.messages).count(START) == 1
    assert {(rows != [], in_use) for _, rows, in_use in sight.seen} == {(False, 0)}


@every_framework
async def test_sync_code(framework: Framework, database: Database, database_url: str) -> None:
    """`current_sync_session()` in the threads that the framework has for sync code."""
    sight = Sight(database, database_url)
    async with running(framework, database) as app:
        response = await request(app, "POST", "/sync", on_message=sight)
    assert (response.status, response.complete, response.exception) == (201, True, None)
    assert sight.seen[0] == ("start", ["a"], 0)
    assert database.engine.pool.checkedout() == 0  # type: ignore[attr-defined]


@every_framework
async def test_sync_code_whose_commit_fails(
    framework: Framework, deferring: Database, deferring_url: str
) -> None:
    """The same handler answers for it."""
    async with running(framework, deferring) as app:
        response = await request(app, "POST", "/sync-refused")
    assert (response.status, response.exception) == (409, None)
    assert notes(deferring_url) == []
    assert deferring.engine.pool.checkedout() == 0  # type: ignore[attr-defined]


#: The first two notes lose a conflict: a sequence does not go back with the transaction.
LOSING = """
CREATE SEQUENCE lost;
CREATE FUNCTION lose() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
  IF nextval('lost') <= 2 THEN RAISE EXCEPTION 'conflict' USING ERRCODE = '40001'; END IF;
  RETURN NEW; END $$;
"""
AT_COMMIT = "CREATE CONSTRAINT TRIGGER lose AFTER INSERT ON note DEFERRABLE INITIALLY DEFERRED"
IN_A_STATEMENT = "CREATE TRIGGER lose BEFORE INSERT ON note"


@pytest.mark.parametrize("path", ["/posted", "/sync"])
@pytest.mark.parametrize("trigger", [AT_COMMIT, IN_A_STATEMENT], ids=["commit", "statement"])
@every_framework
async def test_failed_commit_that_is_worth_another_attempt(
    framework: Framework, postgres_url: str, trigger: str, path: str
) -> None:
    """With `retries`, a conflict of its transaction with others is invisible to the client: the
    request is served once more, from its beginning. Also where the framework has an answer of its
    own for it, a 500."""
    sight: list[Message] = []
    async with notes_database(postgres_url) as database:
        execute(postgres_url, f"{LOSING} {trigger} FOR EACH ROW EXECUTE FUNCTION lose()")
        async with running(framework, database, retries=2) as app:
            response = await request(app, "POST", path, body=[b"a", b"b"], on_message=sight.append)
            assert (response.status, response.complete, response.exception) == (201, True, None)
        assert notes(postgres_url) == ["ab" if path == "/posted" else "a"]
        execute(postgres_url, "DELETE FROM note; ALTER SEQUENCE lost RESTART WITH 1")
        async with running(framework, database, retries=1) as app:
            last = await request(app, "POST", path)
        assert (last.status, last.complete) == (500, True)
        assert connections_in_use(database) == 0
    assert kinds(sight).count(START) == 1
    assert notes(postgres_url) == []


@every_framework
async def test_background(framework: Framework, deferring: Database, deferring_url: str) -> None:
    """What goes on after the response has a transaction of its own, which is committed."""
    async with running(framework, deferring) as app:
        response = await request(app, "POST", "/background")
        assert (response.status, response.complete, response.exception) == (201, True, None)
        await until(lambda: notes(deferring_url) == ["a", "later"])
        await until(lambda: not work.tasks and connections_in_use(deferring) == 0)


@every_framework
async def test_websocket(framework: Framework, deferring: Database, deferring_url: str) -> None:
    """Each message has a transaction of its own, committed when it is answered. Where the
    framework knows no WebSockets, nothing but its own error comes of one."""
    async with running(framework, deferring) as app, websocket(app, "/ws") as connection:
        for text in "abc" if framework.websocket != NO else "":
            await connection.send(text)
            assert (await connection.receive())["text"] == text
            assert notes(deferring_url)[-1] == text
    if framework.websocket == NO:
        assert not connection.accepted
        assert "can only handle ASGI/HTTP connections" in str(connection.exception)
    assert connections_in_use(deferring) == 0


@every_framework
async def test_streaming(framework: Framework, deferring: Database, deferring_url: str) -> None:
    """What a body writes is committed before its last message leaves; a body that breaks off is
    seen to be broken, and has written nothing."""
    sight = Sight(deferring, deferring_url)
    async with running(framework, deferring) as app:
        broken = await request(app, "POST", "/stream-broken")
        assert (broken.status, broken.body, broken.complete) == (200, b"ab", False)
        response = await request(app, "POST", "/stream", on_message=sight)
        assert (response.body, response.complete, response.exception) == (b"abc", True, None)
        assert sight.seen[0] == ("start", [], 0)
        assert [rows for _, rows, _ in sight.seen[:-1]] == [[]] * (len(sight.seen) - 1)
        assert sight.seen[-1] == ("body", ["b", "c"], 0)
    assert connections_in_use(deferring) == 0


@every_framework
async def test_streaming_out_of_a_cursor(framework: Framework, deferring: Database) -> None:
    """A cursor that was opened before the response starts is read while that is sent."""
    async with deferring.sessionmaker.begin() as session:
        await session.execute(insert(NOTE), [{"text": f"{number:03}"} for number in range(500)])
    async with running(framework, deferring) as app:
        response = await request(app, "POST", "/export")
    assert (response.status, response.complete, response.exception) == (200, True, None)
    assert response.body.decode() == "".join(f"{number:03}" for number in range(500))
    assert connections_in_use(deferring) == 0


@every_framework
async def test_streaming_whose_commit_fails(
    framework: Framework, deferring: Database, deferring_url: str
) -> None:
    """The client sees a broken body."""
    async with running(framework, deferring) as app:
        response = await request(app, "POST", "/stream-refused")
    assert (response.status, response.body, response.complete) == (200, b"a", False)
    assert notes(deferring_url) == []
    assert connections_in_use(deferring) == 0


@every_framework
async def test_streaming_to_a_client_that_goes_away(
    framework: Framework, deferring: Database, deferring_url: str
) -> None:
    """What the body has written is undone, and its connection is back in the pool."""
    async with running(framework, deferring) as app:
        await request(app, "POST", "/stream", disconnect_after=3)
    assert notes(deferring_url) == []
    assert connections_in_use(deferring) == 0


# --- the table


@pytest.mark.parametrize("page", ["frameworks.md", "ja/frameworks.md"])
def test_table_of_the_docs_is_the_one_that_is_tested(page: str) -> None:
    """A row of the guide, in either language, is one of `TABLE`, word for word."""
    lines = (DOCS / page).read_text("utf-8").splitlines()
    rows = [line for line in lines if line.count(" | ") == len(COLUMNS)]
    assert rows[1:] == [str(row) for row in TABLE], "\n" + "\n".join(map(str, TABLE))


@every_framework
def test_cells_say_what_the_application_does(framework: Framework) -> None:
    """Each name in a cell is used by the application that the tests of the columns run."""
    code = (APPS / f"{framework.module}.py").read_text() + (APPS / "../work.py").read_text()
    names = re.findall(r"`(.+?)`", str(framework))
    assert [name for name in names if name.removesuffix(")") not in code] == []


def test_every_column_has_its_test() -> None:
    """A column that nobody tests would be a claim."""
    assert [column for column in COLUMNS if f"test_{column}" not in globals()] == []
