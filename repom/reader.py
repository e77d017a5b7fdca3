"""One replica of a database: what is known of it, and when it is to be asked again.

No IO: who asks it tells what it has answered.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from repom.urls import safe

if TYPE_CHECKING:
    from repom.database import Database

logger = logging.getLogger("repom")

#: Seconds after which a reader is asked again how it is doing, if it is wanted.
CHECK_EVERY = 1.0
#: Seconds after which one is that has not answered.
RETRY_AFTER = 5.0


class Reader:
    """One replica. All times are those of `time.monotonic()`.

    Attributes:
        database: it alone.
        in_flight: how many units of work are reading from it.
        turn: when it was chosen last, counted in choices.
        replayed: the position in the writer's log up to which it has everything, at least.
        is_causal: whether it waits by itself for what was committed elsewhere.
        is_fit: whether it could be read from when it was asked.
        next_check: when it is to be asked again.
        is_being_asked: whether somebody does that just now.
    """

    def __init__(self, database: Database[Any, Any]) -> None:
        self.database = database
        self.in_flight = 0
        self.turn = 0
        self.replayed = 0
        self.is_causal = False
        self.is_fit = False
        self.next_check = 0.0
        self.is_being_asked = False
        self._asked = 0.0
        self._is_reported = False

    def __repr__(self) -> str:
        state = "fit" if self.is_fit else "left out"
        return f"<Reader {safe(self.database.url)}: {state}, {self.in_flight} in flight>"

    def is_due(self, now: float) -> bool:
        """Whether somebody should ask it how it is doing."""
        return now >= self.next_check and not self.is_being_asked

    def is_usable(self, now: float) -> bool:
        """Whether it can be read from. What was found out long ago is not believed."""
        return self.is_fit and now < self._asked + 3 * CHECK_EVERY

    def answered(self, now: float, replayed: int, required: int) -> None:
        """It has answered that it has everything up to `replayed`.

        Args:
            required: what it needs to have, not to be too far behind.
        """
        self.replayed, self._asked = replayed, now
        self.next_check = now + CHECK_EVERY
        if replayed < required:
            if self.is_fit:
                self._report(f"it is {required - replayed} bytes of the writer's log behind")
            self.is_fit = False
        elif not self.is_fit:
            self.is_fit, self._is_reported = True, False
            logger.info("%s is read from", safe(self.database.url))

    def failed(self, now: float, error: Exception) -> None:
        """It has not answered, or could not be connected to."""
        self._report(f"{type(error).__name__}: {error}")
        self.is_fit = False
        self.next_check = now + RETRY_AFTER

    def _report(self, why: str) -> None:
        if not self._is_reported:
            self._is_reported = True
            logger.warning(
                "%s is not read from until it recovers: %s", safe(self.database.url), why
            )


class Lag:
    """What the writer had written, and when; a reader without it is too far behind.

    Args:
        limit: seconds that a reader may be behind.
    """

    def __init__(self, limit: float) -> None:
        self.limit = limit
        # Replaced and never changed: threads may look at it and add to it at the same time.
        self._positions: tuple[tuple[float, int], ...] = ()

    def note(self, now: float, position: int) -> None:
        """The writer has got to `position`."""
        recent = tuple(each for each in self._positions if self._is_recent(each, now))
        self._positions = (*recent, (now, position))

    def required(self, now: float) -> int:
        """What a reader must have by now.

        That is what was known of the writer `limit` seconds ago. If nobody has asked it for
        longer than that, it is the first that was found out since: more than need be, not less.
        While the writer does not answer, it is what it has said last.
        """
        positions = self._positions
        recent = next((each for each in positions if self._is_recent(each, now)), None)
        return (recent or positions[-1])[1] if positions else 0

    def _is_recent(self, noted: tuple[float, int], now: float) -> bool:
        return noted[0] >= now - self.limit - 2 * CHECK_EVERY
