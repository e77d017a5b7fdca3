"""Greenlets that are used again: what SQLAlchemy begins anew for every operation of a session.

A new greenlet gets memory for its Python frames from the system and gives it back in the end:
https://github.com/python/cpython/blob/v3.11.7/Python/pystate.c (`push_chunk`). That and the page
faults in it take 10 us, as much as a tenth of a short transaction.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any, TypeVar

from greenlet import getcurrent, greenlet
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.util import greenlet_spawn

T = TypeVar("T")

#: The greenlet that runs: a worker, or what has called one.
_running: Callable[[], Any] = getcurrent

#: Of one thread, those that wait for the next operation. There are seldom more operations at a
#: time than connections, and each keeps the memory that it had (16 KiB and its part of the stack).
MOST_IDLE = 32


class _Idle(threading.local):
    """Those of one thread, to which a greenlet belongs for ever."""

    def __init__(self) -> None:
        self.workers: list[_Worker] = []


_idle = _Idle()


class _Worker(greenlet):  # type: ignore[misc]
    """Does one operation after the other.

    An operation that raises ends it. So a traceback is what it would be in a new one.

    Attributes:
        is_done: whether it has done what it was given, and `result` is there.
    """

    __slots__ = ("is_done", "result")

    __sqlalchemy_greenlet_provider__ = True  # what `await_only()` asks for


def _work() -> None:
    # Nothing here may lead to the worker, or to what it has done before: one that waits for the
    # next operation is not seen by the garbage collector.
    while True:
        function, args, kwargs = _running().parent.switch()
        _running().result = function(*args, **kwargs)
        del function, args, kwargs
        _running().is_done = True


def _new_worker() -> _Worker:
    worker = _Worker(_work)
    # With nothing, since greenlets keep what they are started with.
    worker.switch()
    return worker


async def spawn(
    function: Callable[..., T], *args: Any, _require_await: bool = False, **kwargs: Any
) -> T:
    """Run `function`, which waits by `await_only()`, as SQLAlchemy's `greenlet_spawn()` does."""
    if _require_await:
        return await greenlet_spawn(function, *args, _require_await=True, **kwargs)
    here = _running()
    workers = _idle.workers
    worker: Any = workers.pop() if workers else _new_worker()
    worker.parent = here
    worker.gr_context = here.gr_context
    worker.is_done = False
    if type(function) is MethodType:  # and none of those that only look so, as tracing makes them
        # Since 3.12 Python calls its own functions without another frame of C's, but no methods
        # so. What C has on its stack is copied with every switch, and kept while this waits.
        method: Any = function
        function, args = method.__func__, (method.__self__, *args)
    awaited = worker.switch(function, args, kwargs)
    while not worker.is_done:
        try:
            value = await awaited
        except BaseException:
            awaited = worker.throw(*sys.exc_info())
        else:
            awaited = worker.switch(value)
    result: T = worker.result
    worker.result = worker.gr_context = None
    if len(workers) < MOST_IDLE:
        workers.append(worker)
    return result


def spawning_class(base: type[AsyncSession]) -> type[AsyncSession]:
    """A subclass of `base` whose operations run in such greenlets. One for each `base`."""
    found = _spawning_classes.get(base)
    return found if found is not None else _spawning_classes.setdefault(base, _make(base))


_spawning_classes: dict[type[AsyncSession], type[AsyncSession]] = {}


def _make(base: type[AsyncSession]) -> type[AsyncSession]:
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": None}
    bases = (_SpawningSession,) if base is AsyncSession else (base, _SpawningSession)
    return type(base.__name__, bases, names)


class _SpawningSession(AsyncSession):
    """SQLAlchemy's methods, for which `greenlet_spawn()` is the one above."""


def _spawning(method: FunctionType) -> FunctionType:
    names = {**method.__globals__, greenlet_spawn.__name__: spawn}
    copy = FunctionType(
        method.__code__, names, method.__name__, method.__defaults__, method.__closure__
    )
    copy.__kwdefaults__ = method.__kwdefaults__
    functools.update_wrapper(copy, method)
    return copy


for _name, _method in vars(AsyncSession).items():
    if isinstance(_method, FunctionType) and greenlet_spawn.__name__ in _method.__code__.co_names:
        setattr(_SpawningSession, _name, _spawning(_method))
