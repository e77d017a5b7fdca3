"""Variants of an engine: what they share is its pool, its dialect and its events."""

from __future__ import annotations

import functools
from typing import Any

from sqlalchemy import Connection, Engine, RootTransaction


def variant_of(engine: Engine, **execution_options: Any) -> Any:
    """`engine` with other options, whose connections are of the same class."""
    variant: Any = engine.execution_options(**execution_options)
    variant._connection_cls = engine._connection_cls
    return variant


def marking_engine(engine: Engine, key: str) -> Engine:
    """The same engine, whose connections have `key` in their `info` when a transaction begins.

    Not by an event of the engine: a single listener makes SQLAlchemy prepare for all of them at
    every statement.
    """
    variant = variant_of(engine)
    variant._connection_cls = _marking(variant._connection_cls, key)
    return variant  # type: ignore[no-any-return]


@functools.cache
def _marking(base: Any, key: str) -> type[Connection]:
    class MarkingConnection(base):  # type: ignore[misc]
        def _begin_impl(self, transaction: RootTransaction) -> None:
            self.info[key] = True
            super()._begin_impl(transaction)

    return MarkingConnection
