"""Applications that uvicorn serves, as clients and a second connection to the database see them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from repom import Database
from tests.middleware.notes import create_notes
from tests.support.asgi import ASGIApp, Receive, Scope, Send
from tests.support.reader import open_transactions
from tests.support.sockets import serve


@contextmanager
def notes_at(url: str, **pool: Any) -> Iterator[Database]:
    """A `Database` at `url` with an empty table of notes, for a server.

    Args:
        pool: options of its pools.
    """
    create_notes(url)
    database = Database(url, engine_kwargs=pool)
    yield database
    database.dispose_sync()


class Served:
    """What is served.

    Attributes:
        base_url: of the server, without a slash at its end.
    """

    def __init__(self, base_url: str, database: Database, pools: list[Any]) -> None:
        self.base_url = base_url
        self._url = database.url.render_as_string(hide_password=False)
        self._pools = pools

    @property
    def in_use(self) -> int:
        """How many connections are out of the server's pools, the async and the sync one."""
        return sum(pool.checkedout() for pool in self._pools)

    def assert_nothing_open(self) -> None:
        """Fail if a connection is in use, or a transaction is open on the database server."""
        assert self.in_use == 0
        if not self._url.startswith("sqlite"):
            assert open_transactions(self._url) == 0


@contextmanager
def serving(database: Database, app: ASGIApp, **uvicorn_kwargs: Any) -> Iterator[Served]:
    """Serve `app`, which works on `database`; the block is left when the server has stopped."""
    pools: list[Any] = []

    async def outermost(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":  # now, for the pool is that of the server's event loop
            pools.extend((database.async_engine.pool, database.engine.pool))
        await app(scope, receive, send)

    with serve(outermost, **uvicorn_kwargs) as base_url:
        yield Served(base_url, database, pools)
