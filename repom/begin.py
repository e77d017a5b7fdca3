"""How the transactions of a session begin."""

from __future__ import annotations

from typing import Literal, NamedTuple

from repom.dialects import Begin

#: Whether a unit of work only reads; "snapshot": and all its statements see one state.
ReadOnly = bool | Literal["snapshot"]


def checked_read_only(value: ReadOnly) -> ReadOnly:
    """`value`, if it is one.

    Raises:
        ValueError: it is not; a misspelt one must not be taken for another.
    """
    if value is True or value is False or value == "snapshot":
        return value
    raise ValueError(f'read_only={value!r}: write True, False or "snapshot"')


class BeginOptions(NamedTuple):
    """How the transactions of a session begin.

    Attributes:
        sqlite_begin: "IMMEDIATE" or "DEFERRED"; other databases do not look at it.
        isolation_level: SQLAlchemy's name of it, or None for the server's default.
        read_only: whether on connections that the database holds read-only; alone or with
            "DEFERRED".
    """

    sqlite_begin: Begin = "DEFERRED"
    isolation_level: str | None = None
    read_only: ReadOnly = False
