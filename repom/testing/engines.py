"""Engines whose connections are `RemoteConnection`s."""

from __future__ import annotations

import copy
from collections.abc import Callable
from operator import attrgetter, methodcaller
from typing import Any

from sqlalchemy import Connection, Engine, event
from sqlalchemy.pool import NullPool, PoolProxiedConnection
from sqlalchemy.util.concurrency import in_greenlet

from repom.dialects import Support
from repom.dialects.read_only import ReadOnly
from repom.testing.connections import RemoteConnection


def remote_engine(
    real: Engine, support: Support, connect: Callable[[], RemoteConnection]
) -> Engine:
    """An engine that does as `real` does, by other connections.

    Args:
        real: has connected once, so that its dialect knows the server.
        support: of its dialect; a `ReadOnly` for connections that only read.
        connect: makes a connection.
    """
    dialect = _remote(real.dialect, support)
    # Nothing to reset, for a connection that is closed rolls back.
    creator: Any = connect
    pool = NullPool(creator, reset_on_return=None, dialect=dialect)
    # Said of connections of async drivers; those of sync ones go back to their pool silently.
    event.listen(pool, "close_detached", _collected)
    engine = Engine(
        pool,
        dialect,
        real.url,
        echo=bool(real.echo),
        hide_parameters=real.hide_parameters,
        execution_options=real.get_execution_options(),
    )
    support.watch(engine)
    return engine


def _remote(real: Any, support: Support) -> Any:
    """The dialect, without what it does to a connection but by cursors."""
    dialect = copy.copy(real)

    def begin(connection: PoolProxiedConnection) -> None:
        support.begins(connection)
        _of(connection).begin(lambda: support.place_in_line(connection, awaits=in_greenlet()))

    dialect.do_begin = begin
    dialect.do_savepoint = _savepoint
    dialect.do_release_savepoint = _release_savepoint
    dialect.do_rollback_to_savepoint = _rollback_to_savepoint
    dialect.do_close = dialect.do_terminate = methodcaller("close")
    dialect.has_terminate = True
    dialect.get_driver_connection = attrgetter("driver_connection")
    dialect.set_isolation_level = RemoteConnection.set_isolation_level
    dialect.reset_isolation_level = RemoteConnection.reset_isolation_level
    if isinstance(support, ReadOnly):
        support.install_savepoints(dialect)
    return dialect


def _collected(connection: Any) -> None:
    connection.collected()


def _of(connection: Any) -> RemoteConnection:
    return connection.dbapi_connection  # type: ignore[no-any-return]


def _savepoint(connection: Connection, name: str) -> None:
    remote = _of(connection.connection)
    own_name = remote.own_name(name)
    connection.exec_driver_sql(f"SAVEPOINT {own_name}")
    remote.savepoint_begun(own_name)


def _release_savepoint(connection: Connection, name: str) -> None:
    remote = _of(connection.connection)
    own_name = remote.own_name(name)
    connection.exec_driver_sql(f"RELEASE SAVEPOINT {own_name}")
    remote.savepoint_ended(own_name, undone=False)


def _rollback_to_savepoint(connection: Connection, name: str) -> None:
    remote = _of(connection.connection)
    own_name = remote.own_name(name)
    connection.exec_driver_sql(f"ROLLBACK TO SAVEPOINT {own_name}")
    remote.savepoint_ended(own_name, undone=True)
