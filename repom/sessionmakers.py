"""Session factories that can be made at import, when no event loop runs and no engine is there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, sessionmaker

if TYPE_CHECKING:
    from repom.database import Database

_AS = TypeVar("_AS", bound=AsyncSession)
_S = TypeVar("_S", bound=Session)


class LoopSessionmaker(async_sessionmaker[_AS]):
    """An `async_sessionmaker` that finds the running loop's engine at each call."""

    def __init__(self, database: Database[_AS, Any]) -> None:
        super().__init__(class_=database.session_class, **database.session_kwargs)
        self._database = database

    def __call__(self, **local_kw: Any) -> _AS:
        """A new `AsyncSession`; `local_kw` as for `async_sessionmaker`."""
        if local_kw.get("bind") is None and self.kw.get("bind") is None:
            local_kw["bind"] = self._database.async_engine
        return super().__call__(**local_kw)


class SyncSessionmaker(sessionmaker[_S]):
    """A `sessionmaker` that finds the engine at each call, as the async one does."""

    def __init__(self, database: Database[Any, _S]) -> None:
        super().__init__(class_=database.sync_session_class, **database.session_kwargs)
        self._database = database

    def __call__(self, **local_kw: Any) -> _S:
        """A new `Session`; `local_kw` as for `sessionmaker`."""
        if local_kw.get("bind") is None and self.kw.get("bind") is None:
            local_kw["bind"] = self._database.engine
        return super().__call__(**local_kw)
