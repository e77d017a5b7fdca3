"""Many clients that increment one counter, so that most of their transactions lose conflicts.

Each increment reads the number and writes the next one. Lost updates, commits that the client has
heard of as errors, and requests that were served twice all make the counter wrong.
"""

import asyncio
from collections import Counter as Tally
from collections.abc import Sequence
from typing import Any, NamedTuple

from sqlalchemy import select, update
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from repom import current_scope, current_session
from repom.database import Database
from repom.middleware import DatabaseSessionMiddleware
from tests.support.asgi import ASGIApp, request
from tests.support.reader import execute, rows

ATTEMPT = "x-attempt"


class Base(DeclarativeBase):
    pass


class Counter(Base):
    __tablename__ = "counter"
    id: Mapped[int] = mapped_column(primary_key=True)
    value: Mapped[int]


def create_counter(url: str) -> None:
    execute(url, "CREATE TABLE counter (id INTEGER PRIMARY KEY, value INTEGER NOT NULL)")
    execute(url, "INSERT INTO counter VALUES (1, 0)")


def count(url: str) -> int:
    """The counter, as it is committed."""
    ((value,),) = rows(url, "SELECT value FROM counter")
    return int(value)


def counting_app(database: Database, *, locks: bool = False, **options: Any) -> ASGIApp:
    """An application with `POST /`, which increments.

    Args:
        locks: whether it reads the counter for update, where the isolation level allows that
            another transaction changes it before this one does.
        options: of the middleware.
    """
    query = select(Counter.value).where(Counter.id == 1)
    if locks:
        query = query.with_for_update()

    async def increment(request: Request) -> Response:
        read = await current_session().scalar(query)
        assert read is not None
        await current_session().execute(update(Counter).values(value=read + 1))
        return Response(status_code=201, headers={ATTEMPT: str(current_scope().attempt)})

    app = Starlette(routes=[Route("/", increment, methods=["POST"])])
    app.add_middleware(DatabaseSessionMiddleware, database, **options)
    return app


class Outcome(NamedTuple):
    """What the clients were told.

    Attributes:
        statuses: how often each; 500 for what no application has answered.
        attempts: how many requests have taken so many attempts.
    """

    statuses: Tally[int]
    attempts: Tally[int]

    @property
    def successes(self) -> int:
        return sum(times for status, times in self.statuses.items() if 200 <= status < 300)


async def increments(apps: Sequence[ASGIApp], *, times: int, clients: int) -> Outcome:
    """Let so many clients, each of one of the apps, send so many requests all in all."""
    outcome = Outcome(Tally(), Tally())
    numbers = iter(range(times))

    async def client(app: ASGIApp) -> None:
        for _ in numbers:
            response = await request(app, "POST")
            outcome.statuses[response.status or 500] += 1
            attempt = response.header(ATTEMPT)
            if attempt is not None:
                outcome.attempts[int(attempt)] += 1

    await asyncio.gather(*(client(apps[number % len(apps)]) for number in range(clients)))
    return outcome
