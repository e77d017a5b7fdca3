"""One unit of work in every form that Python has for it.

`Forms` and `AsyncForms` are what `get_db_session()` and `get_async_db_session()` return: usable
in `with`, in `for`, and as the generator that contextlib and FastAPI's `Depends` drive. What a
unit of work is, they leave to `Work`; how a `for` was left, to `repom.loop_exit`.
"""

import enum
import logging
import weakref
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, TypeVar

from repom.errors import ScopeError
from repom.loop_exit import Witness

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
F = TypeVar("F", bound=Callable[..., Any])

_log = logging.getLogger("repom")


class Work(Protocol[T_co]):
    """One unit of work: begun once, then ended once, by `end` or by `leave`.

    Attributes:
        owns: whether there is anything to end. The unit of work of an enclosing scope is not:
            its owner ends it.
    """

    @property
    def owns(self) -> bool: ...
    def begin(self) -> T_co: ...  # what the user gets; if it fails, nothing stays open
    def end(self, error: BaseException | None, /) -> None: ...  # commit if there is no error
    def leave(self, *, commit: bool) -> None: ...  # in place of `end`, by `__del__`: must not raise


class AsyncWork(Protocol[T_co]):
    """`Work` that awaits, except in `leave`, which can only schedule the ending."""

    @property
    def owns(self) -> bool: ...
    async def begin(self) -> T_co: ...
    async def end(self, error: BaseException | None, /) -> None: ...
    def leave(self, *, commit: bool) -> None: ...


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
    _witness: Witness | None = None
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
        if self._state is not _State.OPEN or not self._work.owns:
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
        when_driven: called before the work begins where others drive the generator, who then
            decide when it ends; not in `with` and `for`.

    Example:
        >>> class Counted:
        ...     owns = True
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

    def __init__(
        self, make: Callable[[], Work[T]], *, when_driven: Callable[[], object] | None = None
    ) -> None:
        self._make = make
        self._when_driven = when_driven

    def __iter__(self) -> "Forms[T]":
        loop = Forms(self._make)
        loop._witness = Witness()
        self._renew(loop)
        return loop

    def __next__(self) -> T:
        if self._witness:
            self._witness.asked()
        return self.send(None)

    def send(self, _: None, /) -> T:
        if self._state is _State.NEW:
            if self._when_driven:
                self._when_driven()
            return self._begin()
        self.__exit__(None, None, None)
        raise StopIteration

    def _begin(self) -> T:
        self._state = _State.BUSY
        try:
            self._work = work = self._make()
            value = work.begin()
        except BaseException:
            self._state = _State.OVER
            raise
        self._state = _State.OPEN
        return value

    def throw(self, typ: Any, val: Any = None, tb: TracebackType | None = None, /) -> T:
        try:
            raise _exception(typ, val, tb)
        except BaseException as error:
            self.__exit__(None, error, None)
            raise

    def __enter__(self) -> T:
        self._renew()
        return self._begin()

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

    def __init__(
        self, make: Callable[[], AsyncWork[T]], *, when_driven: Callable[[], object] | None = None
    ) -> None:
        self._make = make
        self._when_driven = when_driven

    def __aiter__(self) -> "AsyncForms[T]":
        loop = AsyncForms(self._make)
        loop._witness = Witness()
        self._renew(loop)
        return loop

    def __anext__(self) -> Coroutine[Any, Any, T]:
        if self._witness:  # now, not when it is awaited: the caller is the consumer
            self._witness.asked()
        return self.asend(None)

    async def asend(self, _: None, /) -> T:
        if self._state is _State.NEW:
            if self._when_driven:
                self._when_driven()
            return await self._begin()
        await self.__aexit__(None, None, None)
        raise StopAsyncIteration

    async def _begin(self) -> T:
        self._state = _State.BUSY
        try:
            self._work = work = self._make()
            value = await work.begin()
        except BaseException:
            self._state = _State.OVER
            raise
        self._state = _State.OPEN
        return value

    async def athrow(self, typ: Any, val: Any = None, tb: TracebackType | None = None, /) -> T:
        try:
            raise _exception(typ, val, tb)
        except BaseException as error:
            await self.__aexit__(None, error, None)
            raise

    async def __aenter__(self) -> T:
        self._renew()
        return await self._begin()

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


def as_generator_function(function: F) -> F:
    """Show FastAPI a generator function: it unwraps a callable to see what that is.

    For `Depends` the function then has no parameters, so a request cannot set them; callers keep
    theirs. Nothing else changes.
    """
    function.__wrapped__ = _generator  # type: ignore[attr-defined]
    return function


def as_async_generator_function(function: F) -> F:
    """`as_generator_function` for a function that returns `AsyncForms`."""
    function.__wrapped__ = _async_generator  # type: ignore[attr-defined]
    return function


def _generator() -> Generator[Any, None, None]:
    yield ...


async def _async_generator() -> AsyncGenerator[Any, None]:
    yield ...
