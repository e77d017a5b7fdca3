"""Sessions of a database that has readers: where they read, and that they have written."""

from __future__ import annotations

import time
from typing import Any

from sqlalchemy import Connection, event
from sqlalchemy.orm import Session, SessionTransaction

from repom.begin import BeginOptions
from repom.errors import DatabaseUnreachableError
from repom.managed import ManagedSession, managed_class
from repom.own_writes import note_commit, own_writes
from repom.read_only import ReadOnlySession, read_only_class
from repom.reader import Reader
from repom.readers import Readers


class RoutedSession(ManagedSession):
    """A session of a database that has readers.

    Attributes:
        repom_readers: these.
        repom_begin: how its transactions begin.
        repom_is_async: whether it is that of an `AsyncSession`.
    """

    repom_readers: Readers
    repom_begin: BeginOptions
    repom_is_async: bool

    def repom_route(self, readers: Readers, begin: BeginOptions, *, is_async: bool) -> None:
        """Say what it is to know."""
        self.repom_readers = readers
        self.repom_begin = begin
        self.repom_is_async = is_async


class ReaderSession(RoutedSession, ReadOnlySession):
    """A session that only reads, from a reader that is chosen when its transaction begins."""

    _repom_reader: Reader | None = None
    #: The engine that its statements go to, once it has been chosen.
    _repom_engine: Any = None

    def get_bind(self, *args: Any, **kwargs: Any) -> Any:
        bind = super().get_bind(*args, **kwargs)
        # What the application has bound to something else stays there.
        return self._repom_engine or bind if bind is self.bind else bind

    def _connection_for_bind(self, engine: Any, *args: Any, **kwargs: Any) -> Connection:
        by_default: Any = self.bind
        if engine is not by_default or self._repom_engine is not None:
            return super()._connection_for_bind(engine, *args, **kwargs)
        readers = self.repom_readers
        own = own_writes.get()
        while reader := readers.choose(own, is_async=self.repom_is_async):
            self._repom_reader = reader
            self._repom_engine = reader.database.engine_for_reading(
                self.repom_begin, is_async=self.repom_is_async
            )
            try:
                # What else it raises, the transaction has begun on this reader, and stays there.
                return super()._connection_for_bind(self._repom_engine, *args, **kwargs)
            except DatabaseUnreachableError as error:
                reader.failed(time.monotonic(), error)
                self._repom_leave()
        self._repom_engine = engine
        return super()._connection_for_bind(engine, *args, **kwargs)

    def _repom_leave(self) -> None:
        reader, self._repom_reader = self._repom_reader, None
        self._repom_engine = None
        if reader is not None:
            self.repom_readers.left(reader)


class WriterSession(RoutedSession):
    """A session that writes, whose commits its client is to find on the readers."""


_readers: dict[type[Session], type[ManagedSession]] = {}
_writers: dict[type[Session], type[ManagedSession]] = {}


def reader_class(base: type[Session]) -> type[ManagedSession]:
    """The twin of `read_only_class` for a database that has readers."""
    return _made(_readers, base, ReaderSession, read_only_class(base))


def writer_class(base: type[Session]) -> type[ManagedSession]:
    """The twin of `managed_class` for a database that has readers."""
    return _made(_writers, base, WriterSession, managed_class(base))


def _made(
    known: dict[type[Session], type[ManagedSession]],
    base: type[Session],
    above: type[ManagedSession],
    managed: type[ManagedSession],
) -> type[ManagedSession]:
    found = known.get(base)
    if found is None:
        made = type(f"{above.__name__}Of{base.__name__}", (above, managed), {})
        found = known.setdefault(base, made)
    return found


def _after_transaction_end(session: Any, transaction: SessionTransaction) -> None:
    if transaction.parent is None:
        session._repom_leave()


def _after_commit(session: Any) -> None:
    if session.get_nested_transaction() is None:
        note_commit(session.repom_readers)


event.listen(ReaderSession, "after_transaction_end", _after_transaction_end)
event.listen(WriterSession, "after_commit", _after_commit)
