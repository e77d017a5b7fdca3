"""How code finds its unit of work, and what it is told where there is none."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from repom import (
    current_scope,
    current_session,
    current_sync_session,
    on_commit,
    on_rollback,
    session_scope,
)
from repom.context import surroundings
from repom.current import Outside, databases_here, open_scope_here
from repom.database import Database
from repom.errors import NoScopeError, ScopeClosedError
from repom.registry import CONFIGURED, Databases
from tests.support.units import Note, sqlite, texts

__all__ = ["sqlite"]

ASKS = [
    (current_session, "current_session()"),
    (current_sync_session, "current_sync_session()"),
    (current_scope, "current_scope()"),
    (lambda: on_commit(print), "on_commit()"),
    (lambda: on_rollback(print), "on_rollback()"),
]


@pytest.mark.parametrize(("ask", "name"), ASKS, ids=["", "sync", "scope", "commit", "rollback"])
def test_outside_of_a_unit_of_work(ask: Callable[[], Any], name: str) -> None:
    """The error names both ways to have one: the middleware, and `session_scope()`."""
    with pytest.raises(NoScopeError, match=r"(?s)middleware.*session_scope\(\)") as caught:
        ask()
    assert str(caught.value).startswith(f"{name} was called outside a unit of work")
    assert len(str(caught.value).splitlines()) <= 3


@pytest.mark.parametrize(("ask", "name"), ASKS, ids=["", "sync", "scope", "commit", "rollback"])
def test_in_a_place_that_is_no_unit_of_work(ask: Callable[[], Any], name: str) -> None:
    """A place that knows what it is says so, and what to write there."""
    place = Outside(CONFIGURED, place="a WebSocket connection", advice="Open one for each message.")
    token = surroundings.set(place)
    try:
        with pytest.raises(NoScopeError) as caught:
            ask()
    finally:
        surroundings.reset(token)
    assert str(caught.value) == (
        f"{name} was called in a WebSocket connection.\nOpen one for each message."
    )


async def test_databases_of_a_place_are_those_of_its_scopes(sqlite: Database) -> None:
    """A scope that is opened on a WebSocket has the databases of the middleware."""
    databases = Databases({"default": sqlite})
    token = surroundings.set(Outside(databases, place="here", advice=""))
    try:
        assert databases_here() is databases
        async with session_scope() as session:
            session.add(Note(text="a"))
    finally:
        surroundings.reset(token)
    assert texts(sqlite) == ["a"]
    assert databases_here() is CONFIGURED


async def test_task_that_outlives_its_scope_is_told_so(sqlite: Database) -> None:
    """What opens a unit of work of its own where there is none does not do so here. Half of a
    request would be committed when the other half, or its answer, says that it failed."""
    over = asyncio.Event()

    async def left_over() -> None:
        await over.wait()
        open_scope_here()

    async with session_scope(sqlite):
        task = asyncio.create_task(left_over())
        assert open_scope_here() is current_scope()
    over.set()
    with pytest.raises(ScopeClosedError, match=r"session_scope\(\)"):
        await task
