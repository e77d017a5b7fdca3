"""How what a client has written comes along with it, and what becomes of a token it made up.

With replicas that are late: tests/cluster/test_readers.py.
"""

import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from repom import Database, current_session
from repom.middleware import DatabaseSessionMiddleware, safe_methods
from repom.middleware.own_writes import COOKIE, MAX_AGE, own_writes_of, token
from repom.own_writes import OwnWrites, own_writes
from tests.middleware.notes import answer, create_notes, write
from tests.support.asgi import Receive, Scope, Send, request

KEY = "0123abcd"


@pytest.fixture
async def database(postgres_url: str) -> AsyncIterator[Database]:
    """One that is its own reader, with an empty table of notes."""
    create_notes(postgres_url)
    database = Database(postgres_url, readers=[postgres_url])
    yield database
    await database.dispose()


class App:
    """Writes with POST; keeps what it was told of the client."""

    def __init__(self, database: Database, **options: Any) -> None:
        self.told: list[dict[str, int]] = []
        self.app = DatabaseSessionMiddleware(
            self._serve, database, read_only=safe_methods, **options
        )

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        own = own_writes.get()
        assert own is not None
        self.told.append(dict(own.positions))
        if scope["method"] == "POST":
            await write("a")
        else:
            await current_session().run_sync(lambda session: session.connection())
        await answer(send, 400 if scope["path"] == "/fails" else 200)


def key_of(database: Database) -> str:
    assert database.readers is not None
    return database.readers.key


# --- from the server to the client


async def test_a_cookie_for_who_has_written(database: Database) -> None:
    """Only with what was committed; the next request brings it along."""
    app = App(database)
    assert (await request(app.app, "GET")).header("set-cookie") is None
    assert (await request(app.app, "POST", "/fails")).header("set-cookie") is None
    cookie = (await request(app.app, "POST")).header("set-cookie")
    assert cookie is not None
    pair, *attributes = cookie.split("; ")
    assert attributes == [f"Max-Age={MAX_AGE}", "Path=/", "HttpOnly", "SameSite=Lax"]
    headers = [(b"cookie", f"a=b; {pair}; c=d".encode())]
    assert (await request(app.app, "GET", headers=headers)).header("set-cookie") is None
    (position,) = app.told[-1].values()
    assert app.told[-1] == {key_of(database): position}
    assert position > 0


async def test_over_https(database: Database) -> None:
    """The cookie does not travel in clear."""
    app = App(database)
    found = await request(app.app, "POST", scope={"scheme": "https"})
    assert str(found.header("set-cookie")).endswith("; Secure")


async def test_a_header(database: Database) -> None:
    """For clients without cookies."""
    app = App(database, own_writes="header")
    found = await request(app.app, "POST")
    assert found.header("set-cookie") is None
    sent = [(b"repom-written", str(found.header("repom-written")).encode())]
    await request(app.app, "GET", headers=sent)
    assert app.told[-1].keys() == {key_of(database)}


async def test_what_other_databases_have_told(database: Database) -> None:
    """It goes along, since there is one cookie for all of them."""
    app = App(database)
    sent = [(b"cookie", f"{COOKIE}={KEY}:ff".encode())]
    found = await request(app.app, "POST", headers=sent)
    assert f"{KEY}:ff." in str(found.header("set-cookie"))


async def test_a_writer_that_does_not_tell(
    database: Database, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The answer is the same; the client reads from the writer for a while."""
    monkeypatch.setattr("repom.replication.ANSWER_WITHIN", -1)
    found = await request(App(database).app, "POST")
    assert found.status == 200
    assert f"{key_of(database)}@" in str(found.header("set-cookie"))
    assert "has not told the position" in caplog.text


async def test_without(database: Database) -> None:
    """Nothing is added, and nothing is asked for."""
    found: list[OwnWrites | None] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        found.append(own_writes.get())
        await write("a")
        await answer(send)

    silent = DatabaseSessionMiddleware(app, database, own_writes=None)
    assert (await request(silent, "POST")).header("set-cookie") is None
    assert found == [None]
    with pytest.raises(ValueError, match="own_writes='query'"):
        DatabaseSessionMiddleware(app, own_writes="query")  # type: ignore[arg-type]


# --- from the client to the server


def test_a_token_says_what_it_was_made_of() -> None:
    """Positions, and times."""
    own = OwnWrites()
    own.positions = {KEY: 2**40, "00000000": 1}
    own.require_writer("ffffffff", 10)
    found = own_writes_of(token(own))
    assert found.positions == own.positions
    assert found.needs_writer("ffffffff")
    assert not found.needs_writer(KEY)


def test_a_client_of_many_databases() -> None:
    """The token does not grow for ever: it names those that were written last."""
    own = OwnWrites()
    own.positions = {f"{number:08x}": 2**63 for number in range(1000)}
    found = own_writes_of(token(own)).positions
    assert found == dict(list(own.positions.items())[-40:])


async def test_a_reader_that_may_be_far_behind(postgres_url: str) -> None:
    """The cookie lives for as long as it may be needed."""
    create_notes(postgres_url)
    database = Database(postgres_url, readers=[postgres_url], max_lag=3600)
    cookie = (await request(App(database).app, "POST")).header("set-cookie")
    assert "Max-Age=3604;" in str(cookie)
    await database.dispose()


def test_a_time_that_is_over() -> None:
    """It sends nobody to the writer any more."""
    assert not own_writes_of(f"{KEY}@{int(time.time()) - 1:x}").needs_writer(KEY)


@pytest.mark.parametrize(
    "made_up",
    [
        "",
        "nonsense",
        "0" * 100_000,
        f"{KEY}:",
        f"{KEY}:xyz",
        f"{KEY}:-1",
        f"{KEY}:{'f' * 17}",
        f"{KEY}:1\r\nset-cookie: a=b",
        f"{KEY}@{'f' * 16}",
        f"{KEY}@{4 * 10**9:x}",  # in the year 2096
        "' OR 1=1 --",
        "\xff\x00",
        ".".join([f"{KEY}:1"] * 1000),
    ],
)
def test_a_token_that_somebody_made_up(made_up: str) -> None:
    """It is none: nothing of it is used, or sent back."""
    own = own_writes_of(made_up)
    assert own.positions == {}
    assert token(own) == ""


@pytest.mark.parametrize("value", ["f" * 16, "7" + "f" * 15, "0", "1"])
async def test_a_position_that_somebody_made_up(database: Database, value: str) -> None:
    """The request is answered, by the reader or by the writer."""
    sent = [(b"cookie", f"{COOKIE}={key_of(database)}:{value}".encode())]
    found = await request(App(database).app, "GET", headers=sent)
    assert (found.status, found.exception) == (200, None)
