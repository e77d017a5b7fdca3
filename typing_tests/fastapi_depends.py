"""`Depends`, in its two forms.

These files are checked by mypy --strict and pyright (`make lint`), and not run.
"""

# pyright: reportUnnecessaryTypeIgnoreComment=true

from typing import Annotated, assert_type

from fastapi import Depends, FastAPI
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from sqlmodel.ext.asyncio.session import AsyncSession as SQLModelAsyncSession

from repom import Database
from repom.async_session import get_async_db_session
from repom.middleware import DatabaseSessionMiddleware, commits_on_2xx
from repom.session import get_db_session, get_db_transaction

app = FastAPI()
app.add_middleware(DatabaseSessionMiddleware)
app.add_middleware(DatabaseSessionMiddleware, "sqlite://", commit_on=commits_on_2xx)
app.add_middleware(DatabaseSessionMiddleware, {"default": Database("sqlite://")})

InRequest = Annotated[AsyncSession, Depends(get_async_db_session)]
OnItsOwn = Annotated[AsyncSession, Depends(get_async_db_session, scope="function")]
Sync = Annotated[Session, Depends(get_db_session)]


@app.get("/annotated")
async def annotated(session: InRequest, own: OnItsOwn) -> None:
    assert_type(session, AsyncSession)
    assert_type(own, AsyncSession)


@app.get("/default")
async def default(session: AsyncSession = Depends(get_async_db_session)) -> None:
    assert_type(session, AsyncSession)


@app.get("/sqlmodel")
async def sqlmodel(session: SQLModelAsyncSession = Depends(get_async_db_session)) -> None:
    assert_type(session, SQLModelAsyncSession)


@app.get("/sync")
def sync(session: Sync, transaction: Session = Depends(get_db_transaction)) -> None:
    assert_type(session, Session)
    assert_type(transaction, Session)


# --- refused

app.add_middleware(DatabaseSessionMiddleware, 4711)  # type: ignore[arg-type]
app.add_middleware(DatabaseSessionMiddleware, comit_on=commits_on_2xx)  # type: ignore[call-arg]
DatabaseSessionMiddleware(app, inner_commits="never")  # type: ignore[arg-type]
DatabaseSessionMiddleware(app, commit_on=lambda status: True)  # type: ignore[arg-type,misc]
DatabaseSessionMiddleware("app")  # type: ignore[arg-type]
