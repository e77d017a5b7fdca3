"""The context variable that every entry point of repom reads.

What it holds is the scope, never the session: a session first opened in a child task or in a
worker thread's copied context is then seen by the code that opened the scope, too.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from repom.observer import Observer


class Surroundings(Protocol):
    """What the layers below `repom.scope` need to know of the scope that is running."""

    @property
    def parent(self) -> Surroundings | None:
        """The scope inside which this one was opened."""

    @property
    def in_transaction(self) -> bool:
        """Whether it holds an open transaction."""
        ...

    @property
    def observer(self) -> Observer | None:
        """Who has to know what happens in it; see `repom.observer`."""


surroundings: ContextVar[Surroundings | None] = ContextVar("repom_scope", default=None)
