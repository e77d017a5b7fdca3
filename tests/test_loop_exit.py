"""How a `for` was left, and the forms that are built on knowing it.

Most behaviour is the same with and without `async`, so most consumers here are small sources that
are compiled in both kinds: `{for_}` and friends stand for the two spellings.
"""

import asyncio
import contextlib
import dis
import functools
import gc
import inspect
import itertools
import logging
import random
import sys
import textwrap
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from types import FrameType
from typing import Any, assert_type

import httpx
import pytest
from fastapi import Depends, FastAPI, HTTPException

from repom import loop_exit
from repom.errors import ScopeError
from repom.forms import (
    AsyncForms,
    Forms,
    as_async_generator_function,
    as_generator_function,
)

Doubts = Callable[[], list[str]]
COMMIT, ROLLBACK = ["begin", "commit"], ["begin", "rollback"]


class BodyError(Exception):
    """What the consumers raise."""


class Session:
    """What the consumers get."""


class Log(list[str]):
    """What happened to each unit of work, in order, and the errors that ended them."""

    def __init__(self) -> None:
        self.errors: list[BaseException] = []
        self.failing: dict[str, BaseException] = {}

    def note(self, moment: str, error: BaseException | None = None) -> None:
        self.append(moment)
        if error is not None:
            self.errors.append(error)
        if moment in self.failing:
            raise self.failing[moment]


class SyncWork:
    owns = True

    def __init__(self, log: Log) -> None:
        self.log = log

    def begin(self) -> Session:
        self.log.note("begin")
        return Session()

    def end(self, error: BaseException | None, /) -> None:
        self.log.note("commit" if error is None else "rollback", error)

    def leave(self, *, commit: bool) -> None:
        self.log.note("commit" if commit else "rollback")


class InstantWork:
    """Async work that never suspends: for coroutines that are driven by hand."""

    owns = True

    def __init__(self, log: Log) -> None:
        self.sync = SyncWork(log)
        self.leave = self.sync.leave

    async def begin(self) -> Session:
        return self.sync.begin()

    async def end(self, error: BaseException | None, /) -> None:
        self.sync.end(error)


class RealAsyncWork(InstantWork):
    """Gives the event loop a turn wherever a database would."""

    async def begin(self) -> Session:
        await asyncio.sleep(0)
        return await super().begin()

    async def end(self, error: BaseException | None, /) -> None:
        await asyncio.sleep(0)
        await super().end(error)


class Pause:
    """Suspends a coroutine that is driven by hand."""

    def __await__(self) -> Generator[str, None, None]:
        yield "paused"


@pytest.fixture
def log() -> Log:
    return Log()


@pytest.fixture
def doubts(caplog: pytest.LogCaptureFixture) -> Doubts:
    """The ERRORs that repom has logged so far."""
    caplog.set_level(logging.ERROR, "repom")
    return lambda: [r.getMessage() for r in caplog.records if r.name == "repom"]


class Suppress:
    """A context manager of both kinds, for consumers to leave their loop through."""

    def __init__(self, *errors: type[BaseException]) -> None:
        self.errors = errors

    def __enter__(self) -> "Suppress":
        return self

    def __exit__(self, kind: type[BaseException] | None, *args: object) -> bool:
        return kind is not None and issubclass(kind, self.errors)

    async def __aenter__(self) -> "Suppress":
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *args: object) -> bool:
        return self.__exit__(kind)


def fail(really: bool = True) -> None:
    if really:
        raise BodyError


async def later(value: object = None) -> object:
    await asyncio.sleep(0)
    return value


def compiled(source: str, kind: str, **names: Any) -> Any:
    """The function `consumer` of `source`, in which `~` becomes `async ` or nothing."""
    prefix = "async " if kind == "async" else ""
    space = {"BodyError": BodyError, "Suppress": Suppress, "fail": fail, "later": later, **names}
    exec(textwrap.dedent(source).replace("~", prefix), space)
    return space["consumer"]


def source_of(log: Log, kind: str) -> Callable[[], Any]:
    if kind == "async":
        return lambda: AsyncForms(lambda: RealAsyncWork(log))
    return lambda: Forms(lambda: SyncWork(log))


async def result(value: Any) -> Any:
    return await value if inspect.isawaitable(value) else value


both_kinds = pytest.mark.parametrize("kind", ["sync", "async"])


# --- the ways to leave a loop ---------------------------------------------------------------

