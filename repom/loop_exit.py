"""How was this `for` left?

    async for session in get_async_db_session():
        session.add(user)
        return user                     # must commit; `raise` here must roll back

Python tells an iterator nothing about either: it is dropped, that is all. But CPython drops it at
once and from inside the loop's own frame, so its `__del__` can look at the instruction which that
frame is executing: `return` and `break` drop the iterator by an instruction made for it, which
cannot fail; an exception drops it in the middle of the instruction that failed.

That is evidence only while nothing but the loop holds the iterator. So every `for` gets a cursor
of its own that lives nowhere but on the loop's value stack, and a commit takes all of this:

1. the cursor was made by the instruction that begins a `for`, not by `iter()` or by C code,
2. the same frame asked it for the value, not a comprehension or generator below,
3. the same frame drops it, by an instruction that means `return` or `break`,
4. no traceback says that this very instruction raised (under a debugger any can).

Which instructions these are is learned from small loops at first use. Where the evidence is
missing the work is rolled back, and an ERROR says what to write instead; an interpreter other
than CPython never gives it. `with`, and use as a generator, need none of it.
"""

import enum
import functools
import gc
import logging
import sys
import weakref
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator
from types import CodeType, FrameType, TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, ParamSpec, Protocol, Self, TypeVar

from repom.errors import ScopeError

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
P = ParamSpec("P")

_log = logging.getLogger("repom")
_readable = sys.implementation.name == "cpython" and hasattr(sys, "_getframe")


class Work(Protocol[T_co]):
    """One unit of work: begun once, then ended once, by `end` or by `leave`."""

    def begin(self) -> T_co: ...  # what the user gets; if it fails, nothing stays open
    def end(self, error: BaseException | None, /) -> None: ...  # commit if there is no error
    def leave(self, *, commit: bool) -> None: ...  # in place of `end`, by `__del__`: must not raise


class AsyncWork(Protocol[T_co]):
    """`Work` that awaits, except in `leave`, which can only schedule the ending."""

    async def begin(self) -> T_co: ...
    async def end(self, error: BaseException | None, /) -> None: ...
    def leave(self, *, commit: bool) -> None: ...


# --- reading the consumer's frame -----------------------------------------------------------


class _Look(NamedTuple):
    """What a frame is doing."""

    frame: FrameType
    opcode: int
    references: int


def _look(depth: int) -> _Look | None:
    """Look at the frame `depth` calls above the caller, if there is one that can be read."""
    if not _readable:
        return None
    try:
        frame = sys._getframe(depth + 1)
    except ValueError:  # dropped by C alone: a thread or the interpreter is ending
        return None
    # `co_code` has the instructions as they were compiled: not specialised, not instrumented.
    return _Look(frame, frame.f_code.co_code[frame.f_lasti], sys.getrefcount(frame))


def _raised_here(frame: FrameType) -> bool:
    """Whether a traceback points at the instruction that the frame is executing."""
    return any(  # walks over every object there is, so it is asked only when it matters
        isinstance(holder, TracebackType) and holder.tb_lasti == frame.f_lasti
        for holder in gc.get_referrers(frame)
    )


class _Signs(NamedTuple):
    """Instructions of this interpreter, and how many references a frame has that nobody holds."""

    made: set[int]
    left: set[int]
    references: int


class _Probe:
    """An iterator that notes how its loop makes and drops it."""

    def __init__(self, notes: list[tuple[int, int]]) -> None:
        self._notes = notes

    def _note(self, look: _Look | None) -> None:
        if look:
            self._notes.append(look[1:])

    def __iter__(self) -> Self:
        self._note(_look(1))
        return self

    def __del__(self) -> None:
        self._note(_look(1))

    def __next__(self) -> None:
        pass

    async def __anext__(self) -> None:
        pass

    __aiter__ = __iter__


_LEFT = (
    "break",
    "return 0",
    "return value",
    "try: return value\n  finally: callable(0)",
    "try: raise KeyError\n  except KeyError: return value",
)
_RAISED = ("raise KeyError", "{}[0]", "{}.pop(0)")


@functools.cache
def _signs() -> _Signs:
    """Learn the signs; an instruction that can mean both leaving and raising is none."""
    made, left, raised = (set[int]() for _ in range(3))
    references: list[int] = []
    for prefix in ("", "async "):
        for body in _LEFT + _RAISED:
            notes: list[tuple[int, int]] = []
            names: dict[str, Any] = {"probe": functools.partial(_Probe, notes)}
            exec(f"{prefix}def loop():\n {prefix}for value in probe():\n  {body}", names)
            try:
                coroutine = names["loop"]()
                if prefix:
                    coroutine.send(None)
            except (KeyError, StopIteration):
                pass
            dropped = left if body in _LEFT else raised
            for opcodes, (opcode, _) in zip((made, dropped), notes, strict=False):
                opcodes.add(opcode)
            references += [note[1] for note in notes]
    return _Signs(made, left - raised, min(references, default=0))


