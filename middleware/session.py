"""The middleware: one unit of work for every HTTP request."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any, get_args

from sqlalchemy import URL

from repom.begin import BeginOptions, ReadOnly, checked_read_only
from repom.branches import Branches
from repom.config import RepomConfig
from repom.conflicts import is_conflict
from repom.context import Surroundings, surroundings
from repom.current import Outside
from repom.database import Database
from repom.errors import ConfigurationError
from repom.managed import InnerCommits
from repom.middleware.exchange import SCOPE_KEY, Exchange
from repom.middleware.lifespan import check, refuse_to_start, run_lifespan
from repom.middleware.own_writes import CarriedBy, sent_with, telling
from repom.middleware.per_request import Choose, PerRequest
from repom.middleware.policy import (
    SAFE_METHODS,
    AnyASGIApp,
    ASGIApp,
    CommitOn,
    Label,
    ReadOnlyFor,
    Receive,
    Scope,
    Send,
    commits_on_success,
)
from repom.middleware.replay import Replay
from repom.middleware.versions import refuse_old_frameworks_of
from repom.own_writes import own_writes as writes_here
from repom.registry import Databases, as_databases
from repom.retry import Attempts, RetryOn
from repom.scope import SessionScope
from repom.scope_options import END_TIMEOUT, ScopeOptions

#: Bytes: 1 MiB, more than nearly every form and JSON document.
RETRY_BODY_LIMIT = 1024 * 1024


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
            configured database; a mapping of names to databases, which commit in this order; or a
            function that chooses the default one for each request, `choose(asgi_scope)`. It
            returns a `Database` or a name. It is called when a session is first asked for, where
            what it raises is raised, and must not be async.
        commit_on: `commit_on(status, asgi_scope)` says whether a response commits. It is asked
            only where something was begun.
        read_only: `read_only(asgi_scope)` says whether a request only reads, see `session_scope`:
            True, False or "snapshot"; or one of these for all requests. `safe_methods` is
            ready-made.
        inner_commits: what `session.commit()` by other code means: "defer" (a flush; a later
            error undoes it), "allow", or "forbid".
        end_timeout: seconds that COMMIT or ROLLBACK may take before the connection is closed.
        retries: how often a request that has lost a conflict is served again, from the start and
            in a new transaction, before the client hears of it.
        retry_on: `retry_on(error)` says whether an error is worth it.
        retry_body_limit: bytes of a request's body that are kept for that. A request with a
            longer one is not repeated.
        own_writes: of databases with readers: how a client carries what it has written to its
            next request, so that it finds that there. In a "cookie", in the "header"
            `Repom-Written` of the response, which it sends back, or None for not at all.
        two_phase: whether several databases commit all or nothing, by their two-phase commit.

    Raises:
        ValueError: `inner_commits` is none of the three words, `read_only` or `own_writes` none of
            its values, or `retries` less than 0.

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
        | Choose
        | None = None,
        *,
        commit_on: CommitOn = commits_on_success,
        read_only: ReadOnly | ReadOnlyFor = False,
        inner_commits: InnerCommits = "defer",
        end_timeout: float = END_TIMEOUT,
        retries: int = 0,
        retry_on: RetryOn = is_conflict,
        retry_body_limit: int = RETRY_BODY_LIMIT,
        own_writes: CarriedBy | None = "cookie",
        two_phase: bool = False,
    ) -> None:
        if inner_commits not in get_args(InnerCommits):
            raise ValueError(
                f"inner_commits={inner_commits!r}: write one of {', '.join(get_args(InnerCommits))}"
            )
        if own_writes not in (None, *get_args(CarriedBy)):
            raise ValueError(f'own_writes={own_writes!r}: write "cookie", "header" or None')
        Attempts(retries)  # which refuses what is no number of them
        self.app: ASGIApp = app
        self.commit_on = commit_on
        self.read_only: ReadOnly | ReadOnlyFor = (
            read_only if callable(read_only) else checked_read_only(read_only)
        )
        self.inner_commits: InnerCommits = inner_commits
        self.end_timeout = end_timeout
        self.own_writes: CarriedBy | None = own_writes
        self._replaying: Callable[..., Replay] | None = None
        if retries:
            self._replaying = partial(
                Replay, retries=retries, retry_on=retry_on, body_limit=retry_body_limit
            )
        self.two_phase = two_phase
        self._given = database
        self._is_per_request = callable(database)

    @cached_property
    def databases(self) -> Databases:
        """What the requests find by `current_session(name)`.

        Not made by `__init__`: frameworks call that when the lifespan or a request is there
        already, and servers take what it raises for an app without lifespan.

        Raises:
            ConfigurationError: what was given, or what is configured, cannot be used.
        """
        return PerRequest(self._given) if callable(self._given) else as_databases(self._given)

    @cached_property
    def _carries_writes(self) -> bool:
        """Whether what a client has written may matter to its next request."""
        if self.own_writes is None:
            return False
        databases = self.databases
        if isinstance(databases, PerRequest):  # and nobody knows which they are
            return True
        return any(database.readers is not None for database in databases.known())

    def _chosen_for(self, scope: Scope) -> Databases:
        databases = self.databases
        assert isinstance(databases, PerRequest)
        return databases.of_request(scope)

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
                if kind == "websocket":
                    await self._connect(scope, receive, send)
                elif self._carries_writes:
                    await self._serve_knowing(scope, receive, send)
                elif self._replaying is not None:
                    await self._serve(scope, receive, send)
                else:
                    # As `Exchange.run` does. But a coroutine more would be on the stack, and take
                    # its memory, whenever the app waits.
                    exchange = Exchange(self._unit_for(scope), self.commit_on, scope, send)
                    exchange.begin()
                    try:
                        await self.app(scope, receive, exchange.send)
                    except BaseException as error:
                        exchange.error = error
                    if not exchange.end_if_settled():
                        await exchange.end(self.app, receive)
            finally:
                # What is served with this dict next, by a layer that tries again, is another
                # unit of work.
                scope.pop(SCOPE_KEY, None)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        kind = self._replaying or Exchange
        await kind(self._unit_for(scope), self.commit_on, scope, send).run(self.app, receive)

    def _unit_for(self, scope: Scope) -> SessionScope:
        method = scope["method"]
        options = self._safe if method in SAFE_METHODS else self._unsafe
        if self.read_only:
            options = self._reading(scope) or options
        if self._is_per_request:
            options = options._replace(databases=self._chosen_for(scope))
        unit = SessionScope(options, Label(method, scope["path"]))
        if self.two_phase and not options.begin.read_only:
            unit.branches = Branches(options.databases)
        scope[SCOPE_KEY] = unit
        return unit

    def _options(self, begin: BeginOptions) -> ScopeOptions:
        return ScopeOptions(self.databases, begin, self.inner_commits, self.end_timeout)

    @cached_property
    def _safe(self) -> ScopeOptions:
        return self._options(BeginOptions("DEFERRED"))

    @cached_property
    def _unsafe(self) -> ScopeOptions:
        return self._options(BeginOptions("IMMEDIATE"))

    @cached_property
    def _read_only(self) -> ScopeOptions:
        return self._options(BeginOptions(read_only=True))

    @cached_property
    def _snapshot(self) -> ScopeOptions:
        return self._options(BeginOptions(read_only="snapshot"))

    async def _serve_knowing(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a client that tells what it has written before, and is told what it has now."""
        assert self.own_writes is not None
        own = sent_with(scope, self.own_writes)
        token = writes_here.set(own)
        try:
            await self._serve(scope, receive, telling(own, scope, send, self.own_writes))
        finally:
            writes_here.reset(token)

    def _reading(self, scope: Scope) -> ScopeOptions | None:
        """How a request is served that only reads; None if it may write."""
        read_only = self.read_only
        if callable(read_only):
            read_only = checked_read_only(read_only(scope))
        if not read_only:
            return None
        return self._snapshot if read_only == "snapshot" else self._read_only

    async def _connect(self, scope: Scope, receive: Receive, send: Send) -> None:
        place = self._websocket
        if self._is_per_request:
            place = place.having(self._chosen_for(scope))
        scope[SCOPE_KEY] = place
        try:
            with _at(place):
                await self.app(scope, receive, send)
        finally:
            self._websocket.has_warned |= place.has_warned

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
        if isinstance(self.databases, PerRequest):
            self.databases.check_joined(outer)
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
