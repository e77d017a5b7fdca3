"""Many databases of one kind, of which few are connected to at a time: one for each tenant.

`functools.lru_cache` would drop a `Database` with its pooled connections open, and would drop one
that a request is using.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from contextlib import AsyncExitStack, ExitStack
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

from sqlalchemy import URL, Engine, event

from repom.config import RepomConfig
from repom.database import Database
from repom.errors import ConfigurationError
from repom.registry import to_database


class DatabaseCache:
    """Makes a `Database` for each key, and keeps the connections of few of them open.

    A key stands for the same object as long as anybody has it. When a connection goes back to the
    pool of one database too many, the pools of the least recently used one are closed, on all
    event loops, unless a connection of it is in use: what is in use counts, and is left alone.
    So there are never more pools open than `max_open` and those that are in use.

    Args:
        make: `make(key)` gives the database of a key, or its URL. It raises what says that there
            is none. It may be called by several threads, and again for a key whose database is
            no longer in use.
        max_open: how many databases may keep pooled connections while nobody uses them.

    Raises:
        ValueError: `max_open` is less than 1.

    Example:
        >>> tenants = DatabaseCache(lambda name: f"sqlite:///tenants/{name}.db", max_open=50)
        >>> tenants["acme"]
        <Database sqlite:///tenants/acme.db>
    """

    def __init__(
        self, make: Callable[[str], Database | RepomConfig | str | URL], *, max_open: int
    ) -> None:
        if max_open < 1:
            raise ValueError(f"max_open={max_open}: at least 1")
        self.max_open = max_open
        self._make = make
        self._known: WeakValueDictionary[str, Database] = WeakValueDictionary()
        # Those with pooled connections, the one that was used last at the end.
        self._open: OrderedDict[Database, None] = OrderedDict()
        # The garbage collector gives back connections, too, whatever this thread is doing.
        self._mutex = threading.RLock()

    def __getitem__(self, key: str) -> Database:
        """The database of `key`. Nothing is connected to.

        Raises:
            Exception: what `make` raised.
            ConfigurationError: what it gave is no database.
        """
        found = self._known.get(key)
        if found is None:
            made = to_database(key, self._make(key))
            self._adopt(key, made)
            # Another thread may have been faster, and nobody has used ours yet.
            with self._mutex:
                found = self._known.setdefault(key, made)
        return found

    def __repr__(self) -> str:
        return f"<DatabaseCache of {len(self._open)} open databases, at most {self.max_open}>"

    @property
    def open(self) -> list[Database]:
        """The databases that have pooled connections, the least recently used one first."""
        with self._mutex:
            return list(self._open)

    async def dispose(self) -> None:
        """Close the pooled connections of the running loop, and of sync code, of all databases."""
        async with AsyncExitStack() as stack:  # all of them, also if one cannot be
            for database in self._forget_open():
                stack.push_async_callback(database.dispose)

    def dispose_sync(self) -> None:
        """Close the pooled connections of sync code."""
        with ExitStack() as stack:
            for database in self._forget_open():
                stack.callback(database.dispose_sync)

    def _forget_open(self) -> list[Database]:
        with self._mutex:
            self._open.clear()
            return list(self._known.values())

    def _adopt(self, key: str, database: Database) -> None:
        if database.on_engine not in (None, self._made_engine):
            raise ConfigurationError(
                f"{database!r}, which was made for {key!r}, is in another DatabaseCache already.\n"
                "Make a Database of its own for each cache."
            )
        database.on_engine = self._made_engine

    def _made_engine(self, database: Database, engine: Engine) -> None:
        event.listen(engine.pool, "checkin", partial(self._returned, database))

    def _returned(self, database: Database, dbapi_connection: Any, record: Any) -> None:
        """A connection of `database` is about to be in its pool again."""
        with self._mutex:
            self._open[database] = None
            self._open.move_to_end(database)
            unused = self._take_unused() if len(self._open) > self.max_open else []
        for other in unused:
            other.retire()

    def _take_unused(self) -> list[Database]:
        """Forget what is too much and not in use: never the last, whose turn it is just now."""
        *others, _ = self._open
        idle = [database for database in others if database.is_idle]
        taken = idle[: len(self._open) - self.max_open]
        for database in taken:
            del self._open[database]
        return taken
