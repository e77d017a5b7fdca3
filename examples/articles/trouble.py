"""Requests that write an article and then fail, each in another way. None may leave a row."""

import asyncio
import contextlib
from typing import Any

from fastapi import APIRouter, HTTPException
from sqlalchemy import insert
from sqlalchemy.exc import DBAPIError

from examples.articles import repository, service
from examples.articles.models import CHECKS_AT_COMMIT, Article, Notification
from examples.articles.schemas import ArticleIn, ArticleOut
from repom import current_scope, current_session, get_database, session_scope

router = APIRouter(prefix="/trouble", tags=["demo"])

# No generated ids: an article that cannot exist, and two notifications that both sides of the
# deadlock want to write.
NO_ARTICLE = -1
MINE, THEIRS = -1, -2
# InnoDB sacrifices the transaction that has changed less.
RIVAL_ROWS = 50
_one_deadlock = asyncio.Lock()


@router.post("/not-found")
async def not_found(article: ArticleIn) -> None:
    """Write an article, then answer 404."""
    await service.create(article.title, article.body)
    raise HTTPException(404, "not found, after the article had been written")


@router.post("/exception")
async def exception(article: ArticleIn) -> None:
    """Write an article, then raise what nobody handles."""
    await service.create(article.title, article.body)
    raise RuntimeError("provoked on the demo's page")


@router.post("/commit", response_model=ArticleOut, status_code=201)
async def commit(article: ArticleIn) -> Any:
    """Write an article and answer 201, with a transaction that cannot be committed."""
    if _checks_at_commit():
        created = await service.create(article.title, article.body)
        await repository.add(Notification(article_id=NO_ARTICLE, text="refused at COMMIT"))
    else:
        # One at a time, and locked before it has a connection: the rival needs a second one, and
        # many of them could wait for each other in more ways than a database can see.
        async with _one_deadlock:
            created = await service.create(article.title, article.body)
            await _lose_a_deadlock(created)
    return created.to_dict()


def how_commit_fails() -> str:
    """What `commit` does on this database, for the page."""
    if _checks_at_commit():
        return (
            "The request also writes a notification for an article that does not exist. "
            "The foreign key is DEFERRABLE INITIALLY DEFERRED, so the INSERT passes, the app "
            "answers 201, and COMMIT refuses everything."
        )
    return (
        "This database checks every constraint at the statement, so none can fail at COMMIT. "
        "What does happen on it: the request loses a deadlock and its code swallows the error. "
        "The server has rolled back by then, and would answer COMMIT with OK all the same."
    )


def _checks_at_commit() -> bool:
    return get_database().url.get_backend_name() in CHECKS_AT_COMMIT


async def _lose_a_deadlock(article: Article) -> None:
    """Write what a rival has written while it waits for what we have written."""
    await _write_notification(MINE, article)
    rival_has_written = asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(_rival(rival_has_written))
        await rival_has_written.wait()
        with contextlib.suppress(DBAPIError):  # the mistake that costs the article
            await _write_notification(THEIRS, article)


async def _rival(has_written: asyncio.Event) -> None:
    async with session_scope():
        article = await service.create("never kept", "")
        for number in range(RIVAL_ROWS):
            await _write_notification(THEIRS - number, article)
        has_written.set()
        await _write_notification(MINE, article)
        current_scope().rollback_only()


async def _write_notification(id_: int, article: Article) -> None:
    # Not through the session's flush: an error there ends the session's transaction for
    # SQLAlchemy too, and swallowing it would not go unnoticed.
    row = {"id": id_, "article_id": article.id, "text": "a deadlock"}
    await current_session().execute(insert(Notification), row)
