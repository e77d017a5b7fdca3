"""The API."""

from typing import Annotated, Any

from fastapi import APIRouter, BackgroundTasks, Path

from examples.articles import service
from examples.articles.schemas import ArticleIn, ArticleOut

router = APIRouter(prefix="/articles", tags=["articles"])

# What the INTEGER of every database can hold.
ArticleId = Annotated[int, Path(ge=1, le=2**31 - 1)]


@router.get("", response_model=list[ArticleOut])
async def list_articles() -> Any:
    """All articles, the oldest first."""
    return [article.to_dict() for article in await service.read_all()]


@router.get("/{article_id}", response_model=ArticleOut)
async def get_article(article_id: ArticleId) -> Any:
    """One article, or 404."""
    return (await service.read(article_id)).to_dict()


@router.post("", response_model=ArticleOut, status_code=201)
async def create_article(article: ArticleIn) -> Any:
    """A new article. 201 means that it is committed."""
    return (await service.create(article.title, article.body)).to_dict()


@router.post("/{article_id}/publish", response_model=ArticleOut)
async def publish_article(article_id: ArticleId, background: BackgroundTasks) -> Any:
    """Publish it; the subscribers are notified after the response."""
    article, is_news = await service.publish(article_id)
    if is_news:
        background.add_task(service.notify_subscribers, article_id)
    return article.to_dict()
