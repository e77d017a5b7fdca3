"""The databases of the tests, and the checks that nothing is left behind.

What must fail is run by a pytest of its own, which loads the same `conftest`.
"""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.support.polling import block_until
from tests.support.reader import ask, connect, connections, execute, open_transactions, rows
from tests.support.sockets import free_port

ROOT = Path(__file__).parent.parent
RunTests = Callable[..., str]

needs_servers = pytest.mark.usefixtures("postgres_database", "mysql_database")


@pytest.fixture
def run_tests(tmp_path: Path) -> RunTests:
    """Run the source of a test module, and return what pytest has printed."""

    def run(source: str, **env: str) -> str:
        file = tmp_path / "test_inner.py"
        file.write_text(source)
        options = ["-p", "tests.conftest", "-p", "no:cacheprovider", "-rA", "--tb=short"]
        options += ["-o", "asyncio_default_fixture_loop_scope=function"]
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-c", ROOT / "pyproject.toml", *options, file],
            cwd=ROOT,
            env={**os.environ, "CI": "", **env},
            capture_output=True,
            text=True,
        )
        return done.stdout + done.stderr

    return run


# --- databases --------------------------------------------------------------------------------


@pytest.mark.parametrize("turn", [1, 2])
def test_a_database_is_empty_for_each_test(database_url: str, turn: int) -> None:
    """The second turn does not find the table of the first, on every kind of database."""
    execute(database_url, "create table item (name varchar(20))")
    execute(database_url, "insert into item values (%s)", "100%")
    assert rows(database_url, "select * from item where name like '%%' or name = %s", "x") == [
        ("100%",)
    ]
    assert rows(database_url, "select count(*) from item where name like '1%'") == [(1,)]


@pytest.mark.parametrize("turn", [1, 2])
def test_schemas_are_removed_too(postgres_url: str, turn: int) -> None:
    """A schema that a test has made on PostgreSQL does not outlive it."""
    execute(postgres_url, "create schema other; create table other.item (id int)")


def states(url: str) -> list[str]:
    return [found.state for found in connections(url)]


@pytest.mark.parametrize("fixture", ["postgres_url", "mysql_url"])
def test_open_transactions_are_seen_at_once(fixture: str, request: pytest.FixtureRequest) -> None:
    """The count is never older than the question, however often it is asked."""
    url: str = request.getfixturevalue(fixture)
    execute(url, "create table item (id int primary key)")
    assert open_transactions(url) == 0
    with closing(connect(url)) as connection:
        for number in range(3):
            ask(connection, "begin")
            ask(connection, "select * from item" if number else "insert into item values (1)")
            assert open_transactions(url) == 1
            # The connection that asked before is gone a moment later.
            block_until(lambda: states(url) == ["idle in transaction"])
            ask(connection, "commit")
            assert open_transactions(url) == 0
            block_until(lambda: states(url) == ["idle"])


NEEDS_BOTH = "def test_one(postgres_url): pass\ndef test_two(mysql_url): pass\n"
NEEDS_BOTH += "def test_three(database_url): pass\n"


def closed_ports() -> dict[str, str]:
    where = f"user:secret@127.0.0.1:{free_port()}/test"
    return {
        "REPOM_TEST_POSTGRES_URL": f"postgresql://{where}",
        "REPOM_TEST_MYSQL_URL": f"mysql://{where}",
    }


def test_without_servers_tests_are_skipped(run_tests: RunTests) -> None:
    """A missing server skips what needs it, and the summary says how many and what to do."""
    output = run_tests(NEEDS_BOTH, **closed_ports())
    assert "1 passed, 4 skipped" in output
    assert re.search(r"no PostgreSQL server at \S+ \(.*refused.*\): start one there, or", output)
    assert "2 test(s) skipped for lack of a PostgreSQL server" in output
    assert "2 test(s) skipped for lack of a MariaDB server" in output
    assert "or set REPOM_TEST_MYSQL_URL (default mysql://root@127.0.0.1:3306/test)" in output
    assert "secret" not in output


