"""How often, and after which pause, work is repeated that lost a conflict."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable

from repom.conflicts import is_conflict
from repom.errors import MAY_BE_COMMITTED

logger = logging.getLogger("repom")

RetryOn = Callable[[BaseException], bool]

#: Seconds: the longest pause before the second attempt, which doubles with each further one.
FIRST_PAUSE = 0.01
LONGEST_PAUSE = 1.0


def pause_before(attempt: int) -> float:
    """Seconds to wait before an attempt, by chance: who lost together shall not meet again.

    Exponential backoff with full jitter
    (https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/).

    Args:
        attempt: its number; 2 is the first repetition.
    """
    return random.uniform(0, min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** (attempt - 2)))


class Attempts:
    """Counts the attempts at one piece of work.

    Args:
        retries: how often it may be repeated.
        retry_on: whether an error is worth it.
        label: what the work is, for logs.

    Attributes:
        number: of the attempt under way, from 1.

    Raises:
        ValueError: `retries` is less than 0.
    """

    def __init__(
        self, retries: int, retry_on: RetryOn = is_conflict, *, label: object = "a transaction"
    ) -> None:
        if retries < 0:
            raise ValueError(f"retries={retries}: write how often to repeat, 0 for never")
        self.number = 1
        self._retries = retries
        self._retry_on = retry_on
        self._label = label

    @property
    def is_last(self) -> bool:
        """Whether no other may follow the attempt under way."""
        return self.number > self._retries

    def is_worth_it(self, error: Exception) -> bool:
        """Whether an attempt that has ended in `error` may be repeated.

        Not if the outcome is unknown, whatever `retry_on` says: it may have been committed.
        """
        return not isinstance(error, MAY_BE_COMMITTED) and self._retry_on(error)

    def pause_after(self, error: Exception) -> float | None:
        """The pause before the next attempt, which counts from now on; None for no more."""
        if not self.is_worth_it(error):
            return None
        if self.is_last:
            if self._retries:
                error.add_note(f"It was attempt {self.number}, the last one.")
            return None
        self.number += 1
        pause = pause_before(self.number)
        logger.info(
            "%s lost a conflict (%s); attempt %d follows in %.3f s",
            self._label,
            type(error.__cause__ or error).__name__,
            self.number,
            pause,
        )
        return pause
