"""What the application tells the rest of the world, once it is true."""

import logging
from collections import deque

from examples.articles.models import Article
from repom import on_commit

logger = logging.getLogger("articles")

#: The latest announcements of this process: a stand-in for a message queue.
announced: deque[str] = deque(maxlen=20)


def announce(what: str, article: Article) -> None:
    """Announce it after COMMIT, and never if the work is rolled back."""
    message = f"article {article.id} {what}: {article.title}"

    def tell() -> None:
        announced.append(message)
        logger.info("announced: %s", message)

    on_commit(tell)
