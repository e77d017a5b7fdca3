"""The middleware: one unit of work for every HTTP request."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any, get_args

from sqlalchemy import URL

from repom.branches import Branches
from repom.config import RepomConfig
from repom.context import Surroundings, surroundings
from repom.current import Outside
from repom.database import BeginOptions, Database
from repom.errors import ConfigurationError
from repom.managed import InnerCommits
from repom.middleware.exchange import Exchange
from repom.middleware.lifespan import check, refuse_to_start, run_lifespan
from repom.middleware.policy import (
    SAFE_METHODS,
    AnyASGIApp,
    ASGIApp,
    CommitOn,
    Label,
    Receive,
    Scope,
    Send,
    commits_on_success,
)
from repom.middleware.versions import refuse_old_frameworks_of
from repom.registry import Databases, as_databases
from repom.scope import END_TIMEOUT, SessionScope

#: Where the outermost middleware of a connection says to those inside it that it is there.
SCOPE_KEY = "repom.scope"

_SAFE = BeginOptions("DEFERRED")
_UNSAFE = BeginOptions("IMMEDIATE")


class DatabaseSessionMiddleware:
    """Gives every HTTP request one transaction, reachable by `current_session()`.

    It is committed before the response starts, if that tells of success, and rolled back if
    it tells of an error, or if an exception leaves the app. A COMMIT that fails turns the
    response into an error. A request that asks for no session costs no connection.

    What is wrong with the databases or the configuration stops the application from starting,
    where the server runs its lifespan, and fails every request otherwise.

    Args:
        app: the ASGI application.
        database: None for the configured default; a `Database`; a URL; the name of a
            configured database; or a mapping of names to databases, which commit in this order.
        commit_on: `commit_on(status, asgi_scope)` says whether a response commits.
        inner_commits: what `session.commit()` by other code means: "defer" (a flush; a later
            error undoes it), "allow", or "forbid".
        end_timeout: seconds that COMMIT or ROLLBACK may take before the connection is closed.
        two_phase: whether several databases commit all or nothing, by their two-phase commit.

    Raises:
        ValueError: `inner_commits` is none of the three words.

    Example:
        >>> app = FastAPI()
        >>> app.add_middleware(DatabaseSessionMiddleware)
    """

    def __init__(
        self,
        app: AnyASGIApp,
        database: Database
        | str
        | URL
        | Mapping[str, Database | RepomConfig | str | URL]
        | None = None,
        *,
        commit_on: CommitOn = commits_on_success,
        inner_commits: InnerCommits = "defer",
        end_timeout: float = END_TIMEOUT,
        two_phase: bool = False,
    ) -> None:
        if inner_commits not in get_args(InnerCommits):
            raise ValueError(
                f"inner_commits={inner_commits!r}: write one of {', '.join(get_args(InnerCommits))}"
            )
        self.app: ASGIApp = app
        self.commit_on = commit_on
        self.inner_commits: InnerCommits = inner_commits
        self.end_timeout = end_timeout
        self.two_phase = two_phase
        self._given = database

    @cached_property
    def databases(self) -> Databases:
        """What the requests find by `current_session(name)`.

        Not made by `__init__`: frameworks call that when the lifespan or a request is there
        already, and servers take what it raises for an app without lifespan.

        Raises:
            ConfigurationError: what was given, or what is configured, cannot be used.
        """
        return as_databases(self._given)

    # `Any` for the sake of the frameworks' own types; see `AnyASGIApp`.
    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        kind = scope["type"]
        if kind == "lifespan":
            await self._live(scope, receive, send)
        elif kind not in ("http", "websocket"):
            await self.app(scope, receive, send)
        elif SCOPE_KEY in scope and _is_inside(scope[SCOPE_KEY]):
            self._check_joined(scope[SCOPE_KEY].databases)
            await self.app(scope, receive, send)
        else:
            try:
                if kind == "http":
                    await self._serve(scope, receive, send)
                else:
                    scope[SCOPE_KEY] = self._websocket
                    with _at(self._websocket):
                        await self.app(scope, receive, send)
            finally:
                # What is served with this dict next, by a layer that tries again, is another
                # unit of work.
                scope.pop(SCOPE_KEY, None)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        unit = SessionScope(
            self.databases,
            label=Label(scope),
            begin=_SAFE if scope["method"] in SAFE_METHODS else _UNSAFE,
            inner_commits=self.inner_commits,
            end_timeout=self.end_timeout,
        )
        if self.two_phase:
            unit.branches = Branches(unit.databases)
        scope[SCOPE_KEY] = unit
        await Exchange(unit, self.commit_on, scope, send).run(self.app, receive)

    async def _live(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            refuse_old_frameworks_of(
                scope.get("app"),  # Starlette, where this is one of its middlewares
                self.app,
                getattr(self.app, "__self__", None),  # Quart, of which this is `app.asgi_app`
            )
            check(self.databases, two_phase=self.two_phase)
        except Exception as error:
            await refuse_to_start(error, receive, send)
            raise
        with _at(self._lifespan):
            await run_lifespan(self.app, self.databases, scope, receive, send)

    @cached_property
    def _websocket(self) -> Outside:
        return Outside(
            self.databases,
            place="a WebSocket connection, which can live for hours and is not one transaction",
            advice=(
                "Open a unit of work for each message: `async with session_scope() as session:` "
                "(or `with sync_session_scope()`), and answer after the block."
            ),
            is_connection=True,
        )

    @cached_property
    def _lifespan(self) -> Outside:
        return Outside(
            self.databases,
            place="the start or the end of the application, where no request is served",
            advice=(
                "Open a unit of work: `async with session_scope() as session:` "
                "(or `with sync_session_scope()`)."
            ),
        )

    def _check_joined(self, outer: Databases) -> None:
        """A mounted app's own middleware joins the outer one, and ends nothing."""
        for name, database in self.databases.items():
            if outer[name] is not database:
                raise ConfigurationError(
                    f"two DatabaseSessionMiddlewares disagree on database {name!r}: the outer one "
                    f"has {outer[name]!r}, the one inside it {database!r}.\n"
                    "Give the two databases different names, or both middlewares the same Database."
                )


def _is_inside(outer: Surroundings) -> bool:
    """Whether this code runs inside `outer`, and is no second attempt beside it.

    A layer that tries again may do so while the first attempt has not returned.
    """
    here = surroundings.get()
    while here is not None and here is not outer:
        here = here.parent
    return here is outer


@contextmanager
def _at(place: Outside) -> Iterator[None]:
    """What runs in the block finds itself at `place`."""
    token = surroundings.set(place)
    try:
        yield
    finally:
        surroundings.reset(token)
