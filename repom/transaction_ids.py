"""The names under which databases keep prepared transactions, and what recovery reads in them."""

from __future__ import annotations

import re
import secrets
import zlib
from collections.abc import Iterable
from typing import NamedTuple, Self

from sqlalchemy import URL

#: Of every prepared transaction that is repom's.
PREFIX = "repom-"

#: The branch whose COMMIT is the decision: prepared first, committed first, rolled back last.
DECIDER = 0

_FORM = re.compile(rf"{PREFIX}([0-9a-f]{{24}})-([0-9]+)-([0-9a-f]{{8}})")


class TransactionId(NamedTuple):
    """What one database calls its part of a unit of work. MySQL takes 64 bytes for it.

    Attributes:
        unit: the same for all parts, and for nothing else.
        branch: the number of the part, in the order in which the parts were begun.
        known: the `fingerprint` of the databases that may have a part.
    """

    unit: str
    branch: int
    known: str

    def __str__(self) -> str:
        return f"{PREFIX}{self.unit}-{self.branch}-{self.known}"

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """The id that `text` is, or None: others prepare transactions, too."""
        match = _FORM.fullmatch(text)
        return None if match is None else cls(match[1], int(match[2]), match[3])


def new_unit() -> str:
    """A name that no other unit of work has."""
    return secrets.token_hex(12)


def fingerprint(urls: Iterable[URL]) -> str:
    """The same for the same databases, in any order and by whatever driver and user."""
    places = sorted({repr(_place(url)) for url in urls})
    return f"{zlib.crc32(' '.join(places).encode()):08x}"


def _place(url: URL) -> tuple[object, ...]:
    backend = url.get_backend_name().replace("mariadb", "mysql")
    hosts = url.query.get("host"), url.query.get("port"), url.query.get("unix_socket")
    return backend, url.host, url.port, url.database, hosts
