"""One session, several tasks: statements queue, and after the end they are refused.

A SQLAlchemy session serves one caller at a time
(https://docs.sqlalchemy.org/en/21/orm/session_basics.html#is-the-session-thread-safe-is-asyncsession-safe-to-share-in-concurrent-tasks).
The tasks of one request share theirs, so every operation passes a gate first. The gate stands
in the sync `Session` class, below `awaitable_attrs`, `run_sync`, lazy loads and every subclass
of `AsyncSession`.

A savepoint is part of the session, too: what a sibling wrote meanwhile would be undone with it.
So a block belongs to the task that entered it and to the tasks it starts; others wait.
"""

from __future__ import annotations

import asyncio
import threading
from asyncio import FIRST_COMPLETED
from collections import deque
from contextvars import ContextVar
from typing import Any, NamedTuple, Protocol

from sqlalchemy.util import await_only

from repom.errors import ConcurrentSessionUse, ScopeClosedError

#: Seconds that a task waits for a sibling to leave one and the same block.
BLOCK_TIMEOUT = 30.0


class Gate(Protocol):
    """Lets one caller in at a time."""

    closed: bool

    @property
    def is_free(self) -> bool:
        """Whether nobody is inside."""
        ...

    @property
    def is_mine(self) -> bool:
        """Whether the caller is inside."""
        ...

    @property
    def is_contended(self) -> bool:
        """Whether somebody waits."""
        ...

    def enter(self, *, ending: bool = False) -> bool:
        """Wait until it is the caller's turn.

        Args:
            ending: the caller ends the transaction, which a closed gate allows, and so does an
                open block.

        Returns:
            False if the caller is inside already, and must not `leave` now.

        Raises:
            ScopeClosedError: the scope has ended.
            ConcurrentSessionUse: a sibling does not leave its block.
        """
        ...

    def leave(self) -> None:
        """Let the next one in."""

    def begin_block(self, savepoint: object) -> None:
        """The caller, who is inside, has begun a savepoint: from now on it is for its own."""

    def end_block(self, savepoint: object) -> None:
        """The savepoint has ended."""


class _Block(NamedTuple):
    savepoint: object
    task: asyncio.Task[Any] | None  # that entered it


class _Waiter(NamedTuple):
    turn: asyncio.Future[None]
    task: asyncio.Task[Any] | None
    blocks: tuple[_Block, ...]  # those it is in
    ending: bool


#: The blocks that this context is in. Tasks inherit them from the one that starts them.
_blocks_here: ContextVar[tuple[_Block, ...]] = ContextVar("repom_blocks", default=())


