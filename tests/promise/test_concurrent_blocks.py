"""Blocks in siblings: `atomic()`, `begin_nested()`, `begin()`, and savepoints of the connection.

A block is for the task that entered it and for those it starts. Others wait until it is left,
with a time limit, and so does COMMIT, so that no block is committed by half: it happens whole or
not at all, also if its tasks go on when it was rolled back, or when the request is over.

More of this: tests/promise/test_concurrency.py (statements),
tests/promise/test_concurrent_changes.py (objects), tests/test_blocks.py, tests/test_gate.py,
tests/test_transaction.py.
"""

import asyncio
import gc
import weakref
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import Any

import anyio
import anyio.from_thread
import anyio.to_thread
import pytest

from repom import (
    Database,
    atomic,
    current_session,
    on_commit,
    on_rollback,
)
from repom import gate as gate_module
from repom.errors import ConcurrentSessionUse, ScopeClosedError
from repom.middleware import DatabaseSessionMiddleware
from tests.middleware.notes import (
    answer,
    connections_in_use,
    notes,
    notes_database,
    write,
)
from tests.promise.tasks import ONE_CONNECTION, Note, app_of, post, wait_in_the_database
from tests.support.asgi import Message, Receive, Scope, Send, request
from tests.support.statements import sent


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    """An empty table of notes and one connection, on each kind of database."""
    async with notes_database(database_url, engine_kwargs=ONE_CONNECTION) as database:
        yield database


# --- blocks: atomic(), begin_nested(), begin(), and savepoints of the connection


@asynccontextmanager
async def connection_block() -> AsyncIterator[None]:
    connection = await current_session().connection()
    async with connection.begin_nested():
        yield


Block = Callable[[], AbstractAsyncContextManager[Any]]
BLOCKS: dict[str, Block] = {
    "atomic": atomic,
    "begin_nested": lambda: current_session().begin_nested(),
    "begin": lambda: current_session().begin(),
    "connection": connection_block,
}


@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
async def test_blocks_of_siblings_exclude_each_other(
    database: Database, database_url: str, block: Block
) -> None:
    """Some of them fail, and take nothing with them that is not theirs."""

    async def create() -> None:
        async def part(number: int) -> None:
            async with block():
                await write(f"{number} first")
                await asyncio.sleep(0)
                await asyncio.gather(write(f"{number} child"), write(f"{number} other child"))
                if number % 2:
                    raise LookupError

        async def beside(number: int) -> None:
            for which in ("first", "second", "third"):
                await write(f"beside {number} {which}")

        parts = [task for number in range(6) for task in (part(number), beside(number))]
        results = await asyncio.gather(*parts, return_exceptions=True)
        assert [type(result) for result in results[::2]] == [type(None), LookupError] * 3
        assert results[1::2] == [None] * 6

    await post(app_of(database, create), "create")
    expected = [f"{n} {which}" for n in (0, 2, 4) for which in ("child", "first", "other child")]
    expected += [f"beside {n} {which}" for n in range(6) for which in ("first", "second", "third")]
    assert sorted(notes(database_url)) == sorted(expected)


async def test_child_that_goes_on_when_its_block_was_rolled_back(
    database: Database, database_url: str
) -> None:
    """What it still did would be half of the block, committed without the rest."""
    parts: list[asyncio.Task[None]] = []

    async def create() -> None:
        async def part() -> None:
            await write("part")
            begun.set()
            await may_go_on.wait()
            with pytest.raises(ScopeClosedError, match="was rolled back"):
                await write("late")
            with pytest.raises(ScopeClosedError, match="was rolled back"):
                current_session().add(Note(text="late"))

        begun, may_go_on = asyncio.Event(), asyncio.Event()
        with suppress(LookupError):
            async with atomic():
                parts.append(asyncio.create_task(part()))
                await begun.wait()
                raise LookupError
        may_go_on.set()
        await write("after")
        await parts[0]
        async with atomic():  # whoever has entered it is not to blame
            await write("another block")

    await post(app_of(database, create), "create")
    assert notes(database_url) == ["after", "another block"]


