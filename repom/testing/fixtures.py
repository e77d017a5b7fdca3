"""pytest fixtures for an application's own tests."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy import URL, Engine, MetaData
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Session

from repom.database import Database
from repom.models import Base
from repom.registry import as_databases, default_or
from repom.testing.kit import Kit, Report
from repom.urls import parse_url


class SharedConnectionWarning(UserWarning):
    """Something in a test went otherwise than with a connection for each unit of work."""


def create_async_test_fixtures(
    database: Database | str | URL | None = None, *, metadata: MetaData | None = None
) -> tuple[Any, Any]:
    """Make the fixtures `async_db_engine` (of the run) and `async_db_test` (of each test).

    While a test uses the second, all that it does on this database is one transaction, which is
    rolled back at its end: the sessions of requests, of `session_scope()` and its kin, and the
    session that the fixture gives. What they commit, the others see.

    They need no event loop and no plugin, so any can be used.

    Args:
        database: the one under test: a `Database`, or the name of a configured one; by default
            the configured default. A URL is used in place of the configured default.
        metadata: the tables to create if they are missing; by default those of
            `repom.models.Base`.

    Returns:
        Two fixtures, to be given names in a `conftest.py`. The first gives an `AsyncEngine` that
        any event loop can use; the second an `AsyncSession`.
    """

    @pytest.fixture(scope="session")
    def async_db_engine(request: pytest.FixtureRequest) -> AsyncEngine:
        return AsyncEngine(_started(request, database, metadata, needs_async=True).engine)

    @pytest.fixture
    def async_db_test(request: pytest.FixtureRequest) -> Iterator[AsyncSession]:
        _refuse_trio(request)
        kit = _started(request, database, metadata, needs_async=True)
        with _test(kit, request):
            engine = AsyncEngine(kit.session_engine)
            session = kit.home.session_class(engine, **kit.home.session_kwargs)
            yield session
            session.sync_session.close()

    return async_db_engine, async_db_test


def create_test_fixtures(
    database: Database | str | URL | None = None,
    *,
    metadata: MetaData | None = None,
    only_sync: bool = False,
) -> tuple[Any, Any]:
    """Make the fixtures `db_engine` and `db_test`: the sync twins of the async ones.

    Their connection is one of the async driver if there is one, so that async code under test,
    the endpoints of an application for instance, can share it.

    Args:
        database: as for `create_async_test_fixtures`, like `metadata`.
        only_sync: all code under test is sync; use the sync driver, as it does.
    """

    @pytest.fixture(scope="session")
    def db_engine(request: pytest.FixtureRequest) -> Engine:
        return _started(request, database, metadata, only_sync=only_sync).engine

    @pytest.fixture
    def db_test(request: pytest.FixtureRequest) -> Iterator[Session]:
        kit = _started(request, database, metadata, only_sync=only_sync)
        with _test(kit, request):
            session = kit.home.sync_session_class(kit.session_engine, **kit.home.session_kwargs)
            yield session
            session.close()

    return db_engine, db_test


# --- the kits of this run

#: By what is under test; an error stays, for each test to be told at once.
_kits: dict[object, Kit | BaseException] = {}


def _started(
    request: pytest.FixtureRequest,
    database: Database | str | URL | None,
    metadata: MetaData | None,
    *,
    needs_async: bool = False,
    only_sync: bool = False,
) -> Kit:
    """The kit of `database`, which all fixtures for it share, and all its tables."""
    given = _url_of(database)
    key = given or as_databases(database)[None]
    if key not in _kits:
        request.session.addfinalizer(lambda: _kits.pop(key))
        try:
            kit = _kits[key] = _new_kit(database, given, only_sync=only_sync)
        except BaseException as error:
            _kits[key] = error
            raise
        request.session.addfinalizer(kit.stop)
    found = _kits[key]
    if isinstance(found, BaseException):
        raise found
    kit = found
    if needs_async:
        kit.require_async()
    kit.create_all(Base.metadata if metadata is None else metadata)
    return kit


def _url_of(database: Database | str | URL | None) -> URL | None:
    if isinstance(database, URL) or (isinstance(database, str) and ":" in database):
        return parse_url(database)
    return None


def _new_kit(database: Database | str | URL | None, url: URL | None, *, only_sync: bool) -> Kit:
    if url is None:
        configured = as_databases(database)[None]
        replaced = configured
    else:
        configured = Database.from_config(url=url)
        replaced = default_or(configured)
    kit = Kit(configured, replaced, only_sync=only_sync)
    try:
        kit.start()
    except BaseException:
        kit.stop()
        raise
    return kit


# --- one test


@contextmanager
def _test(kit: Kit, request: pytest.FixtureRequest) -> Iterator[None]:
    test = request.node.nodeid
    kit.begin(test)
    try:
        yield
    finally:
        report = kit.end()
        if report is not None:
            try:
                for difference in report.differences:
                    message = f"{test}: {difference}.{_WHY_DIFFERENT}"
                    warnings.warn(message, SharedConnectionWarning, stacklevel=1)
            finally:
                _fail_if_untidy(test, report)


_WHY_DIFFERENT = (
    "\nWithout the fixture it would have stayed: all units of work of a test share one "
    "connection, so one that begins inside another one ends with it."
)


def _fail_if_untidy(test: str, report: Report) -> None:
    if report.lost is not None:
        pytest.fail(
            f"{test} has closed its connection, or ended the transaction that was to be rolled "
            f"back: {type(report.lost).__name__}: {report.lost}\n"
            "What it has written may have stayed in the database. Use `commit()`, `rollback()` "
            "and `close()` of sessions, not of the driver's connection.",
            pytrace=False,
        )
    if report.leaks:
        gc.collect()  # what SQLAlchemy has to say of those belongs to this test
        places = "\n".join(f"  {place}" for place in report.leaks)
        pytest.fail(
            f"{test} left {len(report.leaks)} session(s) or connection(s) open, which were opened "
            f"at\n{places}\n"
            "Use `async with`, or close them; await the tasks that use them.",
            pytrace=False,
        )


def _refuse_trio(request: pytest.FixtureRequest) -> None:
    if "anyio_backend" in request.fixturenames:
        backend = request.getfixturevalue("anyio_backend")
        name = backend if isinstance(backend, str) else backend[0]
        if name != "asyncio":
            pytest.skip(f"SQLAlchemy's AsyncSession runs on asyncio, and not on {name}")
