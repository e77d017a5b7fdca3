"""The application of a soak: an endpoint for each of `kinds.py`."""

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator
from typing import Any

import anyio
from fastapi import BackgroundTasks, Depends, FastAPI, HTTPException, Request
from fastapi.responses import (
    JSONResponse,
    PlainTextResponse,
    RedirectResponse,
    Response,
    StreamingResponse,
)
from sqlalchemy import func, insert, select, text, update
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from repom import (
    Database,
    atomic,
    current_scope,
    current_session,
    current_sync_session,
    is_conflict,
    on_commit,
    on_rollback,
    session_scope,
    sync_session_scope,
)
from repom.async_session import get_async_db_session
from repom.errors import ScopeClosedError
from repom.middleware import DatabaseSessionMiddleware
from repom.session import get_db_session
from tests.soak.kinds import BUSY, OVERDUE
from tests.soak.tables import NOWHERE, ROWS, Account, Ballast, Counter, Entry, Transfer, backend
from tests.support.polling import until

#: A statement that takes longer than any time limit here.
SLOW = {
    "postgresql": "SELECT pg_sleep(0.2)",
    "mysql": "SELECT sleep(0.2)",
    "sqlite": "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 500000)"
    " SELECT count(*) FROM n",
}


class PlannedError(Exception):
    """What an endpoint raises on purpose."""


async def write(number: int, part: str = "request", session: AsyncSession | None = None) -> None:
    """Do the work of one transaction, statement by statement."""
    for row in range(ROWS):
        await write_one(number, part, row, session)


async def write_one(
    number: int, part: str, row: int, session: AsyncSession | None = None, **values: Any
) -> None:
    session = current_session() if session is None else session
    await session.execute(insert(Entry).values(request=number, part=part, number=row, **values))


def write_sync(number: int, part: str = "request") -> None:
    for row in range(ROWS):
        current_sync_session().execute(insert(Entry).values(request=number, part=part, number=row))


def entries(number: int, part: str = "request") -> list[Entry]:
    return [Entry(request=number, part=part, number=row) for row in range(ROWS)]


# --- answers to errors --------------------------------------------------------------------------


async def conflict(request: Request, error: Exception) -> Response:
    return JSONResponse({"detail": "conflict"}, 409)


async def busy(request: Request, error: Exception) -> Response:
    return PlainTextResponse("pool", BUSY)


async def deadlock_is_busy(request: Request, error: Exception) -> Response:
    if not is_conflict(error):
        raise error
    return PlainTextResponse("deadlock", BUSY)


def app_for(url: str) -> FastAPI:
    """The application at `url`, on a small pool."""
    small = {"pool_size": 5, "max_overflow": 3}
    narrow = {"pool_size": 1, "max_overflow": 0, "pool_timeout": 0.05}
    databases = {
        "default": Database(url, engine_kwargs=small),
        "narrow": Database(url, engine_kwargs=narrow),
    }
    app = FastAPI(
        exception_handlers={
            IntegrityError: conflict,
            PoolTimeout: busy,
            DBAPIError: deadlock_is_busy,
        }
    )
    app.add_middleware(DatabaseSessionMiddleware, databases)
    app.state.databases = databases
    _add_successes(app)
    _add_readers(app)
    _add_errors(app)
    _add_tasks(app)
    _add_scopes(app)
    _add_what_comes_later(app)
    _add_bodies(app)
    _add_time_limits(app, SLOW[backend(url)])
    _add_sync_endpoints(app)
    return app


# --- successes ----------------------------------------------------------------------------------


