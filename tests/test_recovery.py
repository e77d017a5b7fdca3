"""What a process that dies in a two-phase commit leaves, and `python -m repom.recovery`."""

import os
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from sqlalchemy.engine import make_url

import repom.recovery
from repom.database import Database
from repom.in_doubt import InDoubt
from repom.recovery import Recovery, main
from tests.support.private_postgres import PrivatePostgres, preparing_server, preparing_url
from tests.support.reader import execute, rows

__all__ = ["preparing_server", "preparing_url"]

#: Its arguments: when to die, the URLs of two databases, and the id of the row it writes on both.
APPLICATION = """
import asyncio, os, sys
from sqlalchemy import event, text
from repom import Database, current_session, session_scope

event_name, number = sys.argv[1].split()
seen = 0

def die_at_last(*args):
    global seen
    seen += 1
    if seen == int(number):
        os._exit(9)

async def main():
    for name in ("default", "two"):
        await current_session(name).execute(text(f"INSERT INTO t VALUES ({sys.argv[4]})"))

async def application(scope, receive, send):
    await main()
    await send({"type": "http.response.start", "status": 201, "headers": []})
    await send({"type": "http.response.body", "body": b""})

async def serve():
    from repom.middleware import DatabaseSessionMiddleware
    databases = {"default": Database(sys.argv[2]), "two": Database(sys.argv[3])}
    for database in databases.values():
        event.listen(database.async_engine.sync_engine, event_name, die_at_last)
    app = DatabaseSessionMiddleware(application, databases, two_phase=True)

    async def send(message):
        print(message["type"], flush=True)

    await app({"type": "http", "method": "POST", "path": "/", "headers": []}, None, send)

asyncio.run(serve())
"""


@pytest.fixture
def urls(preparing_url: str) -> Iterator[tuple[str, str]]:
    """Two databases of a server, each with a table `t`."""
    two = make_url(preparing_url).set(database="two").render_as_string(False)
    execute(preparing_url, "CREATE DATABASE two")
    for url in (preparing_url, two):
        execute(url, "CREATE TABLE t (id INTEGER PRIMARY KEY)")
    yield with_psycopg(preparing_url), with_psycopg(two)
    for (gid,) in rows(preparing_url, "SELECT gid FROM pg_prepared_xacts WHERE database = 'two'"):
        execute(two, f"ROLLBACK PREPARED '{gid}'")
    execute(preparing_url, "DROP DATABASE two WITH (FORCE)")


def with_psycopg(url: str) -> str:
    return url.replace("postgresql://", "postgresql+psycopg://")


def written(urls: tuple[str, str]) -> list[int]:
    """How many rows each has."""
    return [rows(url, "SELECT count(*) FROM t")[0][0] for url in urls]


def die(when: str, urls: tuple[str, str], id_: int = 1) -> None:
    """Let the application die before the PREPARE or the COMMIT of that number, of two."""
    died = subprocess.run(
        [sys.executable, "-c", APPLICATION, when, *urls, str(id_)],
        stdout=subprocess.PIPE,
        timeout=60,
        check=False,
    )
    # It has told its client nothing.
    assert (died.returncode, died.stdout) == (9, b"")


def named(urls: tuple[str, str]) -> list[str]:
    return [f"{name}={url}" for name, url in zip(("default", "two"), urls, strict=True)]


MOMENTS = [
    ("prepare_twophase 2", "roll back", 0),  # only the first is prepared
    ("commit_twophase 1", "roll back", 0),  # all are
    ("commit_twophase 2", "commit", 1),  # the first has committed
]


@pytest.mark.parametrize(("when", "verdict", "rows_left"), MOMENTS)
def test_what_a_crash_leaves_is_ended(
    urls: tuple[str, str],
    capsys: pytest.CaptureFixture[str],
    when: str,
    verdict: str,
    rows_left: int,
) -> None:
    """It is shown, with what will be done, and nothing is changed; with --end it is done, so that
    both databases agree; and then there is nothing."""
    die(when, urls)
    before = written(urls)
    assert main(named(urls)) == 1
    shown = capsys.readouterr().out
    assert shown.endswith(f": {verdict}\n")
    assert written(urls) == before

    assert main([*named(urls), "--end", "--wait", "0"]) == 0
    assert ("committed" if verdict == "commit" else "rolled back") in capsys.readouterr().out
    assert written(urls) == [rows_left, rows_left]

    assert main(named(urls)) == 0
    assert capsys.readouterr().out == ""


def test_it_outlives_the_server(urls: tuple[str, str], preparing_server: PrivatePostgres) -> None:
    """What is prepared survives a power cut."""
    die("commit_twophase 2", urls)
    preparing_server.crash()
    preparing_server.start()
    assert main([*named(urls), "--end", "--wait", "0"]) == 0
    assert written(urls) == [1, 1]


