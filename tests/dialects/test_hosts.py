"""Several hosts in one URL: the one that fits is found, and one that is silent delays little."""

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, closing
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.engine import make_url

from repom import session_scope
from repom.database import Database
from repom.dialects import support_for
from repom.dialects.hosts import TIMEOUT, connect_to_one, first_of, has_several_hosts
from repom.errors import DatabaseUnreachableError
from tests.support.polling import until


@pytest.fixture
def silent() -> Iterator[int]:
    """The port of a host that takes connections and never says a word."""
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        yield listener.getsockname()[1]


@pytest.fixture
def closed() -> int:
    """A port that refuses connections."""
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        port: int = listener.getsockname()[1]
    return port


def several(url: str, *ports: int | None, query: str = "") -> str:
    """The URL of a server, with those ports of this machine before its own."""
    parsed = make_url(url)
    hosts = "&".join(f"host=127.0.0.1:{port}" for port in (*ports, parsed.port or 5432))
    return f"postgresql+asyncpg://{parsed.username}@/{parsed.database}?{hosts}{query}"


@asynccontextmanager
async def opened(url: str, **engine_kwargs: Any) -> AsyncIterator[Database]:
    database = Database(url, engine_kwargs=engine_kwargs)
    yield database
    await database.dispose()


async def ask(database: Database) -> float:
    """Ask something on a new connection; return how many seconds that took."""
    began = time.perf_counter()
    async with session_scope(database) as session:
        assert await session.scalar(text("SELECT 1")) == 1
    return time.perf_counter() - began


async def test_a_silent_host_is_overtaken(postgres_url: str, silent: int) -> None:
    """The next one is tried beside it, long before it is given up."""
    async with opened(several(postgres_url, silent)) as database:
        assert await ask(database) < TIMEOUT / 2


async def test_a_host_that_refuses_costs_no_time(postgres_url: str, closed: int) -> None:
    async with opened(several(postgres_url, closed, closed, closed)) as database:
        assert await ask(database) < 0.25


@pytest.mark.parametrize("wanted", ["read-write", "primary", "any", "prefer-standby"])
async def test_what_is_wanted_is_found(postgres_url: str, closed: int, wanted: str) -> None:
    """`prefer-standby` takes a primary, too, where there is no standby."""
    url = several(postgres_url, closed, query=f"&target_session_attrs={wanted}")
    async with opened(url) as database:
        await ask(database)


async def test_no_host_fits(postgres_url: str, closed: int) -> None:
    """What is said of each is told, with the type of the error."""
    async with opened(several(postgres_url, closed, query="&target_session_attrs=standby")) as (
        database
    ):
        with pytest.raises(DatabaseUnreachableError) as caught:
            await ask(database)
    assert f"127.0.0.1:{closed}: ConnectionRefusedError" in str(caught.value)
    assert "TargetServerAttributeNotMatched" in str(caught.value)


async def test_all_hosts_are_silent(silent: int) -> None:
    """They are given up after the time that the URL says."""
    url = f"postgresql://u@/d?host=127.0.0.1:{silent}&host=127.0.0.1:{silent}&connect_timeout=1"
    async with opened(url) as database:
        with pytest.raises(DatabaseUnreachableError, match="TimeoutError"):
            await ask(database)


async def test_a_wrong_keyword_explains_itself(postgres_url: str, closed: int) -> None:
    url = several(postgres_url, closed)
    async with opened(url, connect_args={"colour": "red"}) as database:
        with pytest.raises(TypeError, match="colour"):
            await ask(database)


async def test_hosts_in_connect_args(postgres_url: str, closed: int) -> None:
    """Lists, with one port for all or one for each."""
    parsed = make_url(postgres_url)
    port = parsed.port or 5432
    url = parsed.set(host=None, port=None).render_as_string()
    for ports in ([port], [closed, port]):
        arguments = {"host": ["127.0.0.1", "127.0.0.1"], "port": ports}
        async with opened(url, connect_args=arguments) as database:
            await ask(database)


# --- the race, without servers ------------------------------------------------------------------

Attempt = Callable[[], Coroutine[Any, Any, str]]


