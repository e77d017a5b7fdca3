"""examples/articles: served as `make demo` serves it, and checked against its database."""

import asyncio
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from sqlalchemy.engine import make_url

from examples.articles.__main__ import chosen_port
from tests.support.reader import execute, rows
from tests.support.sockets import PATIENCE, Process, free_port, serve_process

CHECKOUT = Path(__file__).parents[2]
SERVE = ["-m", "examples.articles"]
# uvicorn closes the connection after an exception, without having announced it.
NO_REUSE = httpx.Limits(max_keepalive_connections=0)
ARTICLES = "select title, published from articles order by id"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the demo in an empty folder, without the settings of whoever runs the tests."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(CHECKOUT))
    for name in ("DATABASE_URL", "REPOM_DATABASE_URL", "CONFIG_HOOK", "PORT"):
        monkeypatch.delenv(name, raising=False)


@contextmanager
def demo(database_url: str = "") -> Iterator[tuple[httpx.Client, Process]]:
    """The demo in a process of its own, and a client of it."""
    port = free_port()
    env = {"PORT": str(port), "DATABASE_URL": database_url}
    base_url = f"http://127.0.0.1:{port}"
    with (
        serve_process(SERVE, env, ready_url=f"{base_url}/") as process,
        httpx.Client(base_url=base_url, limits=NO_REUSE) as client,
    ):
        yield client, process


def start_in_vain(**env: str) -> str:
    """Start the demo, which must end by itself with exit code 1; what it has said."""
    command = ["env", *(f"{name}={value}" for name, value in env.items()), sys.executable, *SERVE]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert ended.returncode == 1
    return ended.stderr


def test_what_was_answered_is_what_a_second_process_reads(database_url: str) -> None:
    """201 and the article that it shows mean: the row is committed, and as it was shown."""
    with demo(database_url) as (client, _):
        created = client.post("/articles", json={"title": " Träume ", "body": "日本 😀"})
        assert created.status_code == 201
        answered = created.json()
        found = rows(database_url, "select id, title, body, published from articles")
        assert [dict(zip(answered, row, strict=True)) for row in found] == [answered]
        assert answered["title"] == "Träume"
        assert client.get(f"/articles/{answered['id']}").json() == answered
        assert client.get("/articles").json() == [answered]
        assert client.get("/database").json()["articles"] == [answered]


def test_what_no_database_could_keep_is_refused_before_it(sqlite_url: str) -> None:
    """An article that cannot be stored is a 422, whatever the database would make of it."""
    with demo(sqlite_url) as (client, _):
        for title in (None, "  ", "a\0", "a" * 201):
            assert client.post("/articles", json={"title": title}).status_code == 422


def test_every_way_to_fail_leaves_nothing(database_url: str) -> None:
    """After a 404, an exception and a failed COMMIT, no row is left and nothing was announced."""
    with demo(database_url) as (client, process):
        for trouble, status in (("not-found", 404), ("exception", 500), ("commit", 409)):
            answer = client.post(f"/trouble/{trouble}", json={"title": trouble})
            assert (answer.status_code, rows(database_url, ARTICLES)) == (status, []), trouble
        assert "nothing was kept" in answer.json()["detail"]
        assert rows(database_url, "select * from notifications") == []
        assert client.get("/database").json()["announced"] == []
        assert "COMMIT of POST /trouble/commit failed" in process.output()
        # And the connections that served all this are still good.
        client.post("/articles", json={"title": "kept"}).raise_for_status()
        assert rows(database_url, ARTICLES) == [("kept", False)]


async def test_failing_all_at_once(database_url: str) -> None:
    """Many people may press the buttons at the same time: none waits for the others for ever."""
    paths = ["/articles", "/trouble/commit", "/trouble/exception"] * 20
    with demo(database_url) as (client, _):
        async with httpx.AsyncClient(
            base_url=client.base_url, limits=NO_REUSE, timeout=PATIENCE
        ) as people:
            answers = await asyncio.gather(
                *(people.post(path, json={"title": path}) for path in paths)
            )
        assert [answer.status_code for answer in answers] == [201, 409, 500] * 20
        assert rows(database_url, ARTICLES) == [("/articles", False)] * 20


