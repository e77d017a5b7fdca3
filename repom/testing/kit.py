"""One connection for all that a test does on one database."""

from __future__ import annotations

from typing import Any, NamedTuple

from sqlalchemy import Connection, Engine, MetaData
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.pool import NullPool

from repom.begin import BeginOptions
from repom.database import Database, Engines
from repom.errors import ConfigurationError, SharedConnectionError
from repom.testing import workers
from repom.testing.backends import Backend, backend_of
from repom.testing.connections import OwnConnection, RemoteConnection, SharedConnection
from repom.testing.engines import remote_engine
from repom.testing.places import place_here
from repom.testing.portal import DirectPortal, LoopPortal, Portal
from repom.testing.turns import Turns

# Below all units of a test. If it is gone at the end, so is what was to be rolled back.
_BASE = "repom_test"


class Report(NamedTuple):
    """What is to be said of a test that has ended.

    Attributes:
        leaks: where connections were opened that are still open.
        lost: its connection was closed, or its transaction ended, by the test itself.
        differences: what a connection for each unit of work would have done differently.
    """

    leaks: list[str]
    lost: BaseException | None
    differences: list[str]


class Kit:
    """The tests' connection to one database, and the engines whose sessions share it.

    While a test runs, it stands in for the engines of the databases under test
    (`repom.database.Engines`).

    Args:
        configured: where the tests run; under pytest-xdist, what the worker's own is like.
        replaced: the application's database, whose place that takes; usually the same.
        only_sync: use the sync driver, although there is an async one.

    Attributes:
        engine: its connections share that of the test, or are real ones between tests.
        session_engine: the same for the test's own session, which gives way to others.

    Raises:
        ConfigurationError: there is no driver, or it is not installed.
    """

    engine: Engine
    session_engine: Engine

    def __init__(self, configured: Database, replaced: Database, *, only_sync: bool) -> None:
        self._configured = configured
        self.home = _of_worker(configured)
        self._replaced = replaced
        self._has_async, self._has_sync = _drivers(configured)
        self.is_async = self._has_async and not only_sync
        self._support = self.home.async_support() if self.is_async else self.home.sync_support()
        self._portal: Portal = LoopPortal() if self.is_async else DirectPortal()
        self._base: Connection | None = None
        self._backend: Backend | None = None
        self._turns: Turns | None = None
        self._made_database = False
        self._users = 0
        self._open: list[SharedConnection] = []
        self._leaks: list[str] = []  # of those that are closed by now
        self._variants: dict[BeginOptions, Engine] = {}
        self._schemas: list[MetaData] = []

    # --- the run

    def start(self) -> None:
        """Make the engines, and the database of the worker."""
        if self.home is not self._configured:
            self._portal.call(workers.create, self._support, self._engine_of_configured())
            self._made_database = True
        self._real = self._new_engine(self.home)
        self._base = self._portal.call(self._real.connect)  # by which its dialect is initialized
        self.engine = remote_engine(self._real, self._support, self._connect)
        self.session_engine = remote_engine(self._real, self._support, self._connect_session)
        self._stand_in(self.home)

    def _new_engine(self, database: Database, **kwargs: Any) -> Engine:
        if self.is_async:
            return database.new_async_engine(poolclass=NullPool, **kwargs).sync_engine
        return database.new_engine(poolclass=NullPool, **kwargs)

    def _engine_of_configured(self) -> Engine:
        return self._new_engine(self._configured, isolation_level="AUTOCOMMIT")

    def _stand_in(self, engines: Engines) -> None:
        for database in {self._configured, self._replaced}:
            database.stand_in = None if database is engines else engines

    def create_all(self, metadata: MetaData) -> None:
        """Create the missing tables of `metadata`, once."""
        if metadata not in self._schemas:
            self._portal.call(self._create_all, metadata)
            self._schemas.append(metadata)

    def _create_all(self, metadata: MetaData) -> None:
        with self._real.begin() as connection:
            metadata.create_all(connection)

    def stop(self) -> None:
        """Close all connections."""
        self._configured.stand_in = self._replaced.stand_in = None
        self._close_base()
        self.home.dispose_sync()
        if self._made_database:
            self._portal.call(workers.drop, self._support, self._engine_of_configured())
        self._portal.close()

    # --- a test

    def begin(self, test: str) -> None:
        """Begin the transaction of a test; its further fixtures join it.

        Args:
            test: its name.
        """
        if self._turns is None:
            try:
                backend = self._begin()
            except Exception:
                # A connection that has waited for this test may have been closed meanwhile.
                self._forget_base()
                backend = self._begin()
            self._turns = Turns(self._portal_of(backend), backend, test)
            self._stand_in(self)
        self._users += 1

    def _begin(self) -> Backend:
        if self._base is None:
            self._base = self._portal.call(self._real.connect)
        if self._backend is None:
            self._backend = backend_of(self._base)
        self._portal_of(self._backend).call(_begin, self._backend)
        return self._backend

    def _portal_of(self, backend: Backend) -> Portal:
        return DirectPortal() if backend.is_direct else self._portal

    def end(self) -> Report | None:
        """Roll the transaction back; None if another fixture of the test still uses it."""
        self._users -= 1
        if self._users:
            return None
        assert self._turns is not None
        turns, self._turns = self._turns, None
        self._stand_in(self.home)
        leaks = self._leaks + [one.place for one in self._open if not one.is_of_the_test]
        for connection in self._open:
            connection.abandon()
        self._open, self._leaks = [], []
        at_rest = turns.close()
        lost = turns.lost
        if lost is None and at_rest:
            lost = turns.portal.call(_end, turns.backend)
        if lost is not None or not at_rest:
            self._forget_base()
        elif turns.backend.schema_touched:
            self._close_base()  # drivers remember the schema, which was rolled back
        return Report(leaks, lost, turns.differences)

    def _forget_base(self) -> None:
        """Close what may be closed already, or at work."""
        if self._base is not None:
            self._portal.call(self._base.invalidate)
        self._close_base()

    def _close_base(self) -> None:
        base, self._base, self._backend = self._base, None, None
        if base is not None:
            self._portal.call(base.close)

    def require_async(self) -> None:
        """Raise if its connection is not of an async driver.

        Raises:
            ConfigurationError: there is none, or the sync one was asked for.
        """
        if not self._has_async:
            self._configured.async_support()
        if not self.is_async:
            raise ConfigurationError(
                "this test needs a connection of an async driver, but another fixture of the run "
                f"has {self.home!r} by create_test_fixtures(only_sync=True).\n"
                "Leave only_sync out: sync code can share the connection of an async driver."
            )

    # --- connections

    def _connect(self) -> RemoteConnection:
        return self._shared_connection() or self._own_connection(self._real)

    def _connect_reading(self) -> RemoteConnection:
        shared = self._shared_connection(reads_only=True)
        return shared or self._own_connection(self._new_engine(self.home.for_reading()))

    def _connect_session(self) -> RemoteConnection:
        connection = self._shared_connection(is_of_the_test=True)
        if connection is None:
            raise SharedConnectionError("this session belongs to a test that has ended.")
        return connection

    def _shared_connection(
        self, *, is_of_the_test: bool = False, reads_only: bool = False
    ) -> SharedConnection | None:
        if self._turns is None or self._base is None:
            return None
        connection = SharedConnection(
            self._turns,
            self._portal.bound(self._base.connection.driver_connection),
            place=place_here(),
            is_of_the_test=is_of_the_test,
            reads_only=reads_only,
            on_close=self._closed,
        )
        self._open.append(connection)
        return connection

    def _own_connection(self, engine: Engine) -> OwnConnection:
        return OwnConnection(self._portal.call(engine.connect), self._portal)

    def _closed(self, connection: SharedConnection, *, by_collector: bool) -> None:
        if connection in self._open:
            self._open.remove(connection)
            if by_collector:
                self._leaks.append(connection.place)

    # --- in place of the engines of the databases under test

    def async_bind(self, options: BeginOptions) -> AsyncEngine:
        """The engine for async sessions.

        Raises:
            ConfigurationError: see `require_async`.
        """
        self.require_async()
        return AsyncEngine(self._variant(options))

    def sync_bind(self, options: BeginOptions) -> Engine:
        """The engine for sync sessions; that the application has no sync driver is an error."""
        if not self._has_sync:
            self._configured.sync_support()
        return self._variant(options)

    def _variant(self, options: BeginOptions) -> Engine:
        # One transaction has one isolation level.
        options = options._replace(isolation_level=None, read_only=bool(options.read_only))
        if options not in self._variants:
            engine = self._reading_engine() if options.read_only else self.engine
            self._variants[options] = self.home.beginning(engine, options)
        return self._variants[options]

    def _reading_engine(self) -> Engine:
        reading = self.home.for_reading()
        support = reading.async_support() if self.is_async else reading.sync_support()
        return remote_engine(self._real, support, self._connect_reading)

    def check(self) -> None:
        """The database is there, as the fixtures know."""

    async def dispose(self) -> None:
        """The connection is the fixtures'."""

    def dispose_sync(self) -> None:
        """The same."""


def _begin(backend: Backend) -> None:
    backend.begin()
    backend.execute(f"SAVEPOINT {_BASE}")


def _end(backend: Backend) -> Exception | None:
    """Roll back; returns why there was nothing to roll back, if so."""
    try:
        backend.execute(f"ROLLBACK TO SAVEPOINT {_BASE}")
        backend.rollback()
        backend.release_locks()
    except Exception as error:
        return error
    return None


def _of_worker(database: Database) -> Database:
    worker = workers.worker_here()
    if worker is None:
        return database
    url = workers.url_of_worker(database.url, worker)
    return database if url == database.url else database.at(url)


def _drivers(database: Database) -> tuple[bool, bool]:
    """Whether there is an async driver, and a sync one."""
    found = []
    error = None
    for support in (database.async_support, database.sync_support):
        try:
            support()
        except ConfigurationError as missing:
            error = error or missing
            found.append(False)
        else:
            found.append(True)
    if error is not None and not any(found):
        raise error
    return found[0], found[1]
