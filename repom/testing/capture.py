"""The `on_commit` callbacks that were due, for a test to look at."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from repom.callbacks import Callback, Capture, captures


@contextmanager
def captured_on_commit_callbacks(*, execute: bool = False) -> Iterator[list[Callback]]:
    """Collect the `on_commit` callbacks of what is committed in the block, in order.

    Those of all threads and event loops, so also of requests that a `TestClient` sends. Those of
    a transaction or a savepoint that is rolled back are not among them.

    Args:
        execute: run them too, as without the block.

    Example:
        >>> async def test_publish(async_db_test, client):
        ...     with captured_on_commit_callbacks() as callbacks:
        ...         await client.post("/articles/1/publish")
        ...     assert len(callbacks) == 1
    """
    capture = Capture([], execute)
    captures.append(capture)
    try:
        yield capture.callbacks
    finally:
        captures.remove(capture)
