"""Makes the engines of one database, with all that repom adds."""

from __future__ import annotations

import sqlite3
import threading
import weakref
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

from sqlalchemy import URL, Engine, create_engine
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from repom.begin import BeginOptions
from repom.connection import manage_connections
from repom.dialects import Begin, Support, support_for
from repom.dialects.read_only import snapshot_engine
from repom.dialects.sqlite import immediate_engine, is_sqlite, private_memory, queueing_engine
from repom.dialects.variants import variant_of
from repom.urls import parse_url, require_driver, to_async, to_sync


class EngineFactory:
    """Makes engines; whose they are, and when they are disposed of, is up to `Database`.

    Args:
        url: a sync or an async one.
        engine_kwargs: for all engines.
        sqlite_begin: see `Database`.
        pgbouncer: see `Database`.
        in_transactions: whether what only reads needs a transaction for that, too.

    Attributes:
        is_sqlite: whether it is SQLite by a driver that repom knows.
        holds_read_only: whether the database is to hold the connections read-only.
    """

    def __init__(
        self,
        url: str | URL,
        engine_kwargs: dict[str, Any],
        *,
        sqlite_begin: Begin | None,
        pgbouncer: bool,
        in_transactions: bool,
    ) -> None:
        self.url = parse_url(url)
        self.engine_kwargs = engine_kwargs
        self.sqlite_begin: Begin | None = sqlite_begin
        self.pgbouncer = pgbouncer
        self.is_sqlite = is_sqlite(self.url)
        self.holds_read_only = False
        self._in_transactions = in_transactions
        self._mutex = threading.RLock()

    def new_async_engine(self, **engine_kwargs: Any) -> AsyncEngine:
        """A new `AsyncEngine` with all that repom adds; the caller disposes of it.

        Args:
            engine_kwargs: laid over those of this database.
        """
        support = self.async_support()
        engine = create_async_engine(support.url, **self._create_kwargs(support, engine_kwargs))
        support.install(engine.sync_engine)
        manage_connections(engine.sync_engine)
        return engine

    def new_engine(self, **engine_kwargs: Any) -> Engine:
        """A new `Engine`: the sync twin of `new_async_engine`."""
        support = self.sync_support()
        engine = create_engine(support.url, **self._create_kwargs(support, engine_kwargs))
        support.install(engine)
        manage_connections(engine)
        return engine

    def variant(self, engine: Engine, options: BeginOptions) -> Engine:
        """`engine`, or one with the same pool whose transactions begin as `options` say."""
        engine = self.beginning(engine, options)
        if options.read_only == "snapshot":
            engine = snapshot_engine(engine)
        if self.is_sqlite and options.isolation_level != "AUTOCOMMIT":
            begin = self.sqlite_begin or options.sqlite_begin
            if begin == "IMMEDIATE" or self.memory_safe_url is not self.url:
                engine = queueing_engine(engine)
        return engine

    def beginning(self, engine: Engine, options: BeginOptions) -> Engine:
        """The same, for connections that are there already."""
        if options.isolation_level is not None:
            engine = variant_of(engine, isolation_level=options.isolation_level)
        if self.is_sqlite and self.sqlite_begin is None and options.sqlite_begin == "IMMEDIATE":
            engine = immediate_engine(engine)
        return engine

    @cached_property
    def memory_safe_url(self) -> URL:
        """The URL, with `:memory:` replaced by a memory database that this object keeps alive."""
        url = private_memory(self.url) if self.is_sqlite else self.url
        if url is not self.url:
            keeper = sqlite3.connect(f"{url.database}?vfs=memdb", uri=True, check_same_thread=False)
            weakref.finalize(self, keeper.close)
        return url

    def async_support(self) -> Support:
        """What the dialect needs in async code.

        Raises:
            ConfigurationError: the URL has no async driver, or it is not installed.
        """
        return self._support(to_async, is_async=True)

    def sync_support(self) -> Support:
        """The sync twin of `async_support`."""
        return self._support(to_sync, is_async=False)

    def _support(
        self, convert: Callable[[URL], tuple[URL, dict[str, Any]]], *, is_async: bool
    ) -> Support:
        with self._mutex:
            url, connect_args = convert(self.memory_safe_url)
        require_driver(url)
        return support_for(
            url,
            connect_args,
            is_async=is_async,
            sqlite_begin=self.sqlite_begin,
            pgbouncer=self.pgbouncer,
            read_only=self.holds_read_only,
            in_transactions=self._in_transactions,
        )

    def _create_kwargs(self, support: Support, given: Mapping[str, Any]) -> dict[str, Any]:
        support.check()
        kwargs = support.engine_kwargs({**self.engine_kwargs, **given})
        kwargs["connect_args"] = support.connect_args(kwargs.get("connect_args") or {})
        return kwargs