@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
@pytest.mark.parametrize("fails", [False, True])
async def test_commit_waits_for_the_block_of_a_sibling(
    database: Database, database_url: str, block: Block, fails: bool
) -> None:
    """The response tells of the whole of it, or of nothing of it."""
    parts: list[asyncio.Task[None]] = []
    at_the_start: list[list[str]] = []

    async def create() -> None:
        async def part() -> None:
            async with block():
                await write("part")
                begun.set()
                await asyncio.sleep(0.01)
                await write("other part")
                if fails:
                    raise LookupError

        begun = asyncio.Event()
        await write("first")
        parts.append(asyncio.create_task(part()))
        await begun.wait()

    def look(message: Message) -> None:
        at_the_start.append(notes(database_url))

    response = await request(app_of(database, create), "POST", "/create", on_message=look)
    assert response.status == 201
    assert isinstance(parts[0].exception(), LookupError) is fails
    rows = ["first"] if fails else ["first", "part", "other part"]
    assert at_the_start[0] == notes(database_url) == rows


@pytest.mark.parametrize("leaves", ["at once", "after another statement"])
async def test_block_that_is_open_when_the_application_returns(
    database: Database, database_url: str, leaves: str
) -> None:
    """It may be left, and is committed, but nothing more is let into it: a statement is refused,
    and then the block is undone, and the rest is not."""
    parts: list[asyncio.Task[None]] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        async def part() -> None:
            async with atomic():
                await write("part")
                begun.set()
                await returned.wait()
                if leaves != "at once":
                    await write("other part")

        begun, returned = asyncio.Event(), asyncio.Event()
        await answer(send, 201)
        await write("background task")
        parts.append(asyncio.create_task(part()))
        await begun.wait()
        asyncio.get_running_loop().call_later(0.01, returned.set)

    assert (await request(DatabaseSessionMiddleware(app, database), "POST")).complete
    error = parts[0].exception()
    assert isinstance(error, ScopeClosedError) is (leaves != "at once")
    assert notes(database_url) == ["background task"] + ["part"] * (leaves == "at once")


async def test_block_that_succeeds_when_its_request_has_failed(
    database: Database, database_url: str
) -> None:
    """Nobody believes that it did: there was nothing left of it to be released."""
    parts: list[asyncio.Task[None]] = []

    async def create() -> None:
        async def part() -> None:
            async with atomic():
                await write("part")
                begun.set()
                await over.wait()

        begun = asyncio.Event()
        parts.append(asyncio.create_task(part()))
        await begun.wait()
        raise LookupError

    over = asyncio.Event()
    await post(app_of(database, create), "create", 500)
    over.set()
    with pytest.raises(ScopeClosedError):
        await parts[0]
    assert notes(database_url) == []


async def test_callbacks_of_who_is_beside_a_block(database: Database, database_url: str) -> None:
    """They do not share the fate of a block that was only open at the time."""
    called: list[str] = []

    async def create() -> None:
        async def part() -> None:
            async with atomic():
                register("block")
                await write("part")
                begun.set()
                await registered.wait()
                raise LookupError

        async def beside() -> None:
            await begun.wait()
            register("beside")
            registered.set()
            await write("beside")

        begun, registered = asyncio.Event(), asyncio.Event()
        await asyncio.gather(part(), beside(), return_exceptions=True)

    def register(name: str) -> None:
        on_commit(lambda: called.append(f"{name} committed"))
        on_rollback(lambda: called.append(f"{name} rolled back"))

    await post(app_of(database, create), "create")
    assert sorted(called) == ["beside committed", "block rolled back"]
    assert notes(database_url) == ["beside"]


