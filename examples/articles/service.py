"""What can be done with articles. No session, no COMMIT and no ROLLBACK is in sight here."""

from collections.abc import Sequence

from examples.articles import events, repository
from examples.articles.models import Article, Notification


class ArticleNotFoundError(LookupError):
    """There is no article of that id."""


async def create(title: str, body: str) -> Article:
    """Write a new article, not yet published."""
    article = Article(title=title, body=body)
    await repository.add(article)
    events.announce("created", article)
    return article


async def read(article_id: int) -> Article:
    """Find an article.

    Raises:
        ArticleNotFoundError: there is none.
    """
    return _found(await repository.find(article_id), article_id)


async def read_all() -> Sequence[Article]:
    """Find all articles."""
    return await repository.every()


async def publish(article_id: int) -> tuple[Article, bool]:
    """Publish an article; whether it was this call that did.

    Raises:
        ArticleNotFoundError: there is none.
    """
    article = _found(await repository.find_for_change(article_id), article_id)
    if article.published:
        return article, False
    article.published = True
    events.announce("published", article)
    return article, True


async def notify_subscribers(article_id: int) -> None:
    """Tell the subscribers. Runs after the response, so in a transaction of its own."""
    article = await read(article_id)
    text = f"New: {article.title}"
    await repository.add(Notification(article_id=article.id, text=text))


def _found(article: Article | None, article_id: int) -> Article:
    if article is None:
        raise ArticleNotFoundError(f"there is no article {article_id}")
    return article
