"""One session, several tasks: statements queue, and after the end they are refused.

A SQLAlchemy session serves one caller at a time
(https://docs.sqlalchemy.org/en/21/orm/session_basics.html#is-the-session-thread-safe-is-asyncsession-safe-to-share-in-concurrent-tasks).
The tasks of one request share theirs, so every operation passes a gate first. The gate stands
in the sync `Session` class, below `awaitable_attrs`, `run_sync`, lazy loads and every subclass
of `AsyncSession`.

A savepoint is part of the session, too, and keeps others out for longer than one operation: see
`repom.blocks`.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from typing import NamedTuple, Protocol

from greenlet import getcurrent, greenlet
from sqlalchemy.util import await_only

from repom.blocks import Block, Blocks, Task, Visitor
from repom.errors import ConcurrentSessionUse, ScopeClosedError
from repom.shield import Ending, acting_task

#: Seconds that a task waits for a sibling to leave one and the same block.
BLOCK_TIMEOUT = 30.0


class Gate(Protocol):
    """Lets one caller in at a time."""

    closed: bool
    blocks: Blocks

    @property
    def is_free(self) -> bool:
        """Whether nobody is inside."""
        ...

    @property
    def is_mine(self) -> bool:
        """Whether the caller is inside."""
        ...

    @property
    def is_nested(self) -> bool:
        """Whether the caller is called by the operation that is inside; if it is easy to see."""
        ...

    @property
    def inside(self) -> str:
        """The name of who is inside, for messages."""
        ...

    def enter(self, *, ending: bool = False, committing: bool = False) -> bool:
        """Wait until it is the caller's turn.

        Args:
            ending: the caller rolls back or closes, which a closed gate allows, and so do the
                blocks of others.
            committing: the caller commits or releases a savepoint, which a closed gate allows.
                Half of a block must not be committed, so the caller waits for those of others.

        Returns:
            False if the caller is inside already, and must not `leave` now.

        Raises:
            ScopeClosedError: the scope has ended, or the block that the caller belongs to.
            ConcurrentSessionUse: a sibling does not leave its block.
        """
        ...

    def leave(self) -> None:
        """Let the next one in."""

    def refuse_if_over(self) -> None:
        """Raise the `ScopeClosedError` of `enter`, for what waits for nothing."""

    def begin_block(self) -> Block:
        """The caller, who is inside, begins a savepoint: from now on it is for its own."""
        ...


class _Waiter(NamedTuple):
    turn: asyncio.Future[None]
    task: Task | None
    visitor: Visitor
    ending: bool


class TaskGate:
    """The gate of an async session: tasks of one event loop, first come, first served."""

    __slots__ = ("_inside", "_owner", "_waiters", "blocks", "closed")

    def __init__(self) -> None:
        self.closed = False
        self.blocks = Blocks()
        self._owner: Task | None = None
        # Of the operation that is inside: what it calls by the way, as autoflush and lazy loads,
        # is found without asking for the task.
        self._inside: greenlet | None = None
        self._waiters: deque[_Waiter] | None = None  # made for the first who waits

    @property
    def is_free(self) -> bool:
        return self._owner is None

    @property
    def is_mine(self) -> bool:
        return self._owner is not None and self._owner is _task_here()

    @property
    def is_nested(self) -> bool:
        return self._inside is getcurrent()

    @property
    def inside(self) -> str:
        return _name(self._owner)

    def enter(self, *, ending: bool = False, committing: bool = False) -> bool:
        here = getcurrent()
        if self._inside is here:
            return False
        me = asyncio.current_task()
        blocks = self.blocks
        if self._owner is not None or blocks.open:
            if self._owner is not None and self._owner is me:
                return False
            visitor = Visitor()
            if self._owner is not None or self._block_against(visitor, ending) is not None:
                self._wait(me, visitor, ending)
        self._owner, self._inside = me, here
        if (self.closed or blocks.has_undone) and not (ending or committing):
            try:
                self.refuse_if_over()
            except ScopeClosedError:
                self.leave()
                raise
        return True

    def leave(self) -> None:
        self._owner = self._inside = None
        if self._waiters:
            self._hand_over()

    def refuse_if_over(self) -> None:
        if self.closed:
            raise scope_closed()
        self.blocks.refuse_left_over()

    def begin_block(self) -> Block:
        return self.blocks.begin(acting_task(), self._hand_over)

    def _hand_over(self) -> None:
        # Handed over, not released: a newcomer must not overtake those who wait.
        waiters = self._waiters
        if waiters is None or self._owner is not None:
            return
        for waiter in waiters:
            turn, task, visitor, ending = waiter
            if not turn.done() and self._block_against(visitor, ending) is None:
                waiters.remove(waiter)
                self._owner = task
                turn.set_result(None)
                return

    def _block_against(self, visitor: Visitor, ending: bool) -> Block | None:
        return None if ending else self.blocks.against(visitor)

    def _wait(self, me: Task | None, visitor: Visitor, ending: bool) -> None:
        waiter = _Waiter(asyncio.get_running_loop().create_future(), me, visitor, ending)
        if self._waiters is None:
            self._waiters = deque()
        waiters = self._waiters
        waiters.append(waiter)
        try:
            await_only(self._turn(waiter))
        except BaseException:
            if waiter in waiters:
                waiters.remove(waiter)
            else:  # it was already its turn
                self.leave()
            raise

    async def _turn(self, waiter: _Waiter) -> None:
        turn, _, visitor, ending = waiter
        while not turn.done():
            block = self._block_against(visitor, ending)
            await asyncio.wait((turn,), timeout=BLOCK_TIMEOUT)
            if not turn.done() and block and block is self._block_against(visitor, ending):
                raise block_not_left(block, f"{BLOCK_TIMEOUT:g} s")


class ThreadGate:
    """The gate of a sync session: threads. Blocks are for all of them.

    A `def` dependency that yields inside a block is resumed in a thread of another context, and
    nothing tells that thread from any other.
    """

    __slots__ = ("_lock", "_owner", "blocks", "closed")

    def __init__(self) -> None:
        self.closed = False
        self.blocks = Blocks()
        self._lock = threading.Lock()
        self._owner: int | None = None

    @property
    def is_free(self) -> bool:
        return not self._lock.locked()

    @property
    def is_mine(self) -> bool:
        return self._owner == threading.get_ident()

    @property
    def is_nested(self) -> bool:
        return self.is_mine

    @property
    def inside(self) -> str:
        return next((t.name for t in threading.enumerate() if t.ident == self._owner), "?")

    def enter(self, *, ending: bool = False, committing: bool = False) -> bool:
        if self.is_mine:
            return False
        self._lock.acquire()
        self._owner = threading.get_ident()
        if self.closed and not (ending or committing):
            self.leave()
            raise scope_closed()
        return True

    def leave(self) -> None:
        self._owner = None
        self._lock.release()

    def refuse_if_over(self) -> None:
        if self.closed:
            raise scope_closed()

    def begin_block(self) -> Block:
        return self.blocks.begin(None)


def scope_closed() -> ScopeClosedError:
    """The error for work that comes after the end."""
    return ScopeClosedError(
        "this session's unit of work has ended: the response was sent, or its block was left.\n"
        "Work that outlives it needs a transaction of its own: "
        "`async with session_scope() as session:` (or `with sync_session_scope()`)."
    )


def block_not_left(block: Block, waited: str) -> ConcurrentSessionUse:
    """The error for a task that cannot wait any longer for another one to leave its block."""
    return ConcurrentSessionUse(
        f"task {name_here()!r} has waited {waited} for task {_name(block.task)!r} to leave its "
        "atomic(), begin_nested() or begin() block on the session that both use.\n"
        "If they wait for each other, start the one inside the block of the other; "
        "else let it work in a transaction of its own: `async with session_scope() as session:`."
    )


def name_here() -> str:
    """The name of the running task or thread, for messages."""
    task = acting_task()
    return threading.current_thread().name if task is None else task.get_name()


def _name(task: Task | None) -> str:
    if isinstance(task, Ending):
        task = task.caller
    return "?" if task is None else task.get_name()


def _task_here() -> Task | None:
    return asyncio.current_task() if asyncio._get_running_loop() is not None else None
