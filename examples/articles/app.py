"""The application, put together."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse
from sqlalchemy.exc import IntegrityError

from examples.articles import outside, routes, trouble
from examples.articles.service import ArticleNotFoundError
from repom import get_database
from repom.errors import TransactionAbortedError
from repom.middleware import DatabaseSessionMiddleware
from repom.models import Base

PAGE = Path(__file__).with_name("index.html")


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Make the tables that are missing."""
    await get_database().create_all(Base.metadata)
    yield


app = FastAPI(title="Articles", lifespan=lifespan)
app.add_middleware(DatabaseSessionMiddleware)
app.include_router(routes.router)
app.include_router(trouble.router)
app.include_router(outside.router)


@app.get("/", include_in_schema=False)
async def page() -> FileResponse:
    """The page for people."""
    return FileResponse(PAGE)


@app.exception_handler(ArticleNotFoundError)
async def answer_not_found(request: Request, error: ArticleNotFoundError) -> JSONResponse:
    """404, whichever layer missed the article."""
    return JSONResponse({"detail": str(error)}, status_code=404)


# The same for an INSERT that is refused at once and for one that COMMIT refuses.
@app.exception_handler(IntegrityError)
@app.exception_handler(TransactionAbortedError)
async def answer_conflict(request: Request, error: Exception) -> JSONResponse:
    """409: the database did not take it, and nothing was kept."""
    detail = f"the database refused it, and nothing was kept ({type(error).__name__})"
    return JSONResponse({"detail": detail}, status_code=409)