class Race:
    """Attempts with names, of which each waits for its event; what they did is written down."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.cancelled: list[str] = []
        self.discarded: list[str] = []
        self.events: dict[str, asyncio.Event] = {}

    def attempt(self, name: str, error: Exception | None = None) -> Attempt:
        self.events[name] = asyncio.Event()

        async def attempt() -> str:
            self.begun.append(name)
            try:
                await self.events[name].wait()
            except asyncio.CancelledError:
                self.cancelled.append(name)
                raise
            if error is not None:
                raise error
            return name

        return attempt


async def test_the_next_begins_at_once_when_one_has_failed() -> None:
    race = Race()
    attempts = [race.attempt("a", OSError()), race.attempt("b")]
    for event in race.events.values():
        event.set()
    assert await first_of(attempts, race.discarded.append, head_start=60) == "b"
    assert race.begun == ["a", "b"]


async def test_the_first_goes_on_beside_the_next() -> None:
    """It is not given up for being slow, and may still win."""
    race = Race()
    attempts = [race.attempt("a"), race.attempt("b")]
    racing = asyncio.create_task(first_of(attempts, race.discarded.append, head_start=0.001))
    await until(lambda: race.begun == ["a", "b"])
    race.events["a"].set()
    assert await racing == "a"
    assert race.cancelled == ["b"]


async def test_of_two_at_once_one_is_discarded() -> None:
    race = Race()
    attempts = [race.attempt("a"), race.attempt("b")]
    racing = asyncio.create_task(first_of(attempts, race.discarded.append, head_start=0.001))
    await until(lambda: race.begun == ["a", "b"])
    race.events["b"].set()
    race.events["a"].set()
    assert await racing == "a"
    assert race.discarded == ["b"]


async def test_all_errors_in_the_order_of_the_attempts() -> None:
    race = Race()
    errors = [OSError("a"), ValueError("b")]
    attempts = [race.attempt(str(error), error) for error in errors]
    for event in race.events.values():
        event.set()
    with pytest.raises(ExceptionGroup) as failed:
        await first_of(attempts, race.discarded.append)
    assert failed.value.exceptions == tuple(errors)


async def test_cancelled_it_leaves_nobody_behind() -> None:
    race = Race()
    attempts = [race.attempt("a"), race.attempt("b")]
    racing = asyncio.create_task(first_of(attempts, race.discarded.append, head_start=0.001))
    await until(lambda: race.begun == ["a", "b"])
    racing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await racing
    assert race.cancelled == ["a", "b"]


# --- when it is used ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "connect_args", "several"),
    [
        ("postgresql://u@h/d", {}, False),
        ("postgresql://u@/d?host=/run/postgresql", {}, False),
        ("postgresql://u@/d?host=a:1", {}, False),
        ("postgresql://u@/d?host=a:1&host=b:2", {}, True),
        ("postgresql://u@/d?host=a,b", {}, True),
        ("postgresql://u@/d", {"host": ["a", "b"]}, True),
        ("postgresql://u@/d", {"host": ["a"]}, False),
        ("postgresql://u@/d", {"host": "a,b"}, True),
    ],
)
def test_several_hosts(url: str, connect_args: dict[str, Any], several: bool) -> None:
    assert has_several_hosts(make_url(url), connect_args) == several


@pytest.mark.parametrize(
    ("url", "given", "expected"),
    [
        ("asyncpg://u@h/d", {}, {}),
        ("asyncpg://u@/d?host=a:1&host=b:2", {}, {"async_creator_fn": connect_to_one}),
        ("asyncpg://u@/d?host=a:1&host=b:2", {"async_creator_fn": 1}, {"async_creator_fn": 1}),
        ("psycopg://u@h/d", {}, {}),
        ("psycopg://u@/d?host=a,b", {}, {"connect_timeout": TIMEOUT}),
        ("psycopg2://u@/d?host=a,b", {}, {"connect_timeout": TIMEOUT}),
        ("psycopg://u@/d?host=a,b", {"connect_timeout": 9}, {"connect_timeout": 9}),
        ("psycopg://u@/d?host=a,b&connect_timeout=9", {}, {}),
    ],
)
def test_what_the_drivers_are_given(
    url: str, given: dict[str, Any], expected: dict[str, Any]
) -> None:
    """Nothing for one host; what the application says is kept."""
    support = support_for(make_url(f"postgresql+{url}"), {}, is_async="asyncpg" in url)
    assert support.connect_args(given) == expected
