"""Requests from sync tests."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from starlette.testclient import TestClient


def test_client(app: Any, **kwargs: Any) -> TestClient:
    """Starlette's `TestClient` for `app`, which may be of any ASGI framework.

    What the app does is a part of the test's transaction, since the fixtures' connection serves
    the client's event loop, in a thread of its own, as it serves the test.

    Args:
        app: the application.
        kwargs: of `TestClient`.

    Raises:
        ModuleNotFoundError: Starlette is not installed, or neither httpx2 nor httpx is.

    Example:
        >>> def test_create(db_test):
        ...     with test_client(app) as client:      # which runs its lifespan
        ...         assert client.post("/users?email=a@example.com").status_code == 200
    """
    with warnings.catch_warnings():
        # Where only httpx is installed, Starlette would rather have httpx2, and works as well.
        warnings.filterwarnings("ignore", "Using `httpx` with `starlette.testclient`")
        from starlette.testclient import TestClient

    return TestClient(app, **kwargs)


test_client.__test__ = False  # type: ignore[attr-defined]  # for pytest, which would call it
