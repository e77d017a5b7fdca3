"""DBAPI cursors (PEP 249) whose work is done elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeVar

from sqlalchemy.util import await_only

T = TypeVar("T")


class CursorHome(Protocol):
    """The connection of a `RemoteCursor`."""

    def execute(self, sql: str, function: Callable[..., T], *args: Any) -> T: ...
    def perform(self, sql: str, function: Callable[..., T], *args: Any) -> T: ...
    def finish(self, function: Callable[[], T]) -> T: ...


class RemoteCursor:
    """A cursor that opens a real one, where that has to live, when it executes."""

    def __init__(self, connection: CursorHome, open_real: Callable[[], Any]) -> None:
        self._connection = connection
        self._open_real = open_real
        self._real: Any = None
        self._sql = ""
        self._given: dict[str, Any] = {}  # what a dialect sets before there is a real one
        self._is_closed = False

    def __getattr__(self, name: str) -> Any:
        if self._real is not None:
            return getattr(self._real, name)
        try:
            return {**_NOT_EXECUTED, **self._given}[name]
        except KeyError:
            raise AttributeError(name) from None

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _OF_THE_CURSOR:
            object.__setattr__(self, name, value)
        elif self._real is not None:
            setattr(self._real, name, value)
        else:
            self._given[name] = value

    def execute(self, operation: Any, parameters: Any = None) -> Any:
        return self._execute("execute", operation, parameters)

    def executemany(self, operation: Any, parameters: Any) -> Any:
        return self._execute("executemany", operation, parameters)

    def callproc(self, name: str, parameters: Any = None) -> Any:
        return self._execute("callproc", name, parameters)

    def _execute(self, method: str, operation: Any, parameters: Any) -> Any:
        self._sql = operation if isinstance(operation, str) else str(operation)
        return self._connection.execute(self._sql, self._there, method, operation, parameters)

    def _there(self, method: str, operation: Any, parameters: Any) -> Any:
        if self._real is not None and not self._is_closed:
            self._real.close()
        self._real = real = self._open_real()
        self._is_closed = False
        for name, value in self._given.items():
            setattr(real, name, value)
        args = (operation,) if parameters is None else (operation, parameters)
        result = getattr(real, method)(*args)
        if not self._reads_later and hasattr(real, "_async_soft_close"):
            # All rows are here, and closing it later on would be another journey.
            await_only(real._async_soft_close())
        return result

    def fetchone(self) -> Any:
        return self._fetch(self._real.fetchone)

    def fetchmany(self, size: int | None = None) -> Any:
        return self._fetch(self._real.fetchmany, *(() if size is None else (size,)))

    def fetchall(self) -> Any:
        return self._fetch(self._real.fetchall)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.fetchone, None)

    def close(self) -> None:
        if self._real is None or self._is_closed:
            return
        self._is_closed = True
        if self._reads_later:
            self._connection.finish(self._real.close)
        else:
            self._real.close()

    async def _async_soft_close(self) -> None:
        """For SQLAlchemy's AsyncConnection; see above."""

    def _fetch(self, function: Callable[..., Any], *args: Any) -> Any:
        if self._reads_later:
            return self._connection.perform(self._sql, function, *args)
        return function(*args)

    @property
    def _reads_later(self) -> bool:
        """Whether its rows are read bit by bit; psycopg gives such cursors a name."""
        real = self._real
        return bool(getattr(real, "server_side", False) or getattr(real, "name", None))


_OF_THE_CURSOR = {"_connection", "_given", "_is_closed", "_open_real", "_real", "_sql"}
_NOT_EXECUTED = {"description": None, "rowcount": -1, "lastrowid": None, "arraysize": 1}
