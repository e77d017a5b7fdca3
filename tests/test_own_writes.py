"""What is remembered of commits until their position is known, and after."""

import asyncio
import contextvars
from collections.abc import Callable
from typing import Any

from repom.own_writes import OwnWrites, note_commit, own_writes


class Answering:
    """Readers whose writer tells a position, after what a test lets happen before."""

    key, window = "0123abcd", 60.0

    def __init__(self, told: int | None, meanwhile: Callable[[], object] = lambda: None) -> None:
        self._told = told
        self._meanwhile = meanwhile

    async def position(self) -> int | None:
        self._meanwhile()
        return self._told


def located(own: OwnWrites, readers: Any) -> OwnWrites:
    own.note(readers)
    asyncio.run(own.locate())
    return own


def test_until_the_position_is_known() -> None:
    """Only the writer will do; then whoever has it."""
    own = OwnWrites()
    readers: Any = Answering(7)
    own.note(readers)
    assert own.needs_writer(readers.key)
    assert own.is_unlocated
    asyncio.run(own.locate())
    assert not own.needs_writer(readers.key)
    assert own.positions == {readers.key: 7}
    assert not own.is_unlocated


def test_positions_only_grow() -> None:
    """What was told before is still to be found."""
    own = located(OwnWrites(), Answering(7))
    assert located(own, Answering(5)).positions == {Answering.key: 7}


def test_a_writer_that_does_not_tell() -> None:
    """For a while only the writer will do."""
    own = located(OwnWrites(), Answering(None))
    assert own.needs_writer(Answering.key)
    assert 59 < own.seconds_left()[Answering.key] <= 60
    own.require_writer(Answering.key, 0)
    assert not own.needs_writer(Answering.key)
    assert own.seconds_left() == {}


def test_what_is_committed_while_the_writer_is_asked() -> None:
    """It may be behind the position that is told, so the writer is needed on."""
    own = OwnWrites()
    readers: Any = Answering(7, meanwhile=lambda: own.note(readers))
    located(own, readers)
    assert own.needs_writer(readers.key)
    assert own.is_unlocated


def test_outside_of_requests() -> None:
    """Each context has its own, made when something is committed in it."""
    readers: Any = Answering(7)

    def job() -> OwnWrites | None:
        note_commit(readers)
        return own_writes.get()

    noted = contextvars.copy_context().run(job)
    assert noted is not None
    assert noted.needs_writer(readers.key)
    assert own_writes.get() is None
