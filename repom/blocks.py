"""Savepoints as blocks: each is for the task that entered it and for the tasks that one starts.

What another task did meanwhile would be undone together with the block. And what a task of the
block still did when that has been rolled back would be half of something that is to happen
whole or not at all.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from sqlalchemy.orm import SessionTransaction

from repom.errors import ScopeClosedError
from repom.shield import acting_task

Task = asyncio.Task[Any]


class Block:
    """One savepoint.

    Attributes:
        savepoint: SQLAlchemy's object for it, once it is begun.
        is_disturbed: whether others have changed objects meanwhile, which it might undo.
        is_over: whether the savepoint has ended.
        is_undone: whether it was rolled back.
    """

    __slots__ = ("_task", "_wake", "blocks", "is_disturbed", "is_over", "is_undone", "savepoint")

    def __init__(self, blocks: Blocks, task: Task | None, wake: Callable[[], object]) -> None:
        self.blocks = blocks
        self.savepoint: object = None
        self.is_disturbed = False
        self.is_over = False
        self.is_undone = False
        self._wake: Callable[[], object] | None = wake
        # Contexts outlive the block: a connection keeps the one in which it was opened.
        self._task = None if task is None else weakref.ref(task)
        if task is not None:
            task.add_done_callback(self._left_open)

    @property
    def task(self) -> Task | None:
        """The task that entered it, while that runs.

        What a task has left open when it is done, to be released by hand, is for all.
        """
        task = None if self._task is None else self._task()
        return None if task is None or task.done() else task

    def _left_open(self, task: Task) -> None:
        if self._wake is not None:
            self._wake()

    def end(self, *, undone: bool) -> None:
        """Its savepoint has ended."""
        wake, self._wake = self._wake, None
        self.is_over = True
        self.is_undone = undone
        self.savepoint = None
        if (task := self.task) is not None:
            task.remove_done_callback(self._left_open)
        if wake is not None:
            wake()


#: The blocks that this context is in. Tasks inherit them from the one that starts them.
_blocks_here: ContextVar[tuple[Block, ...]] = ContextVar("repom_blocks", default=())


class Visitor:
    """Who wants to use a session: a task, with the blocks that it is in."""

    __slots__ = ("blocks", "task")

    def __init__(self) -> None:
        self.task = acting_task()
        self.blocks = _blocks_here.get()

    def is_kept_out_by(self, block: Block) -> bool:
        """Whether the block is for others."""
        task = block.task
        return task is not None and task is not self.task and block not in self.blocks


class Blocks:
    """The open blocks of one session.

    Attributes:
        open: from the outermost to the innermost.
        has_undone: whether one was rolled back, so that tasks of it may be left over.
    """

    __slots__ = ("has_undone", "open")

    def __init__(self) -> None:
        self.open: tuple[Block, ...] = ()
        self.has_undone = False

    def begin(self, task: Task | None, wake: Callable[[], object] = lambda: None) -> Block:
        """A block that `task` has entered, or one for all.

        Args:
            wake: called when it keeps nobody out any more, because it has ended or its task.
        """
        block = Block(self, task, wake)
        self.open = (*self.open, block)
        _blocks_here.set((*self._others_here(block), block))
        return block

    def end(self, block: Block, *, undone: bool) -> bool:
        """The savepoint of `block` has ended; `undone` if by a rollback.

        Returns:
            Whether that may have undone changes of others, too.
        """
        self.open = tuple(other for other in self.open if other is not block)
        self.has_undone = self.has_undone or undone
        _blocks_here.set(self._others_here(block))
        block.end(undone=undone)
        return undone and block.is_disturbed

    def of(self, savepoint: object) -> Block | None:
        """The open block of this savepoint."""
        return next((block for block in self.open if block.savepoint is savepoint), None)

    def against(self, visitor: Visitor) -> Block | None:
        """The innermost block that keeps the visitor out, if there is one."""
        return next(filter(visitor.is_kept_out_by, reversed(self.open)), None)

    def disturb(self) -> None:
        """The caller has changed an object, which no block keeps it from."""
        if self.open:
            visitor = Visitor()
            for block in filter(visitor.is_kept_out_by, self.open):
                block.is_disturbed = True

    def refuse_left_over(self) -> None:
        """Raise if the caller belongs to a block that was rolled back."""
        if self.has_undone:
            here = Visitor()
            for block in here.blocks:
                if block.is_undone and block.blocks is self and block.task is not here.task:
                    raise _block_undone()

    @property
    def savepoint_here(self) -> SessionTransaction | None:
        """The innermost savepoint of the session that the caller is in."""
        if self.open:
            visitor = Visitor()
            for block in reversed(self.open):
                savepoint = block.savepoint
                if isinstance(savepoint, SessionTransaction) and not visitor.is_kept_out_by(block):
                    return savepoint
        return None

    def _others_here(self, block: Block) -> tuple[Block, ...]:
        # Without those that were ended in another context, as by the owner of the scope.
        task = acting_task()
        return tuple(
            other
            for other in _blocks_here.get()
            if other is not block
            and (not other.is_over or (other.is_undone and other.task is not task))
        )


def _block_undone() -> ScopeClosedError:
    return ScopeClosedError(
        "the atomic(), begin_nested() or begin() block that this task belongs to was rolled back: "
        "what it still writes would be half of that block.\n"
        "Await the tasks of a block inside it, or give this one a transaction of its own: "
        "`async with session_scope() as session:`."
    )