class _Witness:
    """Follows one cursor. Each method is called by a method that the consumer's frame called."""

    def __init__(self) -> None:
        look = _look(2)
        self._code: CodeType | None = None
        # The only frame that can hold the cursor, None as soon as that is in doubt. Held strongly,
        # for its id may be given to another frame before a dying generator drops the cursor. The
        # cycle of the two ends when the loop does.
        self._frame = look.frame if look and look.opcode in _signs().made else None

    def asked(self) -> None:
        """The cursor was asked for a value."""
        look = _look(2)
        self._code = look.frame.f_code if look else None
        if not look or look.frame is not self._frame:
            self._frame = None

    def dropped(self) -> tuple[bool, str]:
        """Whether the loop was left by `return` or `break`; and a doubt, if nobody can tell."""
        look, signs = _look(2), _signs()
        if not look or look.frame is not self._frame:
            return False, f"{self._place()} did not hold its iterator to itself to the end"
        # A traceback holds the frame, as we do. So may a debugger, or an error caught before.
        held = look.references > signs.references + 1
        if look.opcode in signs.left:
            return not (held and _raised_here(look.frame)), ""
        return False, "" if held else f"{self._place()} ended in a way that is not known"

    def _place(self) -> str:
        if (code := self._code) is None:
            return "a loop on an interpreter that does not show its frames"
        return f"a loop in {code.co_qualname} ({code.co_filename}:{code.co_firstlineno})"


# --- the forms ------------------------------------------------------------------------------


class _State(enum.Enum):
    NEW = enum.auto()
    BUSY = enum.auto()  # beginning or ending
    OPEN = enum.auto()
    OVER = enum.auto()


class _Unit:
    """What the sync and the async forms share: the state of one unit of work, and its loss."""

    _right_forms: str
    _state = _State.NEW
    _work: Any
    _witness: _Witness | None = None
    _loop: "weakref.ref[_Unit] | None" = None  # weak, for the loop alone may hold it

    def _refuse_if(self, *states: _State) -> None:
        if self._state in states:
            raise ScopeError(
                "This object is in use already, by another block or by another task.\n"
                "It stands for one unit of work at a time.\n"
                "Call the function that made it once more to get a second one."
            )

    def _renew(self, loop: "_Unit | None" = None) -> None:
        """Every block is a unit of work of its own, but one after the other."""
        for unit in (self, self._loop and self._loop()):
            if unit:
                unit._refuse_if(_State.BUSY, _State.OPEN)
        self._state = _State.NEW
        self._loop = weakref.ref(loop) if loop else None

    def __del__(self) -> None:
        if self._state is not _State.OPEN:
            return
        commit, doubt = False, "it was begun by hand, as by `next()` or `anext()`, and not ended"
        try:
            if self._witness:
                commit, doubt = self._witness.dropped()
            if doubt:
                _log.error(
                    "A unit of work was rolled back: %s.\n"
                    "Only work that is known to have succeeded is committed.\n"
                    "Write %s.",
                    doubt,
                    self._right_forms,
                )
        finally:  # a signal may interrupt even this
            self._work.leave(commit=commit)


def _exception(typ: Any, val: Any, tb: TracebackType | None) -> BaseException:
    """What `throw(typ, val, tb)` is to raise; `typ` may be the exception itself."""
    error: BaseException = typ if isinstance(typ, BaseException) else typ() if val is None else val
    return error.with_traceback(tb) if tb else error


def _wrong_form(right: str) -> Callable[..., NoReturn]:
    def refuse(self: _Unit, *args: object) -> NoReturn:
        raise TypeError(f"This is used with {right}.\nWrite {self._right_forms}.")

    return refuse


