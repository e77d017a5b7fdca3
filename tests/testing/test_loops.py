"""Event loops and the plugins that run them: the fixtures work with all, and need none.

Their connection lives on a loop of its own (`repom.testing.portal`), so the loop of a test is as
good as any other.
"""

from pathlib import Path

import pytest

from tests.testing.suites import ASYNCIO, run, source, write

ASYNC_FIXTURE = """
import {plugin}

@{plugin}.fixture
async def user(async_db_test{more}):
    user = app.User(email="of a fixture")
    async_db_test.add(user)
    await async_db_test.flush()
    return user
"""
CONFTEST = """
from tests.testing.inner import app
from repom.testing import create_async_test_fixtures, create_test_fixtures

async_db_engine, async_db_test = create_async_test_fixtures()
db_engine, db_test = create_test_fixtures()
"""


@pytest.mark.parametrize("mode", ["auto", "strict"])
def test_pytest_asyncio(tmp_path: Path, tested_url: str, mode: str) -> None:
    """In either mode, with a loop for each test, class, module or run; the fixtures of the
    application have a loop of their own, where the tests have one for many."""
    modules = {
        f"test_{scope}": source("loops").replace('SCOPE = "function"', f'SCOPE = "{scope}"')
        for scope in ("function", "class", "module", "session")
    }
    conftest = CONFTEST + ASYNC_FIXTURE.format(plugin="pytest_asyncio", more="")
    write(tmp_path, ini=ASYNCIO | {"asyncio_mode": mode}, conftest=conftest, **modules)
    run(tmp_path, tested_url).assert_passed()


def test_anyio(tmp_path: Path, tested_url: str) -> None:
    """anyio's plugin, without pytest-asyncio; on trio, which SQLAlchemy cannot use, the tests
    are skipped."""
    conftest = CONFTEST + ASYNC_FIXTURE.format(plugin="pytest", more=", anyio_backend")
    module = source("loops").replace("pytest.mark.asyncio(loop_scope=SCOPE)", "pytest.mark.anyio")
    on_trio = """
import pytest

@pytest.fixture
def anyio_backend():
    return ("trio", {})

@pytest.mark.anyio
async def test_on_trio(async_db_test):
    raise AssertionError
"""
    write(tmp_path, ini={}, conftest=conftest, test_loops=module, test_on_trio=on_trio)
    done = run(tmp_path, tested_url, "-p", "no:asyncio", "-rs")
    assert done.outcomes == {"passed": 7, "skipped": 1}, done.output
    assert "runs on asyncio, and not on trio" in done.output