LEFT = {
    "end of the body": "pass",
    "continue as the last statement": "continue",
    "return": "return",
    "return of a constant": "return 1",
    "return of the session": "return s",
    "return of something that contains the session": "return {'s': [s], 'f': lambda: s}",
    "break": "break",
    "return from a condition": "if s: return s\nfail()",
    "return after an error caught in the body": "try: fail()\nexcept BodyError: pass\nreturn s",
    "return from an except clause": "try: fail()\nexcept BodyError as e: return str(e)",
    "break from an except clause": "try: fail()\nexcept BodyError: break",
    "end of the body after an error caught there": "try: fail()\nexcept BodyError: pass",
    "return from a try with finally": "try: return s\nfinally: len('')",
    "return from a finally clause": "try: pass\nfinally: return s",
    "return that overrides an error": "try: fail()\nfinally: return s",
    "return through a with": "with Suppress(): return s",
    "return through nested withs": "with Suppress(), Suppress() as b:\n  with b: return s",
    "return after a with that swallows": "with Suppress(BodyError): fail()\nreturn s",
    "return from a match": "match 1:\n  case 1: return s\n  case _: fail()",
    "return from a while": "while True: return s",
    "break after a while": "while True: break\nbreak",
    "return from a for": "for i in range(3):\n  if i: return i",
    "return from a comprehension's value": "return [i for i in range(3)]",
    "return while the session is deleted": "del s\nreturn 1",
    "return after an assert": "assert s\nreturn s",
    "return after an except* clause": "try: fail()\nexcept* BodyError: pass\nreturn s",
}
RAISED = {
    "raise": "raise BodyError",
    "an error in a call": "fail()",
    "an error in C code": "int('x')",
    "an error in an operator": "1 / 0",
    "an error in a subscript": "{}['x']",
    "an error in an attribute": "s.nothing",
    "an error in an unpacking": "a, b = (1,)",
    "an error in an assert": "raise AssertionError",
    "an error in the value to return": "return {}['x']",
    "an error in finally after return": "try: return s\nfinally: fail()",
    "raise in an except clause": "try: fail()\nexcept BodyError: raise",
    "another raise in an except clause": "try: fail()\nexcept BodyError: raise ValueError",
    "an error not caught by the except clause": "try: fail()\nexcept ValueError: return s",
    "an error through a finally": "try: fail()\nfinally: len('')",
    "an error through a with": "with Suppress(ValueError): fail()",
    "an error not caught by an except* clause": "try: fail()\nexcept* ValueError: pass",
    "an error in an except* clause": "try: fail()\nexcept* BodyError: raise KeyError",
    "an error in an inner loop": "for i in range(3): fail(i == 2)",
    "KeyboardInterrupt": "raise KeyboardInterrupt",
    "GeneratorExit": "raise GeneratorExit",
    "SystemExit": "raise SystemExit",
    "StopAsyncIteration": "raise StopAsyncIteration",
    "an error in a comprehension": "return [fail() for _ in (1,)]",
    "an error in a generator expression": "return list(fail() for _ in (1,))",
}
ASYNC_LEFT = {
    "return await": "return await later(s)",
    "return after await": "await later()\nreturn s",
    "return through an async with": "async with Suppress(): return await later(s)",
    "return with await in finally": "try: return s\nfinally: await later()",
    "end of the body after await": "await later()",
    "asyncio.timeout": "async with asyncio.timeout(9): return await later(s)",
}
ASYNC_RAISED = {
    "an error after await": "await later()\nfail()",
    "an error in an await": "await asyncio.wait_for(asyncio.sleep(9), 0)",
    "cancellation of itself": "asyncio.current_task().cancel()\nawait later()",
    "an error in a task group": (
        "async with asyncio.TaskGroup() as g:\n  g.create_task(later())\n  raise BodyError"
    ),
    "an error in an async with": "async with Suppress(ValueError): fail()",
}
WAYS = [
    *(
        pytest.param(k, b, COMMIT, id=f"{k}-{n}")
        for k in ("sync", "async")
        for n, b in LEFT.items()
    ),
    *(
        pytest.param(k, b, ROLLBACK, id=f"{k}-{n}")
        for k in ("sync", "async")
        for n, b in RAISED.items()
    ),
    *(pytest.param("async", b, COMMIT, id=f"async-{n}") for n, b in ASYNC_LEFT.items()),
    *(pytest.param("async", b, ROLLBACK, id=f"async-{n}") for n, b in ASYNC_RAISED.items()),
]


def in_a_loop(body: str) -> str:
    return "~def consumer():\n  ~for s in get():\n" + textwrap.indent(body, "    ")


async def outcome_of(consumer: Callable[[], Any]) -> BaseException | None:
    """Run the consumer to its end. Cancelling itself is an outcome like any other."""
    try:
        await result(consumer())
    except BaseException as error:
        if isinstance(error, asyncio.CancelledError):
            task = asyncio.current_task()
            assert task
            task.uncancel()
        # The frames in the traceback must not be what decides when something is dropped.
        return error.with_traceback(None)
    return None


@pytest.mark.parametrize(("kind", "body", "expected"), WAYS)
async def test_every_way_out(
    kind: str, body: str, expected: list[str], log: Log, doubts: Doubts
) -> None:
    """Reaching the end, `return`, `break` commit; an exception rolls back; neither is in doubt."""
    consumer = compiled(in_a_loop(body), kind, get=source_of(log, kind), asyncio=asyncio)
    error = await outcome_of(consumer)
    assert log == expected
    assert (error is None) == (expected is COMMIT)
    assert doubts() == []


@both_kinds
async def test_else_clause(kind: str, log: Log) -> None:
    """`else:` of the loop runs after the commit, and its own error changes nothing."""
    source = """
        ~def consumer():
            ~for s in get(): pass
            else: raise BodyError
    """
    assert isinstance(await outcome_of(compiled(source, kind, get=source_of(log, kind))), BodyError)
    assert log == COMMIT


@both_kinds
async def test_error_caught_outside_of_the_loop(kind: str, log: Log, doubts: Doubts) -> None:
    """An exception that leaves the loop rolls back, even if the same function then goes on."""
    source = """
        ~def consumer():
            try:
                ~for s in get(): fail()
            except BodyError:
                assert log == ["begin", "rollback"]
            return 1
    """
    assert await outcome_of(compiled(source, kind, get=source_of(log, kind), log=log)) is None
    assert log == ROLLBACK
    assert doubts() == []


@both_kinds
async def test_error_without_a_traceback_is_doubted(kind: str, log: Log, doubts: Doubts) -> None:
    """An exception whose traceback was cut rolls back all the same; only the reason is lost."""
    body = "try: fail()\nexcept BodyError as e:\n  e.__traceback__ = None\n  raise"
    await outcome_of(compiled(in_a_loop(body), kind, get=source_of(log, kind)))
    assert log == ROLLBACK
    assert "ended in a way that is not known" in doubts()[0]


@both_kinds
@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("return 1", ["begin", "begin", "commit", "commit"]),
        ("break", ["begin", "begin", "commit", "begin", "commit", "commit"]),
        ("pass", ["begin", "begin", "commit", "begin", "commit", "commit"]),
        ("fail()", ["begin", "begin", "rollback", "rollback"]),
    ],
)
async def test_nested_loops(kind: str, body: str, expected: list[str], log: Log) -> None:
    """Each loop is judged by how it was left itself, the inner one first."""
    source = f"""
        ~def consumer():
            ~for outer in get():
                ~for inner in get(): {body}
                ~for third in get(): break
    """
    await outcome_of(compiled(source, kind, get=source_of(log, kind)))
    assert log == expected


@both_kinds
async def test_inner_loop_fails_and_outer_goes_on(kind: str, log: Log) -> None:
    """An error that is caught between two loops rolls back the inner one only."""
    source = """
        ~def consumer():
            ~for outer in get():
                try:
                    ~for inner in get(): fail()
                except BodyError:
                    return outer
    """
    await outcome_of(compiled(source, kind, get=source_of(log, kind)))
    assert log == ["begin", "begin", "rollback", "commit"]


@both_kinds
async def test_comprehension(kind: str, log: Log, doubts: Doubts) -> None:
    """A comprehension runs to the end and commits, or raises and rolls back."""
    get = source_of(log, kind)
    source = "~def consumer(): return [s ~for s in get()]"
    assert await outcome_of(compiled(source, kind, get=get)) is None
    source = "~def consumer(): return [fail() ~for s in get()]"
    assert isinstance(await outcome_of(compiled(source, kind, get=get)), BodyError)
    assert log == COMMIT + ROLLBACK


