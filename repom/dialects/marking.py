"""Engines that tell their dialect, at each begin, which of them it is that begins."""

from __future__ import annotations

import functools
from typing import Any

from sqlalchemy import Connection, Engine, RootTransaction


def marking_engine(engine: Engine, key: str) -> Engine:
    """The same engine, whose connections have `key` in their `info` when a transaction begins.

    Not by an event of the engine: a single listener makes SQLAlchemy prepare for all of them at
    every statement.
    """
    variant: Any = engine.execution_options()
    variant._connection_cls = _marking(key)
    return variant  # type: ignore[no-any-return]


@functools.cache
def _marking(key: str) -> type[Connection]:
    class MarkingConnection(Connection):
        def _begin_impl(self, transaction: RootTransaction) -> None:
            self.info[key] = True
            super()._begin_impl(transaction)

    return MarkingConnection
