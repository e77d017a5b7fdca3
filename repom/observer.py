"""Who has to know what the database says inside a unit of work, and in those inside of it.

Whether work can be done again depends on more than the error in which it ended: on conflicts that
its code has swallowed, and on what was committed on the way. The observer of a unit of work is
told of both; where there is none, that costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from repom.context import surroundings
from repom.errors import MAY_BE_COMMITTED


class Observer:
    """Learns what happens. This one ignores it all."""

    def committed(self) -> None:
        """Something was committed, or may have been, that no later rollback undoes."""

    def failed(self, error: Exception) -> None:
        """A database has answered with `error`, whatever the code that asked makes of it."""


def observer_here() -> Observer:
    """That of the innermost unit of work around this code that has one."""
    here = surroundings.get()
    while here is not None:
        if here.observer is not None:
            return here.observer
        here = here.parent
    return IGNORING


#: For who has none, and for what is no part of the work around it.
IGNORING = Observer()


@contextmanager
def committing_apart() -> Iterator[None]:
    """Around a COMMIT that stays, whatever becomes of the units of work around this code."""
    try:
        yield
    except Exception as error:
        if isinstance(error, MAY_BE_COMMITTED):
            observer_here().committed()
        raise
    except BaseException as cancelled:
        # COMMIT has run to its end all the same; see `run_to_end`.
        if not isinstance(cancelled.__cause__, Exception):
            observer_here().committed()
        raise
    observer_here().committed()
