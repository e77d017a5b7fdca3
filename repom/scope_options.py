"""What units of work have in common: those of one middleware, or a callback's and its parent's."""

from __future__ import annotations

from typing import NamedTuple

from repom.begin import BeginOptions
from repom.managed import InnerCommits
from repom.registry import Databases

#: Seconds that the end of a unit of work may take before its connections are closed.
END_TIMEOUT = 30.0


class ScopeOptions(NamedTuple):
    """How units of work are made; one object for all that are made alike.

    Attributes:
        databases: what they find by a name.
        begin: how their transactions begin.
        inner_commits: what `session.commit()` by code inside them means.
        end_timeout: seconds that their end may take before the connections are closed.
        is_sync: whether sync code ends them, which cannot await the end of an `AsyncSession`.
    """

    databases: Databases
    begin: BeginOptions
    inner_commits: InnerCommits = "defer"
    end_timeout: float = END_TIMEOUT
    is_sync: bool = False
