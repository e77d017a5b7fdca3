"""The one table of the benchmarks."""

from sqlalchemy import String
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

#: Rows that are there from the start, with the ids 1 to ROWS.
ROWS = 1000


class Base(DeclarativeBase):
    """Of the benchmarks alone: the peers know nothing of repom's."""


class Item(Base):
    """A row."""

    __tablename__ = "items"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(50))