@both_kinds
async def test_generator_expression(kind: str, log: Log) -> None:
    """A generator expression commits when exhausted; given up, it rolls back."""
    exhausted = "~def consumer(): return [x ~for x in (s ~for s in get())]"
    await outcome_of(compiled(exhausted, kind, get=source_of(log, kind)))
    given_up = "~def consumer():\n  ~for x in (s ~for s in get()): break"
    await outcome_of(compiled(given_up, kind, get=source_of(log, kind)))
    await asyncio.sleep(0)  # the event loop closes a dropped async generator
    await asyncio.sleep(0)
    assert log == COMMIT + ROLLBACK


@pytest.mark.parametrize(
    ("body", "expected"), [("break", COMMIT), ("pass", COMMIT), ("fail()", ROLLBACK)]
)
@pytest.mark.parametrize("around", ["{}", "class Consumer:\n  {}"], ids=["module", "class"])
def test_consumer_that_is_no_function(
    around: str, body: str, expected: list[str], log: Log, doubts: Doubts
) -> None:
    """A loop of a module or a class body is judged like any other."""
    source = around.format(f"for s in get(): {body}")
    with contextlib.suppress(BodyError):
        exec(source, {"get": source_of(log, "sync"), "fail": fail})
    assert log == expected
    assert doubts() == []


# --- consumers that are generators themselves -----------------------------------------------


def in_a_generator(kind: str, get: Any, body: str = "yield s") -> Any:
    return compiled(in_a_loop(body), kind, get=get)()


@both_kinds
async def test_generator_consumer(kind: str, log: Log) -> None:
    """A generator that yields in the loop commits when exhausted, rolls back on an exception."""
    get = source_of(log, kind)
    manager: Any = contextlib.contextmanager if kind == "sync" else contextlib.asynccontextmanager
    wrap = manager(compiled(in_a_loop("yield s"), kind, get=get))
    source = """
        ~def consumer(error):
            ~with wrap() as s:
                fail(error)
    """
    consumer = compiled(source, kind, wrap=wrap)
    assert await outcome_of(lambda: consumer(False)) is None
    assert isinstance(await outcome_of(lambda: consumer(True)), BodyError)
    assert log == COMMIT + ROLLBACK


@both_kinds
@pytest.mark.parametrize("body", ["yield s", "try: yield s\nfinally: len('')"])
async def test_closed_generator_consumer(kind: str, body: str, log: Log) -> None:
    """A generator that is closed inside of the loop rolls back."""
    generator = in_a_generator(kind, source_of(log, kind), body)
    if kind == "sync":
        next(generator)
        generator.close()
    else:
        await anext(generator)
        await generator.aclose()
    assert log == ROLLBACK


@both_kinds
async def test_dropped_generator_consumer(kind: str, log: Log) -> None:
    """A generator that is forgotten inside of the loop rolls back."""
    generator = in_a_generator(kind, source_of(log, kind))
    await anext(generator) if kind == "async" else next(generator)
    del generator
    for _ in range(3):
        await asyncio.sleep(0)
    assert log == ROLLBACK


@both_kinds
async def test_generator_consumer_leaves(kind: str, log: Log) -> None:
    """A generator that itself leaves the loop commits."""
    generator = in_a_generator(kind, source_of(log, kind), "yield s\nbreak")
    if kind == "sync":
        assert len(list(generator)) == 1
    else:
        assert len([s async for s in generator]) == 1
    assert log == COMMIT


def test_yield_from(log: Log) -> None:
    """`yield from` passes on what is thrown in, so its endings are known without any doubt."""

    def consumer() -> Generator[Session, None, None]:
        yield from Forms(lambda: SyncWork(log))

    list(consumer())
    with pytest.raises(BodyError), contextlib.contextmanager(consumer)():
        raise BodyError
    generator = consumer()
    next(generator)
    generator.close()
    assert log == COMMIT + ROLLBACK + ROLLBACK
    assert [type(error) for error in log.errors] == [BodyError, GeneratorExit]


def test_recursive_generator(log: Log) -> None:
    """A frame of the same code, leaving its own loop, is not taken for the consumer."""

    def walk(depth: int) -> Iterator[object]:
        if depth == 0:
            for session in Forms(lambda: SyncWork(log)):  # noqa: UP028  # the loop is the point
                yield session
        for _ in walk(depth - 1):
            break
        yield depth

    for _ in range(50):
        for _ in walk(1):
            break
    assert log == ROLLBACK * 50


def test_generator_that_dies_without_being_closed(log: Log, doubts: Doubts) -> None:
    """A dying frame drops its loop from another frame, which may even get its address."""

    async def walk(depth: int) -> AsyncIterator[object]:
        if depth == 0:
            async for session in AsyncForms(lambda: InstantWork(log)):
                yield session
        async for _ in walk(depth - 1):
            break
        yield depth

    async def consumer() -> None:
        async for _ in walk(1):
            break

    hooks = sys.get_asyncgen_hooks()
    sys.set_asyncgen_hooks(finalizer=lambda generator: None)  # as after the end of an event loop
    try:
        for _ in range(50):
            with pytest.raises(StopIteration):
                consumer().send(None)
    finally:
        sys.set_asyncgen_hooks(*hooks)
    gc.collect()
    assert sorted(log) == sorted(ROLLBACK * 50)
    assert len(doubts()) == 50


# --- cancellation and abandonment -----------------------------------------------------------


async def test_cancelled_consumer(log: Log, doubts: Doubts) -> None:
    """A task cancelled at an await in the loop rolls back."""
    entered = asyncio.Event()

    async def consumer() -> None:
        async for _ in AsyncForms(lambda: RealAsyncWork(log)):
            entered.set()
            await asyncio.sleep(60)

    task = asyncio.create_task(consumer())
    await entered.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert log == ROLLBACK
    assert doubts() == []


async def test_cancelled_while_returning(log: Log) -> None:
    """`return` has not happened while a `finally` on the way out can still be cancelled."""
    leaving = asyncio.Event()

    async def consumer() -> object:
        async for session in AsyncForms(lambda: RealAsyncWork(log)):
            try:
                return session
            finally:
                leaving.set()
                await asyncio.sleep(60)
        return None

    task = asyncio.create_task(consumer())
    await leaving.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert log == ROLLBACK


