"""Whose a block is, what disturbs it, and that it keeps nothing alive."""

import asyncio
import gc
import weakref
from collections.abc import Coroutine
from contextvars import copy_context
from typing import Any

import pytest
from sqlalchemy import create_engine
from sqlalchemy.orm import Session

from repom.blocks import Block, Blocks, Visitor
from repom.errors import ScopeClosedError


async def in_task(coro: Coroutine[Any, Any, Any]) -> Any:
    return await asyncio.create_task(coro)


async def is_kept_out(blocks: Blocks) -> bool:
    return blocks.against(Visitor()) is not None


def begin(blocks: Blocks) -> Block:
    return blocks.begin(asyncio.current_task())


async def test_block_is_for_its_task_and_those_it_starts() -> None:
    """And for those they start, but not for one that was there before."""
    blocks = Blocks()
    before = copy_context()
    block = begin(blocks)
    assert not await is_kept_out(blocks)
    assert not await in_task(in_task(is_kept_out(blocks)))
    loop = asyncio.get_running_loop()
    assert await loop.create_task(is_kept_out(blocks), context=before)
    blocks.end(block, undone=False)
    assert not await loop.create_task(is_kept_out(blocks), context=before)


async def test_block_entered_in_another_context_is_for_its_task_all_the_same() -> None:
    """Frameworks run parts of a task in copies of its context."""
    blocks = Blocks()
    block = copy_context().run(begin, blocks)
    assert not await is_kept_out(blocks)
    blocks.end(block, undone=False)


async def test_change_beside_a_block_disturbs_it() -> None:
    """A change by its own does not. Disturbed, it tells when it has undone that."""
    blocks = Blocks()
    before = copy_context()
    loop = asyncio.get_running_loop()

    async def change() -> None:
        blocks.disturb()

    for disturbs in (False, True):
        for undone in (False, True):
            block = begin(blocks)
            inner = begin(blocks)
            await (loop.create_task(change(), context=before) if disturbs else in_task(change()))
            assert blocks.end(inner, undone=undone) is (disturbs and undone)
            assert blocks.end(block, undone=undone) is (disturbs and undone)


async def test_savepoint_here_is_the_innermost_of_those_the_caller_is_in() -> None:
    blocks = Blocks()
    before = copy_context()

    async def savepoint() -> Any:
        return blocks.savepoint_here

    engine = create_engine("sqlite://")
    with Session(engine) as session:
        outer = begin(blocks)
        outer.savepoint = session.begin_nested()
        between = copy_context()
        inner = begin(blocks)
        inner.savepoint = session.begin_nested()
        of_the_connection = begin(blocks)
        of_the_connection.savepoint = session.connection().begin_nested()
        assert await savepoint() is inner.savepoint
        loop = asyncio.get_running_loop()
        assert await loop.create_task(savepoint(), context=between) is outer.savepoint
        assert await loop.create_task(savepoint(), context=before) is None
        for block in (of_the_connection, inner, outer):
            blocks.end(block, undone=True)
    engine.dispose()


async def test_block_that_is_over_keeps_nothing_alive() -> None:
    """A connection keeps the context in which it was opened for as long as it is pooled."""

    class Savepoint:
        pass

    async def work() -> Any:
        block = begin(blocks)
        block.savepoint = savepoint = Savepoint()
        alive.extend((weakref.ref(savepoint), weakref.ref(asyncio.current_task())))
        context = copy_context()
        blocks.end(block, undone=True)
        return context

    blocks = Blocks()
    alive: list[weakref.ref[Any]] = []
    context = await in_task(work())
    await asyncio.sleep(0)
    gc.collect()
    assert [reference() for reference in alive] == [None, None]
    del context


async def test_block_that_was_rolled_back_in_another_context() -> None:
    """Its own context does not know of it. The task that has entered it goes on all the same, and
    one that it has started does not."""

    async def child() -> None:
        with pytest.raises(ScopeClosedError):
            blocks.refuse_left_over()

    blocks = Blocks()
    block = begin(blocks)
    task = asyncio.create_task(child())
    copy_context().run(blocks.end, block, undone=True)
    blocks.refuse_left_over()
    await task


async def test_blocks_that_others_have_ended_do_not_pile_up() -> None:
    """A worker that never releases its savepoints, which the owner of each scope ends."""
    known = len(Visitor().blocks)
    for _ in range(3):
        blocks = Blocks()
        block = begin(blocks)
        copy_context().run(blocks.end, block, undone=True)
    assert len(Visitor().blocks) == known + 1