class Forms(_Unit, Generator[T, None, None]):
    """A unit of work as a `with` block, as a `for` loop, or as a generator that others drive.

    As a generator it commits at the second `next()` and rolls back at `throw()` and `close()`, so
    `contextlib.contextmanager` and FastAPI's `Depends` can drive it. An object that is never
    begun does nothing.

    If rolling back fails too, that error is raised and the first one is its `__context__`: what
    any generator and context manager does, SQLAlchemy's included, and no error is lost.

    Args:
        make: makes the work; called once for each block.

    Example:
        >>> class Counted:
        ...     def begin(self): return "session"
        ...     def end(self, error): print("rolled back" if error else "committed")
        ...     def leave(self, *, commit): print("committed" if commit else "rolled back")
        >>> def first():
        ...     for session in Forms(Counted):
        ...         return session
        >>> first()
        committed
        'session'
    """

    _right_forms = "`with f() as value:`, or `for value in f():` with nothing around `f()`"

    def __init__(self, make: Callable[[], Work[T]]) -> None:
        self._make = make

    def __iter__(self) -> "Forms[T]":
        loop = Forms(self._make)
        loop._witness = _Witness()
        self._renew(loop)
        return loop

    def __next__(self) -> T:
        if self._witness:
            self._witness.asked()
        return self.send(None)

    def send(self, _: None, /) -> T:
        if self._state is _State.NEW:
            self._state = _State.BUSY
            try:
                self._work = work = self._make()
                value = work.begin()
            except BaseException:
                self._state = _State.OVER
                raise
            self._state = _State.OPEN
            return value
        self.__exit__(None, None, None)
        raise StopIteration

    def throw(self, typ: Any, val: Any = None, tb: TracebackType | None = None, /) -> T:
        try:
            raise _exception(typ, val, tb)
        except BaseException as error:
            self.__exit__(None, error, None)
            raise

    def __enter__(self) -> T:
        self._renew()
        return self.send(None)

    def __exit__(self, typ: object, error: BaseException | None, tb: object, /) -> None:
        if self._state is _State.NEW:
            self._state = _State.OVER
        elif self._state is not _State.OVER:
            self._refuse_if(_State.BUSY)
            self._state = _State.BUSY
            try:
                self._work.end(error)
            finally:
                self._state = _State.OVER

    if not TYPE_CHECKING:  # pragma: no branch  # what checkers do not see, they refuse
        __aiter__ = __aenter__ = __aexit__ = _wrong_form("`for` and `with`, without `async`")


class AsyncForms(_Unit, AsyncGenerator[T, None]):
    """`Forms` for `async with`, `async for`, `asynccontextmanager` and FastAPI's `Depends`.

    A loop that is left early cannot await its ending: that is for `AsyncWork.leave` to schedule.
    """

    _right_forms = (
        "`async with f() as value:`, or `async for value in f():` with nothing around `f()`"
    )

    def __init__(self, make: Callable[[], AsyncWork[T]]) -> None:
        self._make = make

    def __aiter__(self) -> "AsyncForms[T]":
        loop = AsyncForms(self._make)
        loop._witness = _Witness()
        self._renew(loop)
        return loop

    def __anext__(self) -> Coroutine[Any, Any, T]:
        if self._witness:  # now, not when it is awaited: the caller is the consumer
            self._witness.asked()
        return self.asend(None)

    async def asend(self, _: None, /) -> T:
        if self._state is _State.NEW:
            self._state = _State.BUSY
            try:
                self._work = work = self._make()
                value = await work.begin()
            except BaseException:
                self._state = _State.OVER
                raise
            self._state = _State.OPEN
            return value
        await self.__aexit__(None, None, None)
        raise StopAsyncIteration

    async def athrow(self, typ: Any, val: Any = None, tb: TracebackType | None = None, /) -> T:
        try:
            raise _exception(typ, val, tb)
        except BaseException as error:
            await self.__aexit__(None, error, None)
            raise

    async def __aenter__(self) -> T:
        self._renew()
        return await self.asend(None)

    async def __aexit__(self, typ: object, error: BaseException | None, tb: object, /) -> None:
        if self._state is _State.NEW:
            self._state = _State.OVER
        elif self._state is not _State.OVER:
            self._refuse_if(_State.BUSY)
            self._state = _State.BUSY
            try:
                await self._work.end(error)
            finally:
                self._state = _State.OVER

    if not TYPE_CHECKING:  # pragma: no branch
        __iter__ = __enter__ = __exit__ = _wrong_form("`async for` and `async with`")


# --- being seen as a generator function -----------------------------------------------------


def as_generator_function(function: Callable[P, Forms[T]]) -> Callable[P, Forms[T]]:
    """Show FastAPI a generator function: it unwraps a callable to see what that is.

    For `Depends` the function then has no parameters, so a request cannot set them; callers keep
    theirs. Nothing else changes.
    """
    function.__wrapped__ = _generator  # type: ignore[attr-defined]
    return function


def as_async_generator_function(function: Callable[P, AsyncForms[T]]) -> Callable[P, AsyncForms[T]]:
    """`as_generator_function` for a function that returns `AsyncForms`."""
    function.__wrapped__ = _async_generator  # type: ignore[attr-defined]
    return function


def _generator() -> Generator[Any, None, None]:
    yield ...


async def _async_generator() -> AsyncGenerator[Any, None]:
    yield ...