def _add_successes(app: FastAPI) -> None:
    @app.post("/core/{number}", status_code=201)
    async def core(number: int) -> None:
        await write(number)

    @app.post("/orm/{number}", status_code=201)
    async def orm(number: int) -> list[int]:
        current_session().add_all(found := entries(number))
        await current_session().flush()
        return [entry.id for entry in found]

    @app.post("/dependency/{number}", status_code=201)
    async def dependency(
        number: int, session: AsyncSession = Depends(get_async_db_session)
    ) -> None:
        session.add_all(entries(number))  # flushed by the COMMIT

    @app.post("/loop/{number}", status_code=201)
    async def loop(number: int) -> int:
        async for session in get_async_db_session():
            await write(number, session=session)
            return number
        raise AssertionError

    @app.post("/redirect/{number}")
    async def redirect(number: int) -> Response:
        await write(number)
        return RedirectResponse("/nothing/0", 303)

    @app.post("/empty/{number}", status_code=204)
    async def empty(number: int) -> None:
        await write(number)

    @app.post("/upload/{number}", status_code=201)
    async def upload(number: int, request: Request) -> int:
        await write(number)  # before it is known whether the body arrives at all
        return len(await request.body())

    @app.post("/slow/{number}", status_code=201)
    async def slow(number: int, pause: float) -> None:
        await asyncio.sleep(pause)
        await write_one(number, "request", 0)
        await asyncio.sleep(pause / 2)  # with the transaction open
        for row in range(1, ROWS):
            await write_one(number, "request", row)

    @app.post("/early/{number}")
    async def early(number: int) -> None:
        await write(number, "early")
        await current_scope().commit()
        await write(number)
        raise HTTPException(502)

    @app.post("/dry/{number}")
    async def dry(number: int) -> None:
        await write(number)
        current_scope().rollback_only()

    @app.post("/transfer/{number}", status_code=201)
    async def transfer(number: int, source: int, target: int, amount: int) -> None:
        session = current_session()
        for id_, change in ((source, -amount), (target, amount)):
            statement = update(Account).where(Account.id == id_)
            await session.execute(statement.values(balance=Account.balance + change))
        session.add(Transfer(source=source, target=target, amount=amount))
        await write(number)

    @app.post("/count/{number}", status_code=201)
    async def count(number: int) -> None:
        counter = await current_session().get_one(Counter, 1, with_for_update=True)
        await write(number, "count")
        counter.value += 1


# --- readers ------------------------------------------------------------------------------------


async def total() -> str:
    return str(await current_session().scalar(select(func.sum(Account.balance))))


async def all_of_ballast() -> AsyncIterator[str]:
    found = await current_session().stream_scalars(
        select(Ballast.text).order_by(Ballast.id), execution_options={"yield_per": 50}
    )
    return (row async for row in found)


def _add_readers(app: FastAPI) -> None:
    @app.get("/total/{number}")
    async def one_total(number: int) -> Response:
        return PlainTextResponse(await total())

    @app.get("/totals/{number}")
    async def totals(number: int) -> Response:
        return PlainTextResponse("".join(await asyncio.gather(total(), total(), total())))

    @app.get("/export/{number}")
    async def export(number: int) -> Response:
        return StreamingResponse(await all_of_ballast())

    @app.get("/nothing/{number}")
    async def nothing(number: int) -> None:
        """Uses no database."""


# --- errors -------------------------------------------------------------------------------------


def _add_errors(app: FastAPI) -> None:
    @app.post("/refused/{status}/{number}")
    async def refused(status: int, number: int) -> None:
        await write(number)
        raise HTTPException(status)

    @app.post("/returns/{status}/{number}")
    async def returns(status: int, number: int) -> Response:
        await write(number)
        return Response(status_code=status)

    @app.post("/crash/{number}")
    async def crash(number: int) -> None:
        await write(number)
        raise PlannedError

    @app.post("/duplicate/{number}", status_code=201)
    async def duplicate(number: int) -> None:
        await write(number)
        await write_one(number, "request", 0)

    @app.post("/swallowed/{number}", status_code=201)
    async def swallowed(number: int) -> None:
        await write(number)
        with contextlib.suppress(IntegrityError):
            await write_one(number, "request", 0)

    @app.post("/swallowed-flush/{number}", status_code=201)
    async def swallowed_flush(number: int) -> None:
        await write(number)
        current_session().add(Entry(request=number, part="request", number=0))
        with contextlib.suppress(IntegrityError):
            await current_session().flush()

    @app.post("/commits-itself/{number}")
    async def commits_itself(number: int) -> None:
        await write(number)
        await current_session().commit()  # a flush
        raise HTTPException(409)

    @app.post("/narrow/{number}", status_code=201)
    async def narrow(number: int) -> None:
        await write(number, session=current_session("narrow"))

    @app.post("/both/{number}", status_code=201)
    async def both(number: int) -> None:
        await write(number)
        await write(number, "second", session=current_session("narrow"))

    @app.post("/commit-fails/{number}", status_code=201)
    async def commit_fails(number: int) -> None:
        await write(number)
        await write_one(number, "request", ROWS, parent=NOWHERE)

    @app.post("/commit-fails-in-body/{number}")
    async def commit_fails_in_body(number: int) -> Response:
        async def body() -> AsyncIterator[str]:
            yield "x"
            await write(number, "body")
            await write_one(number, "body", ROWS, parent=NOWHERE)

        return StreamingResponse(body())


# --- several tasks ------------------------------------------------------------------------------


