"""As an application has it."""

from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest
import pytest_asyncio

from repom.testing import create_async_test_fixtures, create_test_fixtures, test_client
from tests.testing.inner import app

async_db_engine, async_db_test = create_async_test_fixtures()
db_engine, db_test = create_test_fixtures()


@pytest_asyncio.fixture
async def client(async_db_test: object) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app.app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


@pytest.fixture
def blocking_client(db_test: object) -> Iterator[Any]:
    with test_client(app.app, raise_server_exceptions=False) as client:
        yield client


@pytest.fixture(autouse=True)
def nothing_committed_yet() -> None:
    app.committed.clear()