def test_without_servers_ci_fails(run_tests: RunTests) -> None:
    """Where CI is true nothing is skipped for lack of a server."""
    output = run_tests(NEEDS_BOTH, CI="true", **closed_ports())
    assert "1 passed, 4 errors" in output
    assert "no MariaDB server at mysql://user:***@127.0.0.1" in output
    assert "secret" not in output


# --- leaks ------------------------------------------------------------------------------------

LEAKS = """
import asyncio, threading, pytest, asyncpg
from tests.support.reader import ask, connect, connections, execute
kept = []

def test_postgres(postgres_url):
    for statement in ("begin", "select 'SELECT BY TEST'"):
        kept.append(connect(postgres_url))
        ask(kept[-1], statement)

async def test_dropped(postgres_url):
    cycle = [await asyncpg.connect(postgres_url)]
    cycle.append(cycle)

def test_mysql(mysql_url):
    execute(mysql_url, "create table item (id int)")
    kept.append(connect(mysql_url))
    ask(kept[-1], "begin")
    ask(kept[-1], "insert into item values (1)")

def test_next_is_not_blamed(postgres_url, mysql_url):
    assert connections(postgres_url) == connections(mysql_url) == []

@pytest.mark.leaves_connections("to show that they are terminated")
def test_on_purpose(postgres_url):
    kept.append(connect(postgres_url))

async def test_closed_with_the_loop(postgres_url):
    connection = await asyncpg.connect(postgres_url)
    async def closing():
        try:
            yield
        finally:
            await connection.close()
    kept.append(closing())
    await anext(kept[-1])

def test_unclosed_file(postgres_url, tmp_path):
    cycle = [open(tmp_path / "file", "w")]
    cycle.append(cycle)

async def test_task():
    kept.append(asyncio.create_task(asyncio.sleep(60), name="forgotten"))

async def test_task_that_ends_now():
    kept.append(asyncio.create_task(asyncio.sleep(0)))

def test_thread():
    stop = threading.Event()
    kept.append(stop)
    threading.Thread(target=stop.wait, name="forgotten thread").start()

def test_last():
    kept[-1].set()
"""


@needs_servers
def test_leaks_are_errors_of_the_test_that_leaves_them(run_tests: RunTests) -> None:
    """A connection, an unclosed object, a task and a thread fail their test and no other."""
    output = run_tests(LEAKS)
    blamed = re.findall(r"^ERROR \S*::(test_\w+)", output, re.M)
    assert blamed == [
        "test_postgres",
        "test_dropped",
        "test_mysql",
        "test_unclosed_file",
        "test_task",
        "test_thread",
    ]
    assert "11 passed, 6 errors" in output
    assert (
        "::test_postgres left 2 connection(s) to PostgreSQL open after 1.0 s:"
        " idle in transaction (last: 'begin'), idle (last: \"select 'SELECT BY TEST'\")"
    ) in output
    assert re.search(r"::test_dropped left 1 .* and unclosed objects: .*unclosed transport", output)
    assert re.search(r"::test_unclosed_file left unclosed objects: unclosed file", output)
    assert "::test_mysql left 1 connection(s) to MariaDB open" in output
    assert "the test left 1 task(s) running: forgotten" in output
    assert "::test_thread left 1 thread(s) running: forgotten thread" in output


@needs_servers
def test_the_database_of_a_run_is_removed(
    run_tests: RunTests, postgres_url: str, mysql_url: str
) -> None:
    """A run works in a database of its own, which is gone afterwards."""
    output = run_tests(
        "def test_a(postgres_url, mysql_url):\n    print('used', postgres_url, mysql_url)"
    )
    found = re.search(r"^used \S+/(repom_test_\w+) \S+/(repom_test_\w+)$", output, re.M)
    assert found is not None
    assert not {found[1], found[2]} & {urlsplit(url).path[1:] for url in (postgres_url, mysql_url)}
    assert not rows(postgres_url, "select 1 from pg_database where datname = %s", found[1])
    assert not rows(
        mysql_url, "select 1 from information_schema.schemata where schema_name = %s", found[2]
    )