@atomic()
async def write_in_a_block(number: int, part: str) -> None:
    await write(number, part)


async def fail_in_a_moment() -> None:
    await current_session().execute(select(Counter.value))
    raise PlannedError


def _add_tasks(app: FastAPI) -> None:
    @app.post("/group/{number}", status_code=201)
    async def group(number: int) -> None:
        async with asyncio.TaskGroup() as tasks:
            for row in range(ROWS):
                tasks.create_task(write_one(number, "request", row))

    @app.post("/group-fails/{number}")
    async def group_fails(number: int) -> None:
        async with asyncio.TaskGroup() as tasks:
            for row in range(ROWS):
                tasks.create_task(write_one(number, "request", row))
            tasks.create_task(fail_in_a_moment())

    @app.post("/gather-fails/{number}")
    async def gather_fails(number: int) -> None:
        # What has not got its turn when the request ends is refused.
        writing = [write_one(number, "request", row) for row in range(ROWS)]
        await asyncio.gather(fail_in_a_moment(), *writing, write_in_a_block(number, "block"))

    @app.post("/writers/{number}", status_code=201)
    async def writers(number: int) -> None:
        async def in_a_scope(part: str) -> None:
            async with session_scope():
                await write(number, part)

        await asyncio.gather(*map(in_a_scope, ("one", "two", "three")))

    @app.post("/left-over/{number}", status_code=201)
    async def left_over(number: int, request: Request) -> None:
        async def late() -> None:
            await until(lambda: not scope.is_open)
            with contextlib.suppress(ScopeClosedError):
                await write(number, "late")
            async with atomic():
                await write(number, "late")

        scope = current_scope()
        await write(number)
        task = asyncio.create_task(late())
        app.state.left_over.add(task)
        task.add_done_callback(app.state.left_over.discard)
        task.add_done_callback(lambda task: task.cancelled() or task.exception())

    app.state.left_over = set()


# --- scopes and savepoints ----------------------------------------------------------------------


def _add_scopes(app: FastAPI) -> None:
    @app.post("/scope/{number}", status_code=201)
    async def scope(number: int) -> None:
        async with session_scope():
            await write(number, "own")
        await write(number)

    @app.post("/scope-refused/{number}")
    async def scope_refused(number: int) -> None:
        async with session_scope():
            await write(number, "own")
        await write(number)
        raise HTTPException(409)

    @app.post("/scope-fails/{number}", status_code=201)
    async def scope_fails(number: int) -> None:
        with contextlib.suppress(PlannedError):
            async with session_scope():
                await write(number, "own")
                raise PlannedError
        await write(number)

    # Each of these has two connections at a time. If all in the pool were the first of one,
    # nobody would get a second.
    pairs = asyncio.Semaphore(6)

    @app.post("/scope-inside/{number}", status_code=201)
    async def scope_inside(number: int) -> None:
        async with pairs:
            await write(number)
            async with session_scope():
                await write(number, "own")

    @app.post("/savepoint/{number}", status_code=201)
    async def savepoint(number: int) -> None:
        await write_one(number, "request", 0)
        with contextlib.suppress(IntegrityError):
            async with atomic():
                await write(number, "undone")
                await write_one(number, "request", 0)
        async with atomic():
            for row in range(1, ROWS):
                await write_one(number, "request", row)


# --- what comes later ---------------------------------------------------------------------------


def _add_what_comes_later(app: FastAPI) -> None:
    @app.post("/callback/{number}", status_code=201)
    async def callback(number: int) -> None:
        await write(number)
        on_commit(functools.partial(write, number, "called"))

    @app.post("/callback-refused/{number}")
    async def callback_refused(number: int) -> None:
        await write(number)
        on_commit(functools.partial(write, number, "called"))
        on_rollback(functools.partial(write, number, "told"))
        raise HTTPException(409)

    @app.post("/callback-fails/{number}", status_code=201)
    async def callback_fails(number: int) -> None:
        await write(number)
        on_commit(functools.partial(write_and_fail, number, "called"))

    @app.post("/background/{number}", status_code=201)
    async def background(number: int, tasks: BackgroundTasks) -> None:
        await write(number)
        tasks.add_task(write, number, "background")

    @app.post("/background-fails/{number}", status_code=201)
    async def background_fails(number: int, tasks: BackgroundTasks) -> None:
        await write(number)
        tasks.add_task(write_and_fail, number, "background")

    @app.post("/background-refused/{number}", status_code=409)
    async def background_refused(number: int, tasks: BackgroundTasks) -> None:
        await write(number)
        tasks.add_task(write, number, "background")