@pytest.mark.parametrize("moment", ["begin", "end"])
async def test_cancelled_while_beginning_or_ending(moment: str, log: Log) -> None:
    """A cancelled `begin` leaves nothing to end; a cancelled `end` is not repeated."""
    entered = asyncio.Event()

    class Slow(RealAsyncWork):
        async def begin(self) -> Session:
            if moment == "begin":
                entered.set()
                await asyncio.sleep(60)
            return await super().begin()

        async def end(self, error: BaseException | None, /) -> None:
            entered.set()
            await asyncio.sleep(60)

    async def consumer() -> None:
        async for _ in AsyncForms(lambda: Slow(log)):
            pass

    task = asyncio.create_task(consumer())
    await entered.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert log == ([] if moment == "begin" else ["begin"])


def test_coroutine_that_nobody_finishes(log: Log) -> None:
    """A coroutine destroyed at an await in the loop rolls back, with or without an event loop."""

    async def consumer() -> None:
        async for _ in AsyncForms(lambda: InstantWork(log)):
            await Pause()

    for close in (True, False):
        coroutine = consumer()
        coroutine.send(None)
        if close:
            coroutine.close()
        del coroutine
    assert log == ROLLBACK * 2


# --- attacks: never commit what an exception has left ---------------------------------------

HELD = {
    "iterator in a variable": """
        it = iter_(get())
        try:
            s = ~next(it)
            fail()
        except BodyError: pass
        box = [it]
        del it
        box.pop()
    """,
    "form in a variable": """
        it = get()
        try:
            ~for s in it: fail()
        except BodyError: pass
        box = [it]
        del it
        box.pop()
    """,
    "iterator in a variable, used by a loop": """
        it = iter_(get())
        try:
            ~for s in it: fail()
        except BodyError: pass
        it = None
    """,
    "iterator in a reference cycle": """
        it = iter_(get())
        try:
            s = ~next(it)
            fail()
        except BodyError as e:
            cycle = [it, e]
            cycle.append(cycle)
        del it, cycle
        gc.collect()
    """,
    "error kept in a variable": """
        try:
            ~for s in get(): fail()
        except BodyError as e: kept = e
        gc.collect()
    """,
    "consumer that fails below, in a frame that leaves a loop": """
        ~def below(it):
            s = ~next(it)
            fail()
        for _ in (1,):
            it = iter_(get())
            try: below_result = ~call(below, it)
            except BodyError: pass
            box = iter([it])
            del it
            for x in box:
                del x
                break
    """,
    "generator that holds the loop, dropped by an expression": """
        ~def inner():
            ~for s in get(): yield s
        box = [inner()]
        s = ~next(box[0])
        box.pop()
    """,
}


@both_kinds
@pytest.mark.parametrize("body", HELD.values(), ids=HELD)
async def test_held_iterator_never_commits(kind: str, body: str, log: Log) -> None:
    """Whoever keeps an iterator of his own and drops it somewhere proves nothing by that."""
    is_async = kind == "async"
    body = textwrap.dedent(body)
    body = body.replace("~next", "await anext" if is_async else "next")
    body = body.replace("~call(below, it)", "await below(it)" if is_async else "below(it)")
    source = "~def consumer():\n" + textwrap.indent(body, "    ")
    iter_ = aiter if is_async else iter
    await outcome_of(compiled(source, kind, get=source_of(log, kind), iter_=iter_, gc=gc))
    for _ in range(3):
        await asyncio.sleep(0)
    gc.collect()
    assert log == ROLLBACK


