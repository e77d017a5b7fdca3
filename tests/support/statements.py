"""Knowing when a statement is on its way to the database, for what is to happen meanwhile."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncEngine


@contextmanager
def sent(engine: AsyncEngine, *beginnings: str) -> Iterator[asyncio.Event]:
    """Yield what is set when a statement is sent that begins with one of these words.

    Who waits for it goes on before the answer has come: that takes another turn of the loop.
    """
    happened = asyncio.Event()

    def before(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
        if statement.lstrip().upper().startswith(beginnings):
            happened.set()

    event.listen(engine.sync_engine, "before_cursor_execute", before)
    try:
        yield happened
    finally:
        event.remove(engine.sync_engine, "before_cursor_execute", before)
