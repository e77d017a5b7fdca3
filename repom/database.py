"""One logical database: its engines, pools and session factories, sync and async."""

from __future__ import annotations

import logging
import sqlite3
import threading
import weakref
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, NamedTuple

from sqlalchemy import URL, Engine, MetaData, create_engine, orm
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import Session

from repom.config import RepomConfig, get_config
from repom.dialects import Begin, Support, support_for
from repom.dialects.sqlite import immediate_engine, is_sqlite, private_memory
from repom.errors import ConfigurationError
from repom.loops import LoopEngines, close_returned
from repom.urls import parse_url, require_driver, safe, to_async, to_sync

logger = logging.getLogger("repom")

#: Laid under every `session_kwargs`.
SESSION_DEFAULTS: Mapping[str, Any] = {
    # Code after the response may still read its objects.
    "expire_on_commit": False,
}


class BeginOptions(NamedTuple):
    """How the transactions of a session begin.

    Attributes:
        sqlite_begin: "IMMEDIATE" or "DEFERRED"; other databases do not look at it.
        isolation_level: SQLAlchemy's name of it, or None for the server's default.
    """

    sqlite_begin: Begin = "DEFERRED"
    isolation_level: str | None = None


class Database:
    """One logical database. Makes engines when they are first used, one for each event loop.

    Args:
        url: a sync or an async URL; the other is derived from it when that side is used.
            `sqlite://` is one memory database that all sessions of this object share.
        engine_kwargs: for `create_engine` and `create_async_engine`, laid over repom's
            defaults (`RepomConfig.engine_kwargs`). Pool options that the pool in use does not
            take are left out.
        session_kwargs: for the session classes, laid over `expire_on_commit=False`.
        session_class: the `AsyncSession` class, of SQLModel for instance.
        sync_session_class: the `Session` class of sync code.
        sqlite_begin: how every SQLite transaction of a scope begins. By default the scope
            decides: "IMMEDIATE" where it may write, "DEFERRED" where it only reads.
        pgbouncer: the server is a PgBouncer in transaction mode; switches the driver's
            prepared statements off.

    Raises:
        DatabaseURLError: the URL cannot be parsed.

    Example:
        >>> database = Database("postgresql://app:secret@db.example/shop")
        >>> database
        <Database postgresql://app:***@db.example/shop>
    """

    def __init__(
        self,
        url: str | URL,
        *,
        engine_kwargs: Mapping[str, Any] | None = None,
        session_kwargs: Mapping[str, Any] | None = None,
        session_class: type[AsyncSession] = AsyncSession,
        sync_session_class: type[Session] = Session,
        sqlite_begin: Begin | None = None,
        pgbouncer: bool = False,
    ) -> None:
        self.url = parse_url(url)
        self.engine_kwargs = {**RepomConfig.DEFAULT_ENGINE_KWARGS, **(engine_kwargs or {})}
        self.session_kwargs = {**SESSION_DEFAULTS, **(session_kwargs or {})}
        self.session_class = session_class
        self.sync_session_class = sync_session_class
        self.sqlite_begin: Begin | None = sqlite_begin
        self.pgbouncer = pgbouncer
        self.is_sqlite = is_sqlite(self.url)
        self._async_engines = LoopEngines(
            self.new_async_engine,
            lambda connection: self._async_support().abandon(connection),
            safe(self.url),
        )
        self._sync_engine: Engine | None = None
        self._sync_variants: dict[BeginOptions, Engine] = {}
        self._mutex = threading.RLock()

    @classmethod
    def from_config(cls, config: RepomConfig | None = None) -> Database:
        """The default database of `config`, or of the configuration of this process.

        Raises:
            ConfigurationError: what is configured cannot be used.
        """
        config = get_config() if config is None else config
        return cls(
            config.db_url,
            engine_kwargs=config.engine_kwargs,
            session_kwargs=config.session_kwargs,
            sqlite_begin=config.sqlite_begin,
            pgbouncer=config.pgbouncer,
        )

    def __repr__(self) -> str:
        return f"<Database {safe(self.url)}>"

    # --- engines

    @property
    def async_engine(self) -> AsyncEngine:
        """The `AsyncEngine` of the running event loop.

        Raises:
            RuntimeError: no event loop runs in this thread.
            ConfigurationError: the URL has no async driver, or it is not installed.
        """
        return self._async_engines.here().engine

    @property
    def engine(self) -> Engine:
        """The sync `Engine`.

        Raises:
            ConfigurationError: the URL has no sync driver, or it is not installed.
        """
        with self._mutex:
            if self._sync_engine is None:
                self._sync_engine = self.new_engine()
            return self._sync_engine

    def async_bind(self, options: BeginOptions) -> AsyncEngine:
        """The running loop's engine, for sessions whose transactions begin as `options` say."""
        here = self._async_engines.here()
        bind = here.variants.get(options)
        if bind is None:
            sync_engine = here.engine.sync_engine
            variant = self._variant(sync_engine, options)
            bind = here.engine if variant is sync_engine else AsyncEngine(variant)
            here.variants[options] = bind
        return bind

    def sync_bind(self, options: BeginOptions) -> Engine:
        """The sync engine, for sessions whose transactions begin as `options` say."""
        bind = self._sync_variants.get(options)
        if bind is None:
            with self._mutex:  # or a `dispose()` meanwhile would leave us an engine it has ended
                bind = self._sync_variants[options] = self._variant(self.engine, options)
        return bind

    # --- sessions

    @cached_property
    def sessionmaker(self) -> LoopSessionmaker:
        """Makes plain `AsyncSession`s; usable at import, since it finds the engine at each call.

        Whoever calls it commits and closes. Inside a request, use `current_session()`.
        """
        return LoopSessionmaker(self)

    @cached_property
    def sync_sessionmaker(self) -> orm.sessionmaker[Session]:
        """Makes plain `Session`s. Whoever calls it commits and closes."""
        return orm.sessionmaker(self.engine, class_=self.sync_session_class, **self.session_kwargs)

    # --- life-cycle

    def check(self) -> None:
        """Raise now what the first session would: asks no server.

        One of the two worlds is enough: an application of `def` endpoints needs no async
        driver. That the async one cannot be used is then a warning.

        Raises:
            ConfigurationError: no driver for the URL, driver not installed, an SQLite file that
                cannot be written.
        """
        try:
            support = self._async_support()
        except ConfigurationError as error:
            try:
                support = self._sync_support()
            except ConfigurationError:
                raise error from None
            logger.warning("%r can be used by sync code only. %s", self, error)
        support.check()

    async def ping(self) -> None:
        """Connect and run `SELECT 1`, for a readiness check.

        Raises:
            DatabaseUnreachableError: no connection could be made.
        """
        async with self.async_engine.connect() as connection:
            await connection.exec_driver_sql("SELECT 1")

    async def create_all(self, metadata: MetaData) -> None:
        """Create the tables of `metadata` that do not exist yet. For real schemas use Alembic."""
        async with self.async_bind(BeginOptions("IMMEDIATE")).begin() as connection:
            await connection.run_sync(metadata.create_all)

    def create_all_sync(self, metadata: MetaData) -> None:
        """The sync twin of `create_all`."""
        with self.sync_bind(BeginOptions("IMMEDIATE")).begin() as connection:
            metadata.create_all(connection)

    async def dispose(self) -> None:
        """Close the pooled connections of the running loop and of the sync engine.

        The next use opens new ones. A loop that `asyncio.run()` ends does this by itself.
        """
        try:
            await self._async_engines.dispose()
        finally:
            self.dispose_sync()

    def dispose_sync(self) -> None:
        """Close the pooled connections of the sync engine."""
        with self._mutex:
            engine, self._sync_engine = self._sync_engine, None
            self._sync_variants.clear()
            self.__dict__.pop("sync_sessionmaker", None)
        if engine is not None:
            close_returned(engine)
            engine.dispose()

    # --- making engines

    def new_async_engine(self, **engine_kwargs: Any) -> AsyncEngine:
        """A new `AsyncEngine` with all that repom adds; the caller disposes of it.

        Args:
            engine_kwargs: laid over those of this database.
        """
        support = self._async_support()
        engine = create_async_engine(support.url, **self._create_kwargs(support, engine_kwargs))
        support.install(engine.sync_engine)
        return engine

    def new_engine(self, **engine_kwargs: Any) -> Engine:
        """A new `Engine`: the sync twin of `new_async_engine`."""
        support = self._sync_support()
        engine = create_engine(support.url, **self._create_kwargs(support, engine_kwargs))
        support.install(engine)
        return engine

    def _variant(self, engine: Engine, options: BeginOptions) -> Engine:
        """`engine`, or one with the same pool whose transactions begin as `options` say."""
        if options.isolation_level is not None:
            engine = engine.execution_options(isolation_level=options.isolation_level)
        if self.is_sqlite and self.sqlite_begin is None and options.sqlite_begin == "IMMEDIATE":
            engine = immediate_engine(engine)
        return engine

    @cached_property
    def _memory_safe_url(self) -> URL:
        """The URL, with `:memory:` replaced by a memory database that this object keeps alive."""
        url = private_memory(self.url) if self.is_sqlite else self.url
        if url is not self.url:
            keeper = sqlite3.connect(f"{url.database}?vfs=memdb", uri=True, check_same_thread=False)
            weakref.finalize(self, keeper.close)
        return url

    def _async_support(self) -> Support:
        return self._support(to_async, is_async=True)

    def _sync_support(self) -> Support:
        return self._support(to_sync, is_async=False)

    def _support(
        self, convert: Callable[[URL], tuple[URL, dict[str, Any]]], *, is_async: bool
    ) -> Support:
        with self._mutex:
            url, connect_args = convert(self._memory_safe_url)
        require_driver(url)
        return support_for(
            url,
            connect_args,
            is_async=is_async,
            sqlite_begin=self.sqlite_begin,
            pgbouncer=self.pgbouncer,
        )

    def _create_kwargs(self, support: Support, given: Mapping[str, Any]) -> dict[str, Any]:
        support.check()
        kwargs = support.engine_kwargs({**self.engine_kwargs, **given})
        kwargs["connect_args"] = support.connect_args(kwargs.get("connect_args") or {})
        return kwargs


class LoopSessionmaker(async_sessionmaker[AsyncSession]):
    """An `async_sessionmaker` that finds the running loop's engine at each call."""

    def __init__(self, database: Database) -> None:
        super().__init__(class_=database.session_class, **database.session_kwargs)
        self._database = database

    def __call__(self, **local_kw: Any) -> AsyncSession:
        """A new `AsyncSession`; `local_kw` as for `async_sessionmaker`."""
        if local_kw.get("bind") is None and self.kw.get("bind") is None:
            local_kw["bind"] = self._database.async_engine
        return super().__call__(**local_kw)
