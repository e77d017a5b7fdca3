"""The tables."""

from typing import Any

from sqlalchemy import Dialect, ForeignKeyConstraint, String, Text
from sqlalchemy.orm import Mapped, mapped_column

from repom.models import Base


class Article(Base):
    """An article, hidden from readers until it is published."""

    __tablename__ = "articles"

    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str] = mapped_column(String(200))
    body: Mapped[str] = mapped_column(Text)
    published: Mapped[bool] = mapped_column(default=False)


# PostgreSQL and SQLite can check a foreign key at COMMIT. MySQL knows no such thing, and refuses
# the words for it.
CHECKS_AT_COMMIT = ("postgresql", "sqlite")


def _at_commit(*args: Any, dialect: Dialect, **kwargs: Any) -> bool:
    return dialect.name in CHECKS_AT_COMMIT


def _at_once(*args: Any, dialect: Dialect, **kwargs: Any) -> bool:
    return dialect.name not in CHECKS_AT_COMMIT


class Notification(Base):
    """What the subscribers were told about an article."""

    __tablename__ = "notifications"
    __table_args__ = (
        ForeignKeyConstraint(
            ["article_id"],
            ["articles.id"],
            name="fk_notifications_article_at_commit",
            deferrable=True,
            initially="DEFERRED",
        ).ddl_if(callable_=_at_commit),
        ForeignKeyConstraint(
            ["article_id"],
            ["articles.id"],
            name="fk_notifications_article",
        ).ddl_if(callable_=_at_once),
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    article_id: Mapped[int]
    text: Mapped[str] = mapped_column(String(300))
