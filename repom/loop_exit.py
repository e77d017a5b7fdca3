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

import functools
import gc
import logging
import sys
from types import CodeType, FrameType, TracebackType
from typing import Any, NamedTuple, ParamSpec, Self, TypeVar

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
P = ParamSpec("P")

_log = logging.getLogger("repom")
_readable = sys.implementation.name == "cpython" and hasattr(sys, "_getframe")


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


class Witness:
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
