"""What the code that is running has written lately, and has to find again where it reads.

A replica has it a moment later. So who reads from one says what it must have: a position in the
log of the writer, or, while that is not known, that only the writer will do.
"""

from __future__ import annotations

import time
from contextvars import ContextVar
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from repom.readers import Readers


class OwnWrites:
    """What one client, or one job, has written.

    Attributes:
        positions: by `Readers.key`, what a reader must have replayed; the newest at the end.
        window: seconds after which every reader that is fit has what was committed here.
    """

    def __init__(self) -> None:
        self.positions: dict[str, int] = {}
        self.window = 0.0
        #: Until when only the writer will do, in the time of `time.monotonic()`.
        self._deadlines: dict[str, float] = {}
        #: What was committed since `locate` was called last.
        self._unlocated: dict[str, Readers] = {}

    def note(self, readers: Readers) -> None:
        """Something was committed on the writer of `readers`."""
        self._unlocated[readers.key] = readers
        self.window = max(self.window, readers.window)
        self.require_writer(readers.key, readers.window)

    def require_writer(self, key: str, seconds: float) -> None:
        """Read from the writer for so long, whatever the readers have."""
        self._deadlines[key] = time.monotonic() + seconds

    def needs_writer(self, key: str) -> bool:
        """Whether no reader will do."""
        deadline = self._deadlines.get(key)
        return deadline is not None and time.monotonic() < deadline

    def seconds_left(self) -> dict[str, float]:
        """For how long only the writer will do, where that is so."""
        now = time.monotonic()
        return {key: end - now for key, end in self._deadlines.items() if end > now}

    @property
    def is_unlocated(self) -> bool:
        """Whether something was committed whose position nobody has asked for yet."""
        return bool(self._unlocated)

    async def locate(self) -> None:
        """Ask the writers for the position of what was committed.

        Where one does not answer, it is read from for a while.
        """
        unlocated, self._unlocated = self._unlocated, {}
        for key, readers in unlocated.items():
            position = await readers.position()
            if position is not None:
                self.positions[key] = max(position, self.positions.pop(key, 0))
                if key not in self._unlocated:  # else something was committed meanwhile
                    self._deadlines.pop(key, None)


own_writes: ContextVar[OwnWrites | None] = ContextVar("repom_own_writes", default=None)


def note_commit(readers: Readers) -> None:
    """Something was committed here. Outside of requests, what follows in this context knows it."""
    found = own_writes.get()
    if found is None:
        found = OwnWrites()
        own_writes.set(found)
    found.note(readers)