class TaskGate:
    """The gate of an async session: tasks of one event loop, first come, first served."""

    __slots__ = ("_blocks", "_owner", "_waiters", "closed")

    def __init__(self) -> None:
        self.closed = False
        self._owner: asyncio.Task[Any] | None = None
        self._waiters: deque[_Waiter] = deque()
        self._blocks: list[_Block] = []  # of which the last counts

    @property
    def is_free(self) -> bool:
        return self._owner is None

    @property
    def is_mine(self) -> bool:
        return self._owner is not None and self._owner is _task_here()

    @property
    def is_contended(self) -> bool:
        return bool(self._waiters)

    def enter(self, *, ending: bool = False) -> bool:
        me = asyncio.current_task()
        if self._owner is not None or self._blocks:
            if self._owner is me:
                return False
            blocks = _blocks_here.get()
            if self._owner is not None or self._block_against(blocks, ending) is not None:
                self._wait(me, blocks, ending)
        self._owner = me
        if self.closed and not ending:
            self.leave()
            raise scope_closed()
        return True

    def leave(self) -> None:
        self._owner = None
        if self._waiters:
            self._hand_over()

    def begin_block(self, savepoint: object) -> None:
        block = _Block(savepoint, self._owner)
        self._blocks.append(block)
        _blocks_here.set((*_blocks_here.get(), block))

    def end_block(self, savepoint: object) -> None:
        self._blocks = [block for block in self._blocks if block.savepoint is not savepoint]
        here = _blocks_here.get()
        _blocks_here.set(tuple(block for block in here if block.savepoint is not savepoint))
        self._hand_over()

    def _hand_over(self) -> None:
        # Handed over, not released: a newcomer must not overtake those who wait.
        for waiter in self._waiters if self._owner is None else ():
            turn, _, blocks, ending = waiter
            if not turn.done() and self._block_against(blocks, ending) is None:
                self._waiters.remove(waiter)
                self._owner = waiter.task
                turn.set_result(None)
                return

    def _block_against(self, blocks: tuple[_Block, ...], ending: bool) -> _Block | None:
        """The block that keeps out who is in `blocks`, if there is one."""
        if ending or not self._blocks:
            return None
        block = self._blocks[-1]
        # What a task that is done has left open, to be released by hand, is for all.
        left = block.task is None or block.task.done()
        return None if left or block in blocks else block

    def _wait(self, me: asyncio.Task[Any] | None, blocks: tuple[_Block, ...], ending: bool) -> None:
        waiter = _Waiter(asyncio.get_running_loop().create_future(), me, blocks, ending)
        self._waiters.append(waiter)
        try:
            await_only(self._turn(waiter))
        except BaseException:
            if waiter in self._waiters:
                self._waiters.remove(waiter)
            else:  # it was already its turn
                self.leave()
            raise

    async def _turn(self, waiter: _Waiter) -> None:
        turn, task, blocks, ending = waiter
        while not turn.done():
            block = self._block_against(blocks, ending)
            watched = {turn, block.task} if block is not None and block.task else {turn}
            await asyncio.wait(watched, timeout=BLOCK_TIMEOUT, return_when=FIRST_COMPLETED)
            self._hand_over()  # nobody else does when the task of a block is done
            if not turn.done() and block and block is self._block_against(blocks, ending):
                raise _block_not_left(block.task, task)


class ThreadGate:
    """The gate of a sync session: threads. Blocks are for all of them.

    A `def` dependency that yields inside a block is resumed in a thread of another context, and
    nothing tells that thread from any other.
    """

    __slots__ = ("_lock", "_owner", "closed")

    is_contended = False

    def __init__(self) -> None:
        self.closed = False
        self._lock = threading.Lock()
        self._owner: int | None = None

    @property
    def is_free(self) -> bool:
        return not self._lock.locked()

    @property
    def is_mine(self) -> bool:
        return self._owner == threading.get_ident()

    def enter(self, *, ending: bool = False) -> bool:
        if self.is_mine:
            return False
        self._lock.acquire()
        self._owner = threading.get_ident()
        if self.closed and not ending:
            self.leave()
            raise scope_closed()
        return True

    def leave(self) -> None:
        self._owner = None
        self._lock.release()

    def begin_block(self, savepoint: object) -> None:
        pass

    def end_block(self, savepoint: object) -> None:
        pass


def scope_closed() -> ScopeClosedError:
    """The error for work that comes after the end."""
    return ScopeClosedError(
        "this session's unit of work has ended: the response was sent, or its block was left.\n"
        "Work that outlives it needs a transaction of its own: "
        "`async with session_scope() as session:` (or `with sync_session_scope()`)."
    )


def _block_not_left(
    inside: asyncio.Task[Any] | None, waiting: asyncio.Task[Any] | None
) -> ConcurrentSessionUse:
    return ConcurrentSessionUse(
        f"task {_name(waiting)!r} has waited {BLOCK_TIMEOUT:g} s for task {_name(inside)!r} to "
        "leave its atomic(), begin_nested() or begin() block on the session that both use.\n"
        "If they wait for each other, start the one inside the block of the other; "
        "else let it work in a transaction of its own: `async with session_scope() as session:`."
    )


def _name(task: asyncio.Task[Any] | None) -> str:
    return "?" if task is None else task.get_name()


def _task_here() -> asyncio.Task[Any] | None:
    return asyncio.current_task() if asyncio._get_running_loop() is not None else None
