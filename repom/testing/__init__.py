"""What an application's own tests need.

    # conftest.py
    from repom.testing import create_async_test_fixtures

    async_db_engine, async_db_test = create_async_test_fixtures()

The schema is made once for a run. Every test is one transaction that is rolled back at its end,
whatever the test and the requests that it sends commit.
"""

from repom.testing.capture import captured_on_commit_callbacks
from repom.testing.client import test_client
from repom.testing.fixtures import (
    SharedConnectionWarning,
    create_async_test_fixtures,
    create_test_fixtures,
)

__all__ = [
    "SharedConnectionWarning",
    "captured_on_commit_callbacks",
    "create_async_test_fixtures",
    "create_test_fixtures",
    "test_client",
]
