"""The kinds of requests of a soak, and what their answers tell of the database.

An application has an endpoint for each: `app.py`. A request may have several transactions, its
parts; a rule says of each what must be in the database, given what the client has seen.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from tests.soak.tables import ACCOUNTS, BALANCE, BALLAST_ROWS, ballast


class Presence(Enum):
    """What may be in the database of one transaction. Half of it is never right."""

    ALL = "all"
    NONE = "none"
    EITHER = "all or none"


class Seen(NamedTuple):
    """What a client has seen of its response.

    Attributes:
        status: None if not even its first line has arrived.
        complete: whether the whole body has arrived.
        sent: whether the client has sent the whole request.
        reused: whether the connection is that of an earlier request.
        error: what has broken the connection, or `NO_ANSWER`.
    """

    status: int | None = None
    complete: bool = False
    body: bytes = b""
    sent: bool = True
    reused: bool = False
    error: str = ""

    def __str__(self) -> str:
        status = "no answer" if self.status is None else f"{self.status}"
        return status if self.complete or self.status is None else f"{status}, broken"

    @property
    def is_error(self) -> bool:
        return self.status is not None and self.status >= 400

    @property
    def is_busy(self) -> bool:
        """Whether the answer is that of an application that could not even try, or gave up."""
        return self.status in (BUSY, OVERDUE)


Rule = Callable[[Seen], Presence]

#: The client has had no reason to go, and yet lost its patience at last.
NO_ANSWER = "waited in vain"

BUSY = 503  # no connection could be had, or the database has chosen it to solve a deadlock
OVERDUE = 504  # a time limit of the application has passed


def with_the_start(seen: Seen) -> Presence:
    """Of the transaction that is open when the response starts."""
    if seen.status is None:
        return Presence.EITHER
    return Presence.NONE if seen.is_error else Presence.ALL


def with_the_upload(seen: Seen) -> Presence:
    """The same, where the endpoint needs the whole body of the request."""
    return with_the_start(seen) if seen.sent else Presence.NONE


def with_the_end(seen: Seen) -> Presence:
    """Of what the body writes, or what a cursor keeps open; and of callbacks.

    Those run before the start, but a request that is cancelled then has been committed already,
    and its response says so.
    """
    if seen.is_error:
        return Presence.NONE
    return Presence.ALL if seen.complete else Presence.EITHER


def afterwards(seen: Seen) -> Presence:
    """Of background tasks, which begin when the client has its answer."""
    return with_the_end(seen)


def apart(seen: Seen) -> Presence:
    """Of transactions that end by themselves, such as those of `session_scope()`."""
    return Presence.ALL if seen.complete and not seen.is_busy else Presence.EITHER


def with_an_error(seen: Seen) -> Presence:
    """Of callbacks that wait for the rollback."""
    if not seen.is_error:
        return Presence.NONE if seen.complete else Presence.EITHER
    return apart(seen)


def perhaps(seen: Seen) -> Presence:
    """Of what the application itself may have given up, within a success."""
    return Presence.NONE if seen.is_error else Presence.EITHER


def never(seen: Seen) -> Presence:
    """Of what fails, whatever is answered."""
    return Presence.NONE


@dataclass(frozen=True)
class Kind:
    """A kind of requests.

    Attributes:
        name: also the path of its endpoint.
        statuses: that the application answers with.
        parts: its transactions.
        method: of HTTP.
        share: how often it is chosen, compared with others.
        body: of a complete success.
        breaks: whether the response is never complete.
        endless: whether the client has to leave.
        query: parameters of the endpoint, each with the most that is asked for.
    """

    name: str
    statuses: frozenset[int]
    parts: Mapping[str, Rule] = field(default_factory=dict)
    method: str = "POST"
    share: int = 1
    body: bytes | None = None
    breaks: bool = False
    endless: bool = False
    query: Mapping[str, float] = field(default_factory=dict)


def _kind(name: str, *statuses: int, **more: object) -> Kind:
    return Kind(name, frozenset(statuses), **more)  # type: ignore[arg-type]


_EXPORT = "".join(ballast(id_) for id_ in range(BALLAST_ROWS)).encode()
_TOTAL = str(ACCOUNTS * BALANCE).encode()
_REQUEST = {"request": with_the_start}

_EVERYWHERE = (
    # successes
    _kind("core", 201, parts=_REQUEST, share=6),
    _kind("orm", 201, parts=_REQUEST, share=6),
    _kind("dependency", 201, parts=_REQUEST, share=3),
    _kind("loop", 201, parts=_REQUEST, share=2),
    _kind("redirect", 303, parts=_REQUEST, share=2),
    _kind("empty", 204, parts=_REQUEST, share=2),
    _kind("upload", 201, parts={"request": with_the_upload}, share=4),
    _kind("slow", 201, parts=_REQUEST, query={"pause": 0.1}, share=2),
    _kind("early", 502, parts={"early": apart, "request": never}, share=2),
    _kind("dry", 200, parts={"request": never}, share=2),
    _kind("transfer", 201, parts=_REQUEST, share=6),
    _kind("count", 201, parts={"count": with_the_start}, share=6),
    # readers
    _kind("total", 200, method="GET", body=_TOTAL, share=4),
    _kind("totals", 200, method="GET", body=_TOTAL * 3, share=3),
    _kind("export", 200, method="GET", body=_EXPORT, share=4),
    _kind("nothing", 200, method="GET", share=2),
    # errors
    _kind("refused/404", 404, parts=_REQUEST, share=2),
    _kind("refused/409", 409, parts=_REQUEST, share=2),
    _kind("refused/422", 422, parts=_REQUEST, share=2),
    _kind("returns/409", 409, parts=_REQUEST, share=2),
    _kind("crash", 500, parts=_REQUEST, share=3),
    _kind("duplicate", 409, parts=_REQUEST, share=3),
    _kind("swallowed-flush", 500, parts={"request": never}, share=2),
    _kind("commits-itself", 409, parts=_REQUEST, share=2),
    _kind("narrow", 201, BUSY, parts=_REQUEST, share=4),
    # several tasks
    _kind("group", 201, parts=_REQUEST, share=3),
    _kind("group-fails", 500, parts=_REQUEST, share=3),
    _kind("gather-fails", 500, parts={**_REQUEST, "block": with_the_start}, share=3),
    _kind("writers", 201, parts={"one": apart, "two": apart, "three": apart}, share=3),
    _kind("left-over", 201, parts={**_REQUEST, "late": never}, share=2),
    # scopes and savepoints
    _kind("scope", 201, parts={"own": apart, **_REQUEST}, share=3),
    _kind("scope-refused", 409, parts={"own": apart, **_REQUEST}, share=3),
    _kind("scope-fails", 201, parts={"own": never, **_REQUEST}, share=2),
    _kind("savepoint", 201, parts={"undone": never, **_REQUEST}, share=3),
    # callbacks and background tasks
    _kind("callback", 201, parts={**_REQUEST, "called": with_the_end}, share=3),
    _kind(
        "callback-refused", 409, parts={**_REQUEST, "told": with_an_error, "called": never}, share=3
    ),
    _kind("callback-fails", 201, parts={**_REQUEST, "called": never}, share=2),
    _kind("background", 201, parts={**_REQUEST, "background": afterwards}, share=3),
    _kind("background-fails", 201, parts={**_REQUEST, "background": never}, share=2),
    _kind("background-refused", 409, parts={**_REQUEST, "background": never}, share=2),
    # bodies
    _kind("body", 200, parts={**_REQUEST, "body": with_the_end}, share=3),
    _kind("body-of-length", 200, parts={**_REQUEST, "body": with_the_end}, share=3),
    _kind("body-breaks", 200, parts={**_REQUEST, "body": never}, breaks=True, share=3),
    _kind("endless", 200, parts={**_REQUEST, "body": never}, breaks=True, endless=True, share=2),
    _kind("cursor", 200, parts={"request": with_the_end}, body=_EXPORT, share=3),
    _kind("cursor-breaks", 200, parts={"request": never}, breaks=True, share=2),
    # time limits of the application
    _kind("limited", 201, OVERDUE, parts=_REQUEST, query={"limit": 0.03}, share=4),
    _kind("limited-by-anyio", 201, OVERDUE, parts=_REQUEST, query={"limit": 0.03}, share=4),
    _kind("limited-statement", OVERDUE, parts=_REQUEST, query={"limit": 0.03}, share=2),
    _kind(
        *("limited-savepoint", 201, 500),
        parts={**_REQUEST, "tried": perhaps},
        query={"limit": 0.03},
        share=4,
    ),
    # `def` endpoints
    _kind("sync/core", 201, parts=_REQUEST, share=3),
    _kind("sync/orm", 201, parts=_REQUEST, share=3),
    _kind("sync/refused", 409, parts=_REQUEST, share=2),
    _kind("sync/crash", 500, parts=_REQUEST, share=2),
    _kind("sync/scope", 409, parts={"own": apart, **_REQUEST}, share=2),
    _kind("sync/savepoint", 201, parts={"undone": never, **_REQUEST}, share=2),
    _kind("sync/callback", 201, parts={**_REQUEST, "called": with_the_end}, share=2),
)


def _where_constraints_are_deferred() -> list[Kind]:
    refused = {"request": never}
    return [
        _kind("commit-fails", 409, parts=refused, share=3),
        _kind("commit-fails-in-body", 200, parts={"body": never}, breaks=True, share=2),
        _kind("sync/commit-fails", 409, parts=refused, share=2),
    ]


def _where_databases_differ(backend: str) -> list[Kind]:
    # PostgreSQL aborts the transaction; the others undo the statement.
    aborts = backend == "postgresql"
    # SQLite has one writer at a time.
    refuses = backend == "sqlite"
    return [
        _kind("swallowed", 500 if aborts else 201, parts=_REQUEST, share=3),
        _kind(
            *("both", 500 if refuses else 201, BUSY),
            parts={**_REQUEST, "second": with_the_start},
            share=3,
        ),
        _kind(
            *("scope-inside", 500 if refuses else 201),
            parts={"own": never if refuses else apart, **_REQUEST},
            share=3,
        ),
    ]


def kinds_of(backend: str) -> list[Kind]:
    """The kinds of requests to an application on this database: "sqlite", for instance."""
    deferred = [] if backend == "mysql" else _where_constraints_are_deferred()
    return [*_EVERYWHERE, *deferred, *_where_databases_differ(backend)]
