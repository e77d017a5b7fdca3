"""An application with the usual kinds of endpoints."""

import asyncio
from typing import Annotated

from fastapi import BackgroundTasks, Depends, FastAPI, HTTPException, WebSocket
from fastapi.responses import StreamingResponse
from sqlalchemy import ForeignKeyConstraint, String, insert, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Mapped, Session, mapped_column
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from repom import (
    atomic,
    current_session,
    current_sync_session,
    get_database,
    on_commit,
    session_scope,
)
from repom.async_session import get_async_db_session
from repom.middleware import DatabaseSessionMiddleware
from repom.models import Base
from repom.session import get_db_session


class User(Base):
    __tablename__ = "users"
    id: Mapped[int] = mapped_column(primary_key=True)
    email: Mapped[str] = mapped_column(String(100), unique=True)


class Order(Base):
    """Its user may be added after it, where the database has deferred constraints."""

    __tablename__ = "orders"
    __table_args__ = (
        ForeignKeyConstraint(
            ["user_id"], ["users.id"], deferrable=True, initially="DEFERRED"
        ).ddl_if(callable_=lambda *_, dialect, **__: dialect.name in ("postgresql", "sqlite")),
    )
    id: Mapped[int] = mapped_column(primary_key=True)
    user_id: Mapped[int]


kind = get_database().url.get_backend_name()
sessions = get_database().sessionmaker
sync_sessions = get_database().sync_sessionmaker

app = FastAPI()
app.add_middleware(DatabaseSessionMiddleware)
committed: list[str] = []


@app.exception_handler(IntegrityError)
async def conflict(request: Request, error: Exception) -> Response:
    return JSONResponse({"detail": "conflict"}, 409)


@app.post("/users", status_code=201)
async def create(email: str) -> dict[str, object]:
    user = User(email=email)
    current_session().add(user)
    await current_session().flush()
    on_commit(lambda: committed.append(email))
    return user.to_dict()


@app.get("/users")
async def emails() -> list[str]:
    return list(await current_session().scalars(select(User.email).order_by(User.email)))


@app.post("/users/failing")
async def create_and_fail(email: str) -> None:
    await create(email)
    raise HTTPException(400)


@app.post("/users/crashing")
async def create_and_crash(email: str) -> None:
    await create(email)
    raise LookupError(email)


@app.post("/users/depends")
async def create_by_dependency(
    email: str, session: Annotated[AsyncSession, Depends(get_async_db_session)]
) -> None:
    session.add(User(email=email))


@app.post("/users/sync")
def create_sync(email: str) -> list[str]:
    current_sync_session().add(User(email=email))
    return list(current_sync_session().scalars(select(User.email).order_by(User.email)))


@app.post("/users/sync/depends")
def create_sync_by_dependency(
    email: str, session: Annotated[Session, Depends(get_db_session)]
) -> None:
    session.add(User(email=email))


@app.post("/users/background")
async def create_in_background(email: str, tasks: BackgroundTasks) -> None:
    tasks.add_task(create, email)


@app.post("/users/slow")
async def create_slowly(email: str) -> None:
    await create(email)
    for _ in range(5):
        await asyncio.sleep(0.01)
    await current_session().execute(select(User))


@app.post("/users/audited")
async def create_audited(email: str, fails: bool = False) -> None:
    """An independent unit of work inside of that of the request."""
    await emails()
    async with session_scope() as session:
        session.add(User(email=f"audit of {email}"))
    current_session().add(User(email=email))
    if fails:
        raise HTTPException(400)


@app.post("/users/nested")
async def create_nested(email: str) -> None:
    await create(email)
    try:
        async with atomic():
            await create(f"{email} again")
            await create(email)
    except IntegrityError:
        await create(f"{email} after")


@app.get("/users/stream")
async def stream() -> StreamingResponse:
    rows = await current_session().stream(select(User.email).order_by(User.email))
    return StreamingResponse(f"{row.email}\n" async for row in rows)


@app.post("/orders")
async def order(user_id: int) -> None:
    current_session().add(Order(user_id=user_id))


@app.post("/swallowed")
async def swallowed(email: str) -> None:
    """The error of the database is swallowed."""
    await create(email)
    try:
        await current_session().execute(insert(User).values(email=email))
    except IntegrityError:
        return


@app.websocket("/ws")
async def talk(websocket: WebSocket) -> None:
    await websocket.accept()
    async with session_scope():
        await create(await websocket.receive_text())
    await websocket.send_text("created")
    await websocket.close()
