"""Databases with an empty table of notes."""

from collections.abc import AsyncIterator

import pytest

from repom import Database
from tests.middleware.held import HeldCommit, held_commit
from tests.middleware.notes import notes_database


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    """An empty table of notes, on each kind of database."""
    async with notes_database(database_url) as database:
        yield database


@pytest.fixture(params=["sqlite", "postgresql"])
def deferring_url(request: pytest.FixtureRequest) -> str:
    """The URL of a database that finds a wrong parent of a note at COMMIT."""
    name = {"sqlite": "sqlite_url", "postgresql": "postgres_url"}[request.param]
    url: str = request.getfixturevalue(name)
    return url


@pytest.fixture
async def deferring(deferring_url: str) -> AsyncIterator[Database]:
    """An empty table of notes, where COMMIT refuses one with the parent `NOWHERE`."""
    async with notes_database(deferring_url) as database:
        yield database


@pytest.fixture
async def held(deferring_url: str) -> AsyncIterator[HeldCommit]:
    """An empty table of notes, whose COMMIT waits until the test lets it go on."""
    async with held_commit(deferring_url) as held:
        yield held
