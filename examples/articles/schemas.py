"""What the API takes and gives."""

from typing import Annotated

from pydantic import BaseModel, StringConstraints

# PostgreSQL stores no NUL, and MySQL no TEXT of more than 65,535 bytes.
NO_NUL = r"^[^\x00]*$"
Title = Annotated[
    str, StringConstraints(strip_whitespace=True, min_length=1, max_length=200, pattern=NO_NUL)
]
Body = Annotated[str, StringConstraints(max_length=10_000, pattern=NO_NUL)]


class ArticleIn(BaseModel):
    """A new article."""

    title: Title
    body: Body = ""


class ArticleOut(BaseModel):
    """An article, as the API shows it."""

    id: int
    title: str
    body: str
    published: bool
