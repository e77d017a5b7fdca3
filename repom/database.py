"""One logical database: its engines, pools and session factories, sync and async."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, Generic, Protocol

from sqlalchemy import URL, Engine, MetaData
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Session
from typing_extensions import TypeVar

from repom.begin import BeginOptions
from repom.config import RepomConfig, get_config
from repom.dialects import Begin
from repom.engine_factory import EngineFactory
from repom.errors import ConfigurationError
from repom.loops import LoopEngines, close_returned, is_in_use
from repom.on_begin import OnBegin, telling_async_class, telling_class, telling_kwargs
from repom.readers import Readers
from repom.sessionmakers import LoopSessionmaker, SyncSessionmaker
from repom.urls import safe

logger = logging.getLogger("repom")

#: The classes of a database's sessions. A `Database` without them is one of SQLAlchemy's own.
AsyncSessionT = TypeVar("AsyncSessionT", bound=AsyncSession, covariant=True, default=AsyncSession)
SessionT = TypeVar("SessionT", bound=Session, covariant=True, default=Session)

#: Laid under every `session_kwargs`.
SESSION_DEFAULTS: Mapping[str, Any] = {
    # Code after the response may still read its objects.
    "expire_on_commit": False,
}


class Engines(Protocol):
    """What a `Database` asks for engines while something stands in for its own.

    Another `Database` can, and so can the connection of a test (`repom.testing`).
    """

    def async_bind(self, options: BeginOptions) -> AsyncEngine: ...
    def sync_bind(self, options: BeginOptions) -> Engine: ...
    def check(self) -> None: ...
    async def dispose(self) -> None: ...
    def dispose_sync(self) -> None: ...


class Database(EngineFactory, Generic[AsyncSessionT, SessionT]):
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
        on_begin: `on_begin(connection)` is called at the begin of every transaction of a
            session, before its first statement, with the sync `Connection` of async sessions too.
            What it sets by `SET LOCAL` ends with that transaction. An error of it fails the
            statement that has begun the transaction, and all that follow until the rollback.
        readers: URLs of replicas, from which units of work with `read_only` read.
        max_lag: seconds that a replica may be behind, where its server tells (PostgreSQL).

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
        session_class: type[AsyncSessionT] = AsyncSession,  # type: ignore[assignment]
        sync_session_class: type[SessionT] = Session,  # type: ignore[assignment]
        sqlite_begin: Begin | None = None,
        pgbouncer: bool = False,
        on_begin: OnBegin | None = None,
        readers: Sequence[str | URL] = (),
        max_lag: float = 10.0,
    ) -> None:
        super().__init__(
            url,
            {**RepomConfig.DEFAULT_ENGINE_KWARGS, **(engine_kwargs or {})},
            sqlite_begin=sqlite_begin,
            pgbouncer=pgbouncer,
            # What it sets is for the statements of one transaction.
            in_transactions=on_begin is not None,
        )
        self.session_kwargs = {**SESSION_DEFAULTS, **(session_kwargs or {})}
        self.session_class = session_class
        self.sync_session_class = sync_session_class
        self.on_begin = on_begin
        if on_begin is not None:
            self.session_class = telling_async_class(self.session_class)
            self.sync_session_class = telling_class(self.sync_session_class)
            self.session_kwargs = telling_kwargs(self.session_kwargs, on_begin)
        #: The same database, read-only, once that was used; this one may be it itself.
        self._reading: Database | None = None
        #: In tests, whose engines are used in place of its own.
        self.stand_in: Engines | None = None
        #: Told of this object and of each engine that it makes for sessions of its own.
        self.on_engine: Callable[[Database, Engine], None] | None = None
        self._async_engines = LoopEngines(
            self._own_async_engine,
            lambda connection: self.async_support().abandon(connection),
            safe(self.url),
        )
        self._sync_engine: Engine | None = None
        self._sync_variants: dict[BeginOptions, Engine] = {}
        self.readers: Readers | None = None
        if readers:
            self.readers = Readers(self, [self.at(url) for url in readers], max_lag=max_lag)

    @classmethod
    def from_config(
        cls: type[Database], config: RepomConfig | None = None, *, url: str | URL | None = None
    ) -> Database:
        """The default database of `config`, or of the configuration of this process.

        Args:
            config: by default that of this process.
            url: in place of the configured one.

        Raises:
            ConfigurationError: what is configured cannot be used.
        """
        config = get_config() if config is None else config
        return cls(
            config.db_url if url is None else url,
            engine_kwargs=config.engine_kwargs,
            session_kwargs=config.session_kwargs,
            sqlite_begin=config.sqlite_begin,
            pgbouncer=config.pgbouncer,
            readers=config.readers if url is None else (),
            max_lag=config.max_lag,
        )

    def at(self, url: str | URL) -> Database:
        """A database that is used as this one is, at another URL."""
        return Database(
            url,
            engine_kwargs=self.engine_kwargs,
            session_kwargs=self.session_kwargs,
            session_class=self.session_class,
            sync_session_class=self.sync_session_class,
            sqlite_begin=self.sqlite_begin,
            pgbouncer=self.pgbouncer,
            on_begin=self.on_begin,
        )

    def for_reading(self) -> Database:
        """The same by connections that the database holds read-only, with pools of their own."""
        with self._mutex:
            if self._reading is None:
                self._reading = reading = self.at(self.url)
                reading.url, reading.memory_safe_url = self.url, self.memory_safe_url
                reading.sqlite_begin = None
                reading.holds_read_only = True
                reading.on_engine = self._reading_made_engine
            return self._reading

    def _reading_made_engine(self, reading: Database, engine: Engine) -> None:
        if self.on_engine is not None:
            self.on_engine(self, engine)

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
        if self.stand_in is not None:
            return self.stand_in.async_bind(BeginOptions())
        return self._async_engines.here().engine

    @property
    def engine(self) -> Engine:
        """The sync `Engine`.

        Raises:
            ConfigurationError: the URL has no sync driver, or it is not installed.
        """
        if self.stand_in is not None:
            return self.stand_in.sync_bind(BeginOptions())
        with self._mutex:
            if self._sync_engine is None:
                self._sync_engine = self.new_engine()
                if self.on_engine is not None:
                    self.on_engine(self, self._sync_engine)
            return self._sync_engine

    def async_bind(self, options: BeginOptions) -> AsyncEngine:
        """The running loop's engine, for sessions whose transactions begin as `options` say."""
        if self.stand_in is not None:
            return self.stand_in.async_bind(options)
        here = self._async_engines.here()
        bind = here.variants.get(options)
        if bind is None and options.read_only and not self.holds_read_only:
            bind = here.variants[options] = self.for_reading().async_bind(options)
        if bind is None:
            sync_engine = here.engine.sync_engine
            variant = self.variant(sync_engine, options)
            bind = here.engine if variant is sync_engine else AsyncEngine(variant)
            here.variants[options] = bind
        return bind

    def sync_bind(self, options: BeginOptions) -> Engine:
        """The sync engine, for sessions whose transactions begin as `options` say."""
        if self.stand_in is not None:
            return self.stand_in.sync_bind(options)
        bind = self._sync_variants.get(options)
        if bind is None:
            with self._mutex:  # or a `dispose()` meanwhile would leave us an engine it has ended
                if options.read_only and not self.holds_read_only:
                    bind = self.for_reading().sync_bind(options)
                else:
                    bind = self.variant(self.engine, options)
                self._sync_variants[options] = bind
        return bind

    def _own_async_engine(self) -> AsyncEngine:
        engine = self.new_async_engine()
        if self.on_engine is not None:
            self.on_engine(self, engine.sync_engine)
        return engine

    def engine_for_reading(self, options: BeginOptions | None = None, *, is_async: bool) -> Engine:
        """The `Engine`, that beneath the async one too, of connections that only read."""
        options = options or BeginOptions(read_only=True)
        return self.async_bind(options).sync_engine if is_async else self.sync_bind(options)

    # --- sessions

    @cached_property
    def sessionmaker(self) -> LoopSessionmaker[AsyncSessionT]:
        """Makes plain `AsyncSession`s; usable at import, since it finds the engine at each call.

        Whoever calls it commits and closes. Inside a request, use `current_session()`.
        """
        return LoopSessionmaker(self)

    @cached_property
    def sync_sessionmaker(self) -> SyncSessionmaker[SessionT]:
        """Makes plain `Session`s. Whoever calls it commits and closes."""
        return SyncSessionmaker(self)

    # --- life-cycle

    def check(self) -> None:
        """Raise now what the first session would: asks no server.

        One of the two worlds is enough: an application of `def` endpoints needs no async
        driver. That the async one cannot be used is then a warning.

        Raises:
            ConfigurationError: no driver for the URL, driver not installed, an SQLite file that
                cannot be written.
        """
        if self.stand_in is not None:
            self.stand_in.check()
            return
        try:
            support = self.async_support()
        except ConfigurationError as error:
            try:
                support = self.sync_support()
            except ConfigurationError:
                raise error from None
            logger.warning("%r can be used by sync code only. %s", self, error)
        support.check()
        if self.readers is not None:
            for reader in self.readers.all:
                reader.database.check()

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
        if self.stand_in is not None:
            await self.stand_in.dispose()
        try:
            await self._async_engines.dispose()
            for part in self._parts:
                await part.dispose()
        finally:
            self.dispose_sync()

    def dispose_sync(self) -> None:
        """Close the pooled connections of the sync engine."""
        if self.stand_in is not None:
            self.stand_in.dispose_sync()
        self._dispose_sync_engine()

    def retire(self) -> None:
        """Begin to close the pooled connections of all loops and of the sync engine.

        Where a connection is in use they stay as they are. Waits for nothing; `dispose` does, for
        what was begun on the running loop.
        """
        both = self._with_reading
        self._async_engines.retire(*(each._async_engines for each in both[1:]))
        if not any(each._is_sync_engine_in_use for each in both):
            self._dispose_sync_engine()

    def _dispose_sync_engine(self) -> None:
        with self._mutex:
            engine, self._sync_engine = self._sync_engine, None
            self._sync_variants.clear()
        for part in self._parts:
            part.dispose_sync()
        if engine is not None:
            close_returned(engine)
            engine.dispose()

    @property
    def is_idle(self) -> bool:
        """Whether none of its connections is in use, on any loop or by sync code."""
        return not any(
            each._is_sync_engine_in_use or each._async_engines.are_in_use
            for each in self._with_reading
        )

    @property
    def _with_reading(self) -> list[Database[Any, Any]]:
        return [self, *(each for part in self._parts for each in part._with_reading)]

    @property
    def _parts(self) -> list[Database[Any, Any]]:
        """The databases that are used as parts of this one."""
        reading = [] if self._reading is None else [self._reading]
        readers = [] if self.readers is None else self.readers.all
        return [*reading, *(reader.database for reader in readers)]

    @property
    def _is_sync_engine_in_use(self) -> bool:
        engine = self._sync_engine
        return engine is not None and is_in_use(engine)
