"""Which line of the application, or of its tests, is running."""

from __future__ import annotations

import asyncio
import functools
import os
import site
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import sqlalchemy
from greenlet import getcurrent

import repom
from repom.shield import acting_task


def place_here() -> str:
    """The innermost line that is of no library and not of Python: "app/users.py:12".

    If there is none, as in a task that a library has started, the library's.
    """
    of_a_library = None
    for frame in _frames():
        file = frame.f_code.co_filename
        if not file.startswith(_LIBRARIES):
            return _place(frame)
        if of_a_library is None and not file.startswith(_OURS):
            of_a_library = frame
    return "?" if of_a_library is None else _place(of_a_library)


def _frames() -> Iterator[FrameType]:
    """The frames of this thread, from inside out, past the greenlets of SQLAlchemy."""
    frame: FrameType | None = sys._getframe(2)
    greenlet = getcurrent()
    while frame is not None:
        yield frame
        frame = frame.f_back
        while frame is None and greenlet.parent is not None:
            greenlet = greenlet.parent
            frame = greenlet.gr_frame
    if asyncio._get_running_loop() is not None:
        # A unit of work may open its connection when it ends, in a task of its own.
        task = acting_task()
        if task is not None and task is not asyncio.current_task():
            yield from reversed(list(_suspended(task.get_coro())))


def _suspended(coroutine: Any) -> Iterator[FrameType]:
    """The frames of a coroutine that waits, from outside in."""
    while (frame := getattr(coroutine, "cr_frame", None)) is not None:
        yield frame
        coroutine = coroutine.cr_await


def _place(frame: FrameType) -> str:
    return f"{_shown(frame.f_code.co_filename, os.getcwd())}:{frame.f_lineno}"


@functools.cache
def _shown(file: str, folder: str) -> Path:
    """`file`, as seen from `folder` if it is in there."""
    path = Path(file)
    return path.relative_to(folder) if path.is_relative_to(folder) else path


def _folder(module: object) -> str:
    return os.path.dirname(str(module.__file__)) + os.sep  # type: ignore[attr-defined]


# Where repom is worked on, its middleware is beside it. "<": of no file.
_MIDDLEWARE = os.path.realpath(os.path.join(_folder(repom), "middleware")) + os.sep
_OURS = (_folder(repom), _MIDDLEWARE, _folder(sqlalchemy), "<")
_LIBRARIES = (
    *_OURS,
    *(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")),
    *site.getsitepackages(),
    site.getusersitepackages(),
)