async def write_and_fail(number: int, part: str) -> None:
    await write(number, part)
    raise PlannedError


# --- bodies -------------------------------------------------------------------------------------


async def writing_body(number: int) -> AsyncIterator[bytes]:
    for row in range(ROWS):
        await write_one(number, "body", row)
        yield b"x" * 100


async def breaking_body(number: int) -> AsyncIterator[bytes]:
    async for part in writing_body(number):
        yield part
    raise PlannedError


async def endless_body(number: int) -> AsyncIterator[bytes]:
    await write(number, "body")
    while True:
        yield b"x" * 10_000
        await asyncio.sleep(0.001)


def _add_bodies(app: FastAPI) -> None:
    @app.post("/body/{number}")
    async def body(number: int) -> Response:
        await write(number)
        return StreamingResponse(writing_body(number))

    @app.post("/body-of-length/{number}")
    async def body_of_length(number: int) -> Response:
        await write(number)
        length = str(ROWS * 100)
        return StreamingResponse(writing_body(number), headers={"content-length": length})

    @app.post("/body-breaks/{number}")
    async def body_breaks(number: int) -> Response:
        await write(number)
        return StreamingResponse(breaking_body(number))

    @app.post("/endless/{number}")
    async def endless(number: int) -> Response:
        await write(number)
        return StreamingResponse(endless_body(number))

    @app.post("/cursor/{number}")
    async def cursor(number: int) -> Response:
        await write(number)
        return StreamingResponse(await all_of_ballast())

    @app.post("/cursor-breaks/{number}")
    async def cursor_breaks(number: int) -> Response:
        await write(number)
        found = await all_of_ballast()

        async def body() -> AsyncIterator[str]:
            yield await anext(found)
            raise PlannedError

        return StreamingResponse(body())


# --- time limits --------------------------------------------------------------------------------


def _add_time_limits(app: FastAPI, slow: str) -> None:
    @app.post("/limited/{number}", status_code=201)
    async def limited(number: int, limit: float) -> None:
        try:
            async with asyncio.timeout(limit):
                await write(number)
        except TimeoutError:
            raise HTTPException(OVERDUE) from None

    @app.post("/limited-by-anyio/{number}", status_code=201)
    async def limited_by_anyio(number: int, limit: float) -> None:
        with anyio.move_on_after(limit) as scope:
            await write(number)
        if scope.cancelled_caught:
            raise HTTPException(OVERDUE)

    @app.post("/limited-statement/{number}")
    async def limited_statement(number: int, limit: float) -> None:
        try:
            async with asyncio.timeout(limit):
                await write(number)
                await current_session().execute(text(slow))
        except TimeoutError:
            raise HTTPException(OVERDUE) from None

    @app.post("/limited-savepoint/{number}", status_code=201)
    async def limited_savepoint(number: int, limit: float) -> None:
        await write(number)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit), atomic():
                await write(number, "tried")


# --- `def` endpoints ----------------------------------------------------------------------------


def _add_sync_endpoints(app: FastAPI) -> None:
    @app.post("/sync/core/{number}", status_code=201)
    def core(number: int) -> None:
        write_sync(number)

    @app.post("/sync/orm/{number}", status_code=201)
    def orm(number: int, session: Session = Depends(get_db_session)) -> None:
        session.add_all(entries(number))

    @app.post("/sync/refused/{number}")
    def refused(number: int) -> None:
        write_sync(number)
        raise HTTPException(409)

    @app.post("/sync/crash/{number}")
    def crash(number: int) -> None:
        write_sync(number)
        raise PlannedError

    @app.post("/sync/scope/{number}")
    def scope(number: int) -> None:
        with sync_session_scope():
            write_sync(number, "own")
        write_sync(number)
        raise HTTPException(409)

    @app.post("/sync/savepoint/{number}", status_code=201)
    def savepoint(number: int) -> None:
        write_sync(number)
        with contextlib.suppress(IntegrityError), atomic():
            write_sync(number, "undone")
            write_sync(number)

    @app.post("/sync/callback/{number}", status_code=201)
    def callback(number: int) -> None:
        write_sync(number)
        on_commit(functools.partial(write_sync, number, "called"))

    @app.post("/sync/commit-fails/{number}", status_code=201)
    def commit_fails(number: int) -> None:
        write_sync(number)
        current_sync_session().execute(
            insert(Entry).values(request=number, part="request", number=ROWS, parent=NOWHERE)
        )
