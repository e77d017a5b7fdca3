"""How articles are found and kept: the only layer that asks for a session."""

from collections.abc import Sequence

from sqlalchemy import select

from examples.articles.models import Article, Notification
from repom import current_session


async def add(article: Article | Notification) -> None:
    """Write it; its id is known then. It is kept if the request succeeds."""
    session = current_session()
    session.add(article)
    await session.flush()


async def find(article_id: int) -> Article | None:
    """The article of that id."""
    return await current_session().get(Article, article_id)


async def find_for_change(article_id: int) -> Article | None:
    """The article of that id, locked until the transaction ends."""
    return await current_session().get(Article, article_id, with_for_update=True)


async def every() -> Sequence[Article]:
    """All articles, the oldest first."""
    return (await current_session().scalars(select(Article).order_by(Article.id))).all()