WRAPPERS = {
    "enumerate": enumerate,
    "zip": zip,
    "map": functools.partial(map, repr),
    "chain": itertools.chain,
    "islice": lambda form: itertools.islice(form, 2),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_wrapped_iterator_never_commits_early(wrap: Any, log: Log, doubts: Doubts) -> None:
    """An iterator inside `enumerate()` and the like is not the loop's own: only the end commits."""
    kept = wrap(Forms(lambda: SyncWork(log)))
    with contextlib.suppress(BodyError):
        for _ in kept:
            raise BodyError
    box = [kept]
    del kept
    box.pop()
    assert log == ROLLBACK
    for _ in wrap(Forms(lambda: SyncWork(log))):
        break
    assert log == ROLLBACK * 2
    assert len(doubts()) == 2
    assert "did not hold its iterator to itself" in doubts()[1]
    assert "test_wrapped_iterator_never_commits_early" in doubts()[1]
    assert "Write `with f() as value:`" in doubts()[1]
    for _ in wrap(Forms(lambda: SyncWork(log))):
        pass
    assert log == ROLLBACK * 2 + COMMIT


@both_kinds
async def test_loop_over_an_iterator(kind: str, log: Log, doubts: Doubts) -> None:
    """A loop over an iterator taken by hand makes a fresh one, so it can be judged."""
    iter_ = aiter if kind == "async" else iter
    source = """
        ~def consumer():
            it = iter_(get())
            ~for s in it: break
            ~for s in it: fail()
    """
    await outcome_of(compiled(source, kind, get=source_of(log, kind), iter_=iter_))
    assert log == COMMIT + ROLLBACK
    assert doubts() == []


def test_loop_over_a_proxy(log: Log) -> None:
    """A weak proxy hands its object's iterator straight to the loop, so it can be judged."""
    form = Forms(lambda: SyncWork(log))
    for _ in weakref.proxy(form):
        break
    assert log == COMMIT


def test_dropped_by_another_thread(log: Log, doubts: Doubts) -> None:
    """A generator that is closed by another thread, in whatever frame, rolls back."""
    generator = in_a_generator("sync", source_of(log, "sync"))
    next(generator)
    thread = threading.Thread(target=generator.close)
    thread.start()
    thread.join()
    assert log == ROLLBACK


def test_generator_resumed_by_another_thread(log: Log) -> None:
    """A generator consumer that leaves its loop in another thread than it began in commits."""
    generator = in_a_generator("sync", source_of(log, "sync"), "yield s\nbreak")
    next(generator)
    thread = threading.Thread(target=list, args=(generator,))
    thread.start()
    thread.join()
    assert log == COMMIT


def test_dropped_without_any_frame(log: Log, doubts: Doubts, monkeypatch: Any) -> None:
    """An iterator that C code drops with no Python code below rolls back loudly."""

    def no_frame(depth: int) -> FrameType:
        raise ValueError("call stack is not deep enough")

    for _ in Forms(lambda: SyncWork(log)):
        monkeypatch.setattr(sys, "_getframe", no_frame)
        break
    monkeypatch.undo()
    assert log == ROLLBACK
    assert len(doubts()) == 1


def test_interrupted_while_judging(log: Log, monkeypatch: Any) -> None:
    """A Ctrl-C inside of `__del__`, which Python cannot raise, still leaves nothing open."""
    unraisable: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", unraisable.append)

    def interrupted(self: object) -> tuple[bool, str]:
        raise KeyboardInterrupt

    monkeypatch.setattr(loop_exit.Witness, "dropped", interrupted)
    for _ in Forms(lambda: SyncWork(log)):
        break
    assert log == ROLLBACK
    assert [entry.exc_type for entry in unraisable] == [KeyboardInterrupt]


# --- tracers, debuggers, coverage -----------------------------------------------------------


@contextlib.contextmanager
def tracing(tracer: Any) -> Iterator[None]:
    before = sys.gettrace()
    sys.settrace(tracer)
    try:
        yield
    finally:
        sys.settrace(before)


@contextlib.contextmanager
def monitoring() -> Iterator[None]:
    """Every event of `sys.monitoring`, which instruments the code itself."""
    monitor: Any = sys.monitoring  # type: ignore[attr-defined, unused-ignore]
    tool = next(i for i in range(6) if monitor.get_tool(i) is None)
    monitor.use_tool_id(tool, "test")
    names = "LINE INSTRUCTION PY_START PY_RETURN PY_YIELD CALL JUMP BRANCH RAISE PY_UNWIND"
    events = [getattr(monitor.events, name) for name in names.split()]
    for event in events:
        monitor.register_callback(tool, event, lambda *args: None)
    monitor.set_events(tool, functools.reduce(int.__or__, events))
    try:
        yield
    finally:
        monitor.set_events(tool, 0)
        for event in events:
            monitor.register_callback(tool, event, None)
        monitor.free_tool_id(tool)


def every_opcode(frame: FrameType, event: str, arg: object) -> Any:
    frame.f_trace_opcodes = True
    return every_opcode


OBSERVERS = [pytest.param(lambda: tracing(every_opcode), id="settrace")]
if sys.version_info >= (3, 12):
    OBSERVERS.append(pytest.param(monitoring, id="monitoring"))


@pytest.mark.parametrize("observer", OBSERVERS)
@both_kinds
async def test_observed_consumer(kind: str, observer: Any, log: Log, doubts: Doubts) -> None:
    """Somebody who watches every instruction changes no verdict."""
    get = source_of(log, kind)
    left = compiled(in_a_loop("return s"), kind, get=get)
    raised = compiled(in_a_loop("fail()"), kind, get=get)
    with observer():
        await outcome_of(left)
        await outcome_of(raised)
    assert log == COMMIT + ROLLBACK
    assert doubts() == []


@pytest.mark.parametrize("body", ["break", "return 1", "return s", "with Suppress(): return s"])
def test_debugger_that_raises(body: str, log: Log) -> None:
    """A trace function can raise at any instruction, even at the one that leaves the loop."""
    source = f"def consumer():\n  for s in get():\n    s\n    {body}"
    consumer = compiled(source, "sync", get=source_of(log, "sync"))
    moment = 0
    while True:
        moment += 1
        remaining = moment
        log.clear()

        def quitting(frame: FrameType, event: str, arg: object) -> Any:
            nonlocal remaining
            if frame.f_code is not consumer.__code__:
                return None
            frame.f_trace_opcodes = True
            remaining -= 1
            if remaining < 0 and event in ("line", "opcode"):
                remaining = sys.maxsize
                quitting.left = "commit" in log  # type: ignore[attr-defined]
                raise BodyError
            return quitting

        with tracing(quitting):
            try:
                consumer()
            except BodyError:
                assert ("commit" in log) == quitting.left  # type: ignore[attr-defined]
            else:
                break
    assert moment > 5
    assert log == COMMIT


def test_kept_error_of_the_same_frame(log: Log, doubts: Doubts) -> None:
    """An older traceback through the consumer's frame does not stop its `break`."""
    kept = []
    for _ in Forms(lambda: SyncWork(log)):
        try:
            fail()
        except BodyError as error:
            kept.append(error)
        break
    assert log == COMMIT
    assert doubts() == []
    assert kept


# --- any program at all ---------------------------------------------------------------------


class Program:
    """A random consumer. `for s in get()` and `with get() as s` must mean the same in it."""

    def __init__(self, seed: int, kind: str, generator: bool) -> None:
        self.random = random.Random(seed)
        self.simple = ["pass", "fail()", "{}[0]", "return", "break", "continue", "assert s"]
        self.simple += [f"if flag(): {way}" for way in ("return", "break", "continue", "fail()")]
        self.simple += ["fail(flag())", "[fail(flag()) for _ in (1, 2)]"]
        if kind == "async":
            self.simple += ["await Pause()", "await Pause()", "fail(await later_flag())"]
        if generator:
            self.simple += ["yield s", "yield s", "yield s"]
        else:
            self.simple += ["return s", "return (s, flag())", "return [s for _ in (1,)]"]
        head = "~def consumer():\n  s = None\n" + "  if s: yield\n" * generator
        self.source = head + self.indent(self.form(4)) + "\n  return"

    def indent(self, text: str) -> str:
        return textwrap.indent(text, "  ")

    def block(self, depth: int) -> str:
        count = self.random.randint(1, 3)
        return self.indent("\n".join(self.statement(depth - 1) for _ in range(count)))

    def form(self, depth: int) -> str:
        return "for _ in (1,):\n  ~for s in get():\n" + self.indent(self.block(depth))

    def statement(self, depth: int) -> str:
        if depth <= 0 or self.random.random() < 0.4:
            return self.random.choice(self.simple)
        compound = self.random.choice(
            [
                "try:\n{0}\nexcept BodyError:\n{1}",
                "try:\n{0}\nexcept (BodyError, KeyError) as error:\n{1}\n  raise",
                "try:\n{0}\nexcept BodyError:\n{1}\nelse:\n{2}",
                "try:\n{0}\nfinally:\n{f}",
                "try:\n{0}\nexcept BodyError:\n{1}\nfinally:\n{f}",
                "with Suppress():\n{0}",
                "~with Suppress(BodyError):\n{0}",
                "for _ in (1, 2):\n{0}\nelse:\n{1}",
                "while flag():\n{0}",
                "if flag():\n{0}\nelse:\n{1}",
                "match flag():\n  case True:\n" + self.indent("{0}") + "\n  case _: pass",
                self.form(depth).replace("{", "{{").replace("}", "}}"),
            ]
        )
        blocks = [self.block(depth) for _ in range(3)]
        # A generator that yields while it is being closed is an error of its own.
        return compound.format(*blocks, f=blocks[0].replace("yield s", "pass"))


def run(source: str, seed: int, kind: str, generator: bool) -> tuple[Log, list[str]] | None:
    """What happened to the work, and what the consumer's driver saw."""
    log, seen = Log(), list[str]()
    choices, flags = random.Random(seed), itertools.count()

    def flag() -> bool:
        return next(flags) < 30 and choices.random() < 0.4

    async def later_flag() -> bool:
        return flag()

    get: Any = functools.partial(Forms, lambda: SyncWork(log))
    if kind == "async":
        get = functools.partial(AsyncForms, lambda: InstantWork(log))
    names = {"get": get, "flag": flag, "later_flag": later_flag, "Pause": Pause}
    try:
        consumer = compiled(source, kind, **names)
    except SyntaxError:  # `break` outside of a loop is not worth avoiding
        return None
    driver = random.Random(seed)

    def step(call: Callable[[], Any]) -> bool:
        try:
            value = call()
            while kind == "async" and generator:  # what the async generator does at one step
                if driver.random() < 0.2:
                    value.throw(KeyboardInterrupt)
                value.send(None)
        except StopIteration as stop:
            seen.append(f"stop {type(stop.value).__name__}")
            return kind == "async" and generator
        except BaseException as error:
            seen.append(repr(error))
            return False
        return True

    if not generator and kind == "sync":
        step(consumer)
        return log, seen
    started = consumer()
    throw, close, send = (
        (started.athrow, started.aclose, started.asend)
        if kind == "async" and generator
        else (started.throw, started.close, started.send)
    )
    while step(
        driver.choices([lambda: send(None), lambda: throw(BodyError()), close], [9, 1, 1])[0]
    ):
        if len(seen) > 20:
            break
    return log, seen


@pytest.mark.parametrize("observer", [pytest.param(contextlib.nullcontext, id="plain"), *OBSERVERS])
@pytest.mark.parametrize("generator", [False, True], ids=["function", "generator"])
@both_kinds
def test_random_programs(kind: str, generator: bool, observer: Any) -> None:
    """Whatever the program, a loop ends its work exactly as a `with` block in its place does."""
    endings = Log()
    for seed in range(120):
        source = Program(seed, kind, generator).source
        with observer():
            loop = run(source, seed, kind, generator)
            block = run(
                source.replace("~for s in get():", "~with get() as s:"), seed, kind, generator
            )
        assert loop == block, source
        endings += loop[0] if loop else []
    assert min(endings.count("commit"), endings.count("rollback")) > 10


# --- what the instructions are --------------------------------------------------------------


@pytest.fixture
def fresh_signs() -> Iterator[None]:
    """Let the test learn the signs anew, and everything after it once more."""
    loop_exit._signs.cache_clear()
    yield
    loop_exit._signs.cache_clear()


def opcodes(*names: str) -> set[int]:
    return {dis.opmap[name] for name in names}


def test_signs_of_the_tested_interpreters(fresh_signs: None) -> None:
    """What is learned on the interpreters that this is tested on is what their source says."""
    signs = loop_exit._signs()
    assert signs.made == opcodes("GET_ITER", "GET_AITER")
    assert signs.left == opcodes("POP_TOP")
    assert signs is loop_exit._signs()


@pytest.mark.parametrize("observer", OBSERVERS)
def test_signs_learned_under_observation(observer: Any, fresh_signs: None) -> None:
    """A debugger that watches while the signs are learned does not change them."""
    with observer():
        signs = loop_exit._signs()
    loop_exit._signs.cache_clear()
    assert signs == loop_exit._signs()


@pytest.mark.usefixtures("fresh_signs")
@both_kinds
async def test_ambiguous_interpreter(kind: str, log: Log, doubts: Doubts, monkeypatch: Any) -> None:
    """Where an exception drops an iterator as `return` does, nothing left early is committed."""
    monkeypatch.setattr(loop_exit, "_LEFT", ("break",))
    monkeypatch.setattr(loop_exit, "_RAISED", ("return 0",))
    consumer = compiled(in_a_loop("return s"), kind, get=source_of(log, kind))
    await outcome_of(consumer)
    assert log == ROLLBACK
    assert "ended in a way that is not known" in doubts()[0]


@pytest.mark.usefixtures("fresh_signs")
@both_kinds
async def test_unreadable_interpreter(
    kind: str, log: Log, doubts: Doubts, monkeypatch: Any
) -> None:
    """Elsewhere than on CPython only the end of the body commits, and the log says so."""
    monkeypatch.setattr(loop_exit, "_readable", False)
    get = source_of(log, kind)
    for body in ("return s", "fail()", "pass"):
        await outcome_of(compiled(in_a_loop(body), kind, get=get))
    assert log == ROLLBACK + ROLLBACK + COMMIT
    assert "an interpreter that does not show its frames" in doubts()[0]
    assert ("Write `async with" if kind == "async" else "Write `with") in doubts()[0]


# --- the other forms ------------------------------------------------------------------------


async def entered(kind: str, manager: Any, body: Callable[[], object]) -> Any:
    """Run `body` inside of the block and return what the block gave."""
    if kind == "sync":
        with manager as value:
            body()
        return value
    async with manager as value:
        body()
    return value


@both_kinds
async def test_with_block(kind: str, log: Log) -> None:
    """A block that ends commits; an exception reaches the work and leaves the block unchanged."""
    get = source_of(log, kind)
    assert isinstance(await entered(kind, get(), list), Session)
    with pytest.raises(BodyError) as caught:
        await entered(kind, get(), fail)
    assert log == COMMIT + ROLLBACK
    assert log.errors == [caught.value]


@both_kinds
async def test_contextmanager(kind: str, log: Log) -> None:
    """`contextlib` can drive the generator, and gets the very exception back that it threw in."""
    manager: Any = contextlib.contextmanager if kind == "sync" else contextlib.asynccontextmanager
    get = manager(source_of(log, kind))
    assert isinstance(await entered(kind, get(), list), Session)
    for error in (BodyError(), KeyboardInterrupt(), RuntimeError(), StopAsyncIteration()):
        with pytest.raises(type(error)) as caught:
            await entered(kind, get(), functools.partial(exec, "raise error", {"error": error}))
        assert caught.value is error
    assert log == COMMIT + ROLLBACK * 4


async def test_contextmanager_and_stop_iteration(log: Log) -> None:
    """`StopIteration`, which a coroutine may not raise, comes out as it went in."""
    with (
        pytest.raises(StopIteration),
        contextlib.contextmanager(lambda: Forms(lambda: SyncWork(log)))(),
    ):
        raise StopIteration
    with pytest.raises(StopIteration):
        async with contextlib.asynccontextmanager(lambda: AsyncForms(lambda: InstantWork(log)))():
            raise StopIteration
    assert log == ROLLBACK * 2


@both_kinds
async def test_failing_commit(kind: str, log: Log) -> None:
    """A failing COMMIT is raised to the consumer in every form that is there to hear of it."""
    log.failing["commit"] = BodyError("no commit")
    get = source_of(log, kind)
    manager: Any = contextlib.contextmanager if kind == "sync" else contextlib.asynccontextmanager
    ends = [
        lambda: entered(kind, get(), list),
        lambda: entered(kind, manager(get)(), list),
        compiled(in_a_loop("pass"), kind, get=get),
    ]
    for end in ends:
        error = await outcome_of(end)
        assert error is log.failing["commit"]
    assert log == COMMIT * 3


@both_kinds
async def test_failing_rollback(kind: str, log: Log) -> None:
    """An error while rolling back is raised, with the error that it hides as its context."""
    log.failing["rollback"] = ConnectionError("gone")
    get = source_of(log, kind)
    manager: Any = contextlib.contextmanager if kind == "sync" else contextlib.asynccontextmanager
    for form in (get(), manager(get)()):
        log.failing["rollback"] = ConnectionError("gone")
        with pytest.raises(ConnectionError) as caught:
            await entered(kind, form, fail)
        assert isinstance(caught.value.__context__, BodyError)
    begun = get()
    await result(begun.__anext__() if kind == "async" else next(begun))
    log.failing["rollback"] = ConnectionError("gone")
    with pytest.raises(ConnectionError) as caught:
        await result(begun.athrow(BodyError()) if kind == "async" else begun.throw(BodyError()))
    assert isinstance(caught.value.__context__, BodyError)


@both_kinds
async def test_failing_begin(kind: str, log: Log) -> None:
    """Work that cannot begin is not ended, and the generator is over."""
    log.failing["begin"] = BodyError("cannot begin")
    get = source_of(log, kind)
    assert isinstance(await outcome_of(lambda: entered(kind, get(), list)), BodyError)
    assert isinstance(await outcome_of(compiled(in_a_loop("pass"), kind, get=get)), BodyError)
    form = get()
    for _ in range(2):  # neither busy nor open afterwards: the same object can try again
        assert isinstance(await outcome_of(lambda: entered(kind, form, list)), BodyError)
    assert log == ["begin"] * 4


def test_generator_protocol(log: Log) -> None:
    """`next`, `send`, `throw` and `close` do what they do on a generator with one `yield`."""

    def get() -> Forms[Session]:
        return Forms(lambda: SyncWork(log))

    form = get()
    assert isinstance(form.send(None), Session)
    for _ in range(2):
        with pytest.raises(StopIteration):
            next(form)
    assert log == COMMIT
    form.close()
    assert log == COMMIT

    form = get()
    next(form)
    form.close()
    form.close()
    assert log == COMMIT + ROLLBACK
    with pytest.raises(StopIteration):
        next(form)

    error = BodyError()
    tb = error.__traceback__
    thrown: list[Any] = [[error], [BodyError, error], [BodyError, error, tb], [BodyError]]
    for arguments in [*thrown, [BodyError, None]]:
        form = get()
        next(form)
        with pytest.raises(BodyError):
            form.throw(*arguments)
        with pytest.raises(BodyError):
            form.throw(BodyError)
        with pytest.raises(StopIteration):
            next(form)
    assert log == COMMIT + ROLLBACK * 6

    form = get()
    with pytest.raises(BodyError):
        form.throw(BodyError, BodyError(), sys.exc_info()[2])
    form = get()
    form.close()
    with pytest.raises(StopIteration):
        next(form)
    assert log == COMMIT + ROLLBACK * 6


async def test_async_generator_protocol(log: Log) -> None:
    """`anext`, `asend`, `athrow` and `aclose` do what they do on one with one `yield`."""

    def get() -> AsyncForms[Session]:
        return AsyncForms(lambda: RealAsyncWork(log))

    form = get()
    assert isinstance(await form.asend(None), Session)
    for _ in range(2):
        with pytest.raises(StopAsyncIteration):
            await anext(form)
    await form.aclose()
    assert log == COMMIT

    form = get()
    await anext(form)
    await form.aclose()
    await form.aclose()
    assert log == COMMIT + ROLLBACK
    with pytest.raises(StopAsyncIteration):
        await anext(form)

    thrown: list[Any] = [[BodyError()], [BodyError, BodyError(), None], [BodyError]]
    for arguments in thrown:
        form = get()
        await anext(form)
        for _ in range(2):
            with pytest.raises(BodyError):
                await form.athrow(*arguments)
    assert log == COMMIT + ROLLBACK * 4

    form = get()
    with pytest.raises(BodyError):
        await form.athrow(BodyError())
    with pytest.raises(StopAsyncIteration):
        await anext(form)
    await get().aclose()
    assert log == COMMIT + ROLLBACK * 4


def test_traceback_of_throw(log: Log) -> None:
    """The traceback that `throw` is given stays on the exception."""
    with pytest.raises(BodyError) as first:
        fail()
    error, traceback = first.value.with_traceback(None), first.tb
    form = Forms(lambda: SyncWork(log))
    next(form)
    with pytest.raises(BodyError) as caught:
        form.throw(BodyError, error, traceback)
    frames = [entry.name for entry in caught.traceback]
    assert frames[-1] == "fail"


# --- misuse ---------------------------------------------------------------------------------


@both_kinds
async def test_never_begun(kind: str, log: Log, doubts: Doubts) -> None:
    """A form that nobody enters, and an iterator that nobody asks, do nothing."""
    get = source_of(log, kind)
    get()
    aiter(get()) if kind == "async" else iter(get())
    assert log == doubts() == []


@both_kinds
async def test_begun_by_hand_and_dropped(kind: str, log: Log, doubts: Doubts) -> None:
    """What `next()` began and nobody ended is rolled back, and the log says what to write."""
    await result(anext(source_of(log, kind)()) if kind == "async" else next(source_of(log, kind)()))
    assert log == ROLLBACK
    [doubt] = doubts()
    assert "begun by hand" in doubt
    right = "Write `async with f() as value:`" if kind == "async" else "Write `with f() as value:`"
    assert right in doubt


@both_kinds
async def test_reused_one_after_the_other(kind: str, log: Log) -> None:
    """One object serves any number of blocks and loops, each a unit of work of its own."""
    form = source_of(log, kind)()
    await entered(kind, form, list)
    await entered(kind, form, list)
    for body in ("pass", "break", "fail()"):
        await outcome_of(compiled(in_a_loop(body), kind, get=lambda: form))
    assert log == COMMIT * 4 + ROLLBACK


IN_USE = {
    "block in a block": "~with form as a:\n  ~with form as b: pass",
    "loop in a block": "~with form as a:\n  ~for b in form: pass",
    "block in a loop": "~for a in form:\n  ~with form as b: pass",
    "loop in a loop": "~for a in form:\n  ~for b in form: pass",
}


@both_kinds
@pytest.mark.parametrize("body", IN_USE.values(), ids=IN_USE)
async def test_used_twice_at_once(kind: str, body: str, log: Log) -> None:
    """A second use while the first is open is refused, with what to do instead."""
    source = "~def consumer():\n" + textwrap.indent(body, "  ")
    error = await outcome_of(compiled(source, kind, form=source_of(log, kind)()))
    assert isinstance(error, ScopeError)
    assert "Call the function that made it once more" in str(error)
    assert log == ROLLBACK


async def test_used_by_two_tasks(log: Log) -> None:
    """Two tasks that drive one object are told so; the first one's work is not harmed."""
    form = AsyncForms(lambda: RealAsyncWork(log))
    first = asyncio.create_task(form.asend(None))
    await asyncio.sleep(0)
    with pytest.raises(ScopeError, match="by another task"):
        await anext(form)
    with pytest.raises(ScopeError, match="by another task"):
        await form.aclose()
    assert isinstance(await first, Session)
    await form.aclose()
    assert log == ROLLBACK


def test_async_form_used_without_async(log: Log) -> None:
    """`for` and `with` on the async form name the right form."""
    form: Any = AsyncForms(lambda: RealAsyncWork(log))
    with pytest.raises(
        TypeError, match=r"used with `async for` and `async with`.\nWrite `async with"
    ):
        for _ in form:
            pass
    with pytest.raises(TypeError, match="used with `async for` and `async with`"), form:
        pass
    assert log == []


async def test_sync_form_used_with_async(log: Log) -> None:
    """`async for` and `async with` on the sync form name the right form."""
    form: Any = Forms(lambda: SyncWork(log))
    with pytest.raises(TypeError, match=r"without `async`.\nWrite `with f\(\) as value:`"):
        async for _ in form:
            pass
    with pytest.raises(TypeError, match="used with `for` and `with`, without `async`"):
        async with form:
            pass
    assert log == []


# --- FastAPI --------------------------------------------------------------------------------


class Dependencies:
    """Both kinds of dependency, and an application that uses them."""

    def __init__(self, log: Log) -> None:
        @as_generator_function
        def get_sync(database: str = "default") -> Forms[Session]:
            log.append(database)
            return Forms(lambda: SyncWork(log))

        @as_async_generator_function
        def get_async(database: str = "default") -> AsyncForms[Session]:
            log.append(database)
            return AsyncForms(lambda: RealAsyncWork(log))

        self.get: dict[str, Any] = {"sync": get_sync, "async": get_async}
        self.app = FastAPI()
        for kind, get in self.get.items():
            for scope in ("function", "request"):
                self.add_routes(f"/{kind}/{scope}", Depends(get, scope=scope), log)

    def add_routes(self, path: str, session: Any, log: Log) -> None:
        @self.app.get(path)
        async def succeed(session: Session = session) -> bool:
            log.append("endpoint")
            return isinstance(session, Session)

        @self.app.get(path + "/missing")
        def missing(session: Session = session) -> None:
            raise HTTPException(404)


@both_kinds
@pytest.mark.parametrize("scope", ["function", "request"])
async def test_fastapi(kind: str, scope: str, log: Log) -> None:
    """`Depends` commits after the endpoint, rolls back on its exception, in both scopes."""
    app = Dependencies(log).app

    async def answered(*args: Any) -> None:
        async def noting(message: Any) -> None:
            if message["type"] == "http.response.start":
                log.append("answer")
            await args[2](message)

        await app(args[0], args[1], noting)

    transport = httpx.ASGITransport(answered)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        response = await client.get(f"/{kind}/{scope}?database=evil")
        assert (response.status_code, response.json()) == (200, True)
        ending = ["commit", "answer"] if scope == "function" else ["answer", "commit"]
        assert log == ["default", "begin", "endpoint", *ending]
        log.clear()
        assert (await client.get(f"/{kind}/{scope}/missing")).status_code == 404
        assert sorted(log) == ["answer", "begin", "default", "rollback"]
    [error] = log.errors
    assert isinstance(error, HTTPException)


async def test_fastapi_shows_no_parameters(log: Log) -> None:
    """The parameters of the function are for callers, not for the request."""
    dependencies = Dependencies(log)
    operations = dependencies.app.openapi()["paths"].values()
    assert [list(op["get"].get("parameters", ())) for op in operations] == [[]] * 8
    assert not inspect.signature(dependencies.get["async"]).parameters
    async with dependencies.get["async"](database="other"):
        pass
    assert log == ["other", *COMMIT]


# --- documentation and types ----------------------------------------------------------------


async def test_types(log: Log) -> None:
    """Type checkers know what every form gives; this test is also for them."""

    @as_generator_function
    def get() -> Forms[Session]:
        return Forms(lambda: SyncWork(log))

    @as_async_generator_function
    def get_async(database: str | None = None) -> AsyncForms[Session]:
        return AsyncForms(lambda: RealAsyncWork(log))

    for session in get():
        assert_type(session, Session)
    with get() as session:
        assert_type(session, Session)
    with contextlib.contextmanager(get)() as session:
        assert_type(session, Session)
    async for session in get_async("other"):
        assert_type(session, Session)
    async with get_async() as session:
        assert_type(session, Session)
    async with contextlib.asynccontextmanager(get_async)() as session:
        assert_type(session, Session)

    async def endpoint(session: Session = Depends(get_async)) -> Session:
        return session

    with pytest.raises(TypeError):
        for _ in get_async():  # type: ignore[attr-defined]  # pyright: ignore
            pass
    assert log == COMMIT * 6