def test_publishing(database_url: str) -> None:
    """The row changes, the hook announces it before the answer, the background task writes once."""
    with demo(database_url) as (client, _):
        article = client.post("/articles", json={"title": "News"}).json()
        for _again in range(2):
            published = client.post(f"/articles/{article['id']}/publish")
            assert published.status_code == 200
            assert published.json() == article | {"published": True}
        assert rows(database_url, ARTICLES) == [("News", True)]
        assert client.get("/database").json()["announced"] == [
            f"article {article['id']} created: News",
            f"article {article['id']} published: News",
        ]
        expected = [(article["id"], "New: News")]
        _wait_for_rows(database_url, "select article_id, text from notifications", expected)


def test_an_article_that_is_not_there_is_a_404(sqlite_url: str) -> None:
    """Reading and publishing it are told apart from an id that no article can have."""
    with demo(sqlite_url) as (client, _):
        assert client.get("/articles/7").json() == {"detail": "there is no article 7"}
        assert client.get("/articles/7").status_code == 404
        assert client.post("/articles/7/publish").status_code == 404
        assert client.get(f"/articles/{2**31}").status_code == 422


def test_rows_written_from_outside_are_shown(sqlite_url: str) -> None:
    """The page's tables are what the database holds, and not what this process remembers."""
    with demo(sqlite_url) as (client, _):
        execute(sqlite_url, "insert into articles values (5, 'by hand', '', false)")
        assert [row["id"] for row in client.get("/database").json()["articles"]] == [5]


def test_the_page(sqlite_url: str) -> None:
    """It has a button for each thing to try, and loads nothing from elsewhere."""
    with demo(sqlite_url) as (client, _):
        page = client.get("/")
        paths = client.get("/openapi.json").json()["paths"]
    assert page.headers["content-type"].startswith("text/html")
    for path in ("/articles", "/trouble/not-found", "/trouble/exception", "/trouble/commit"):
        assert f'data-path="{path}"' in page.text
        assert "post" in paths[path]
    assert not re.search(r"https?:|src=|url\(|@import", page.text)


def test_the_default_is_a_file_in_the_working_directory(tmp_path: Path) -> None:
    """Without a URL: `data/db.sqlite3`, made on demand and named in a warning."""
    with demo() as (client, process):
        client.post("/articles", json={"title": "Hello"}).raise_for_status()
        file = tmp_path / "data" / "db.sqlite3"
        assert rows(f"sqlite:///{file}", ARTICLES) == [("Hello", False)]
        said = process.output()
    assert f"WARNING   No database URL is configured: using the SQLite file {file}." in said
    assert f"The demo is at {client.base_url}".rstrip("/") in said


def test_the_password_is_not_printed(postgres_url: str) -> None:
    """The database is named at the start without its password."""
    url = make_url(postgres_url)
    secret = url.password or "s3cret"
    with demo(url.set(password=str(secret)).render_as_string(hide_password=False)) as (_, process):
        said = process.output()
    assert ":***@" in said
    assert str(secret) not in said


def test_ctrl_c_ends_it(sqlite_url: str) -> None:
    """Ctrl-C is how a demo ends: no traceback, exit code 0."""
    with demo(sqlite_url) as (_, process):
        process.popen.send_signal(signal.SIGINT)
        assert process.popen.wait(PATIENCE) == 0
        assert "Traceback" not in process.output()


def test_a_taken_port_is_said_plainly() -> None:
    """It is one line that says what to write instead, before anything is created."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = start_in_vain(PORT=str(port))
    assert said.startswith(f"Port {port} is in use. Choose another: PORT=")
    assert said.count("\n") == 1
    assert not Path("data").exists()


@pytest.mark.parametrize("port", ["http", "-1", "65536", "²"])
def test_a_port_that_is_none_is_said_plainly(port: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistyped `PORT` is named in one line."""
    monkeypatch.setenv("PORT", port)
    with pytest.raises(SystemExit, match=rf"^PORT={port} is not a port. Choose one: .*$"):
        chosen_port()


def test_a_database_that_does_not_answer_is_said_plainly() -> None:
    """A server that is down is a message before the start, and no traceback."""
    url = f"postgresql://user:s3cret@127.0.0.1:{free_port()}/articles"
    said = start_in_vain(PORT="0", DATABASE_URL=url)
    assert said.startswith("cannot connect to postgresql")
    assert "s3cret" not in said
    assert "Traceback" not in said


def _wait_for_rows(url: str, sql: str, expected: Sequence[tuple[object, ...]]) -> None:
    """Wait for what is written after the response."""
    end = time.monotonic() + PATIENCE
    while (found := rows(url, sql)) != expected and time.monotonic() < end:
        time.sleep(0.02)
    assert found == expected
