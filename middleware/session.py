"""The middleware: one unit of work for every HTTP request."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import get_args

from sqlalchemy import URL

from repom.config import RepomConfig
from repom.context import surroundings
from repom.current import Outside
from repom.database import BeginOptions, Database
from repom.errors import ConfigurationError
from repom.managed import InnerCommits
from repom.middleware.exchange import ASGIApp, Exchange, Receive, Send
from repom.middleware.lifespan import run_lifespan
from repom.middleware.policy import (
    SAFE_METHODS,
    CommitOn,
    Label,
    Scope,
    commits_on_success,
)
from repom.registry import as_databases
from repom.scope import END_TIMEOUT, SessionScope

logger = logging.getLogger("repom.middleware")

#: Where the outermost middleware of a request leaves its unit of work for those inside it.
SCOPE_KEY = "repom.scope"

_SAFE = BeginOptions("DEFERRED")
_UNSAFE = BeginOptions("IMMEDIATE")


class DatabaseSessionMiddleware:
    """Gives every HTTP request one transaction, reachable by `current_session()`.

    It is committed before the response starts, if that tells of success, and rolled back if
    it tells of an error, or if an exception leaves the app. A COMMIT that fails turns the
    response into an error. A request that asks for no session costs no connection.

    Args:
        app: the ASGI application.
        database: None for the configured default; a `Database`; a URL; the name of a
            configured database; or a mapping of names to databases, which commit in this order.
        commit_on: `commit_on(status, asgi_scope)` says whether a response commits.
        inner_commits: what `session.commit()` by other code means: "defer" (a flush; a later
            error undoes it), "allow", or "forbid".
        end_timeout: seconds that COMMIT or ROLLBACK may take before the connection is closed.

    Raises:
        DatabaseURLError: a URL cannot be parsed.
        ValueError: `inner_commits` is none of the three words.

    Example:
        >>> app = FastAPI()
        >>> app.add_middleware(DatabaseSessionMiddleware)
    """

    def __init__(
        self,
        app: ASGIApp,
        database: Database
        | str
        | URL
        | Mapping[str, Database | RepomConfig | str | URL]
        | None = None,
        *,
        commit_on: CommitOn = commits_on_success,
        inner_commits: InnerCommits = "defer",
        end_timeout: float = END_TIMEOUT,
    ) -> None:
        if inner_commits not in get_args(InnerCommits):
            raise ValueError(
                f"inner_commits={inner_commits!r}: write one of {', '.join(get_args(InnerCommits))}"
            )
        self.app = app
        self.databases = as_databases(database)
        self.commit_on = commit_on
        self.inner_commits = inner_commits
        self.end_timeout = end_timeout
        self._websocket = Outside(
            self.databases,
            place="a WebSocket connection, which can live for hours and is not one transaction",
            advice=(
                "Open a unit of work for each message: `async with session_scope() as session:`,"
                " and answer after the block."
            ),
        )
        self._lifespan = Outside(
            self.databases,
            place="the start or the end of the application, where no request is served",
            advice="Open a unit of work: `async with session_scope() as session:`.",
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        kind = scope["type"]
        if kind == "http":
            if SCOPE_KEY in scope:
                self._check_joined(scope[SCOPE_KEY])
                await self.app(scope, receive, send)
                return
            unit = SessionScope(
                self.databases,
                label=Label(scope),
                begin=_SAFE if scope["method"] in SAFE_METHODS else _UNSAFE,
                inner_commits=self.inner_commits,
                end_timeout=self.end_timeout,
            )
            scope[SCOPE_KEY] = unit
            await Exchange(unit, self.commit_on, scope, send).run(self.app, receive)
        elif kind == "websocket":
            await self._outside(self._websocket, scope, receive, send)
        elif kind == "lifespan":
            token = surroundings.set(self._lifespan)
            try:
                await run_lifespan(self.app, self.databases, scope, receive, send)
            finally:
                surroundings.reset(token)
        else:
            await self.app(scope, receive, send)

    async def _outside(self, place: Outside, scope: Scope, receive: Receive, send: Send) -> None:
        token = surroundings.set(place)
        try:
            await self.app(scope, receive, send)
        finally:
            surroundings.reset(token)

    def _check_joined(self, outer: SessionScope) -> None:
        """A mounted app's own middleware joins the outer one, and ends nothing."""
        for name, database in self.databases.items():
            if outer.databases[name] is not database:
                raise ConfigurationError(
                    f"two DatabaseSessionMiddlewares disagree on database {name!r}: the outer one "
                    f"has {outer.databases[name]!r}, the one inside it {database!r}.\n"
                    "Give the two databases different names, or both middlewares the same Database."
                )