@pytest.mark.parametrize("waits", ["for its block", "for COMMIT"])
async def test_siblings_that_wait_for_each_other(
    database: Database,
    database_url: str,
    waits: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Not for ever: the request fails, with an error that names both, and leaves nothing."""
    monkeypatch.setattr(gate_module, "BLOCK_TIMEOUT", 0.05)
    blocks: list[asyncio.Task[None]] = []
    over = asyncio.Event()

    async def create() -> None:
        async def hold_a_block() -> None:
            async with atomic():
                await write("block")
                begun.set()
                await (other if waits == "for its block" else over.wait())

        begun = asyncio.Event()
        request_task = asyncio.current_task()
        assert request_task is not None
        request_task.set_name("the request")
        await write("first")
        other = asyncio.create_task(write_later(begun), name="the other")
        blocks.append(asyncio.create_task(hold_a_block(), name="the block"))
        await begun.wait()
        if waits == "for its block":
            await blocks[0]

    async def write_later(begun: asyncio.Event) -> None:
        await begun.wait()
        if waits == "for its block":
            await write("other")

    error = await post(app_of(database, create), "create", 500)
    assert isinstance(error, ConcurrentSessionUse)
    assert "'the block'" in str(error)
    assert ("'the other'" if waits == "for its block" else "'the request'") in str(error)
    over.set()
    await asyncio.wait(blocks)
    assert notes(database_url) == []
    assert connections_in_use(database) == 0


async def test_time_limit_of_the_end_while_a_sibling_is_in_its_block(
    database: Database, database_url: str
) -> None:
    """It says what COMMIT has waited for, and the connection is free for the next request."""
    blocks: list[asyncio.Task[None]] = []
    over = asyncio.Event()

    async def first() -> None:
        async def hold_a_block() -> None:
            async with atomic():
                await write("block")
                begun.set()
                await over.wait()

        begun = asyncio.Event()
        blocks.append(asyncio.create_task(hold_a_block(), name="the block"))
        await begun.wait()

    async def second() -> None:
        await write("second")

    app = app_of(database, first, second, end_timeout=0.05)
    error = await post(app, "first", 500)
    assert isinstance(error, ConcurrentSessionUse)
    assert "'the block'" in str(error)
    await post(app, "second")
    over.set()
    await asyncio.wait(blocks)
    assert isinstance(blocks[0].exception(), ScopeClosedError)
    assert notes(database_url) == ["second"]


async def test_block_that_fails_and_cannot_be_rolled_back(
    database: Database, database_url: str
) -> None:
    """Its task is cancelled while it waits for its turn to do so. So it is still a part of the
    transaction, which therefore is not committed, whoever swallows the cancellation."""

    async def create() -> None:
        async def part() -> None:
            with anyio.CancelScope() as cancel_scope:
                cancel_scopes.append(cancel_scope)
                async with atomic():
                    await write("part")
                    children.append(asyncio.create_task(wait_in_the_database(database)))
                    await is_sent.wait()
                    raise LookupError

        cancel_scopes: list[anyio.CancelScope] = []
        children: list[asyncio.Task[None]] = []
        with sent(database.async_engine, "WITH", "SELECT") as is_sent:
            task = asyncio.create_task(part())
            await is_sent.wait()
            await asyncio.sleep(0)
            cancel_scopes[0].cancel()
            await task
            await children[0]
        await write("after")

    error = await post(app_of(database, create), "create", 500)
    assert isinstance(error, ConcurrentSessionUse)
    assert "not rolled back" in str(error)
    assert notes(database_url) == []


async def test_block_keeps_nothing_of_its_request(database: Database) -> None:
    """A connection keeps the context in which it was opened, and that of a block may know the
    session and the task."""
    alive: list[weakref.ref[Any]] = []

    async def create() -> None:
        async with atomic() as session:  # its first statement opens the connection
            await write("first")
            alive.append(weakref.ref(session))
            alive.append(weakref.ref(session.sync_session))
            alive.append(weakref.ref(asyncio.current_task()))

    await post(app_of(database, create), "create")
    await asyncio.sleep(0)  # this very turn of the loop belongs to the task of the request
    gc.collect()
    assert connections_in_use(database) == 0
    assert [reference() for reference in alive] == [None, None, None]