def test_other_databases_are_no_reason_to_end_anything(
    urls: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Who asks one of two could take what it sees for all there is; by hand it can be ended."""
    die("commit_twophase 2", urls)
    assert main([f"two={urls[1]}"]) == 1
    assert capsys.readouterr().out.endswith(": unknown\n")
    assert main([f"two={urls[1]}", "--end", "--wait", "0"]) == 1
    assert "left as it is" in capsys.readouterr().out
    assert written(urls) == [1, 0]

    (unit,) = find(urls)
    assert main([f"two={urls[1]}", "--commit", unit.unit]) == 0
    assert written(urls) == [1, 1]


def test_by_hand(urls: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    """Where all are prepared, both ends are possible."""
    for how, rows_left in (("--rollback", 0), ("--commit", 1)):
        die("commit_twophase 1", urls)
        (unit,) = find(urls)
        assert main([*named(urls), how, unit.unit]) == 0
        assert written(urls) == [rows_left, rows_left]
    assert main([*named(urls), "--commit", unit.unit]) == 2
    assert "nothing of that unit of work is prepared" in capsys.readouterr().err


def find(urls: tuple[str, str]) -> list[InDoubt]:
    return Recovery({"default": Database(urls[0]), "two": Database(urls[1])}).find()


def test_what_was_not_there_before_the_wait_is_let_be(
    urls: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody is working at its end."""
    die("commit_twophase 1", urls)
    (left_over,) = find(urls)
    waited = []

    def meanwhile(seconds: float) -> None:
        waited.append(seconds)
        die("commit_twophase 1", urls, 2)

    # Of that module alone: `subprocess` sleeps, too.
    monkeypatch.setattr(repom.recovery, "time", SimpleNamespace(sleep=meanwhile))
    assert main([*named(urls), "--end"]) == 0
    assert waited == [60.0]
    (new,) = find(urls)
    assert new.unit != left_over.unit
    assert main([*named(urls), "--rollback", new.unit]) == 0


def test_what_others_have_prepared_is_not_ours(urls: tuple[str, str]) -> None:
    execute(urls[0], "BEGIN; INSERT INTO t VALUES (1); PREPARE TRANSACTION 'of somebody else'")
    assert main(named(urls)) == 0
    execute(urls[0], "ROLLBACK PREPARED 'of somebody else'")


def test_a_database_that_does_not_answer(
    urls: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is ended: that one might have told more."""
    die("commit_twophase 1", urls)
    dead = "dead=postgresql+psycopg://u:s3cret@127.0.0.1:1/d"
    assert main([*named(urls), dead, "--end", "--wait", "0"]) == 2
    said = capsys.readouterr().err
    assert "cannot connect" in said
    assert "s3cret" not in said
    assert main([*named(urls), "--end", "--wait", "0"]) == 0


def test_mariadb(preparing_url: str, mysql_url: str) -> None:
    """A branch on each kind of server."""
    urls = (with_psycopg(preparing_url), mysql_url.replace("mysql://", "mysql+aiomysql://"))
    for url in urls:
        execute(url, "CREATE TABLE t (id INTEGER PRIMARY KEY)")
    for when, verdict, rows_left in MOMENTS:
        for order in (urls, (urls[1], urls[0])):
            execute(urls[0], "DELETE FROM t")
            execute(urls[1], "DELETE FROM t")
            die(when, order)
            databases = Recovery({"default": Database(order[0]), "two": Database(order[1])})
            # The server of MariaDB tells also of what other tests do there.
            (unit,) = (unit for unit in databases.find() if databases.verdict(unit) != "unknown")
            assert databases.verdict(unit) == verdict
            databases.end(unit, databases.verdict(unit))
            assert written(urls) == [rows_left, rows_left]


def test_the_databases_of_the_configuration(
    urls: tuple[str, str], tmp_path: os.PathLike[str]
) -> None:
    """Without names on the command line they are asked; as a command, it tells its status."""
    hook = os.path.join(tmp_path, "hook_of_this_test.py")
    with open(hook, "w") as file:
        file.write(
            "from repom import RepomConfig\n"
            "class Config(RepomConfig):\n"
            f"    db_url = {urls[0]!r}\n"
            f"    databases = {{'two': {urls[1]!r}}}\n"
            "make = Config\n"
        )
    environ = {**os.environ, "CONFIG_HOOK": "hook_of_this_test:make", "PYTHONPATH": str(tmp_path)}

    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "repom.recovery", *arguments],
            env=environ,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    die("commit_twophase 2", urls)
    assert command().returncode == 1
    ended = command("--end", "--wait", "0")
    assert (ended.returncode, ended.stdout.endswith(": committed\n")) == (0, True)
    assert written(urls) == [1, 1]


def test_a_url_without_a_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["postgresql://h/d"]) == 2
    assert "NAME=URL" in capsys.readouterr().err
