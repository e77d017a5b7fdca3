"""What the database holds, as somebody else sees it.

Read by the sync driver on a connection of its own, which no request has ever used for writing:
it sees what is committed and nothing else.
"""

from typing import Any

from fastapi import APIRouter
from sqlalchemy import select

from examples.articles import events
from examples.articles.trouble import how_commit_fails
from repom import get_database
from repom.models import Base

router = APIRouter(tags=["demo"])

NAMES = {"sqlite": "SQLite", "postgresql": "PostgreSQL", "mysql": "MySQL", "mariadb": "MariaDB"}


@router.get("/database")
def read_from_outside() -> dict[str, Any]:
    """The rows of all tables, and what has been announced."""
    engine = get_database().engine
    rows = {}
    with engine.connect() as connection:
        for table in Base.metadata.sorted_tables:
            found = connection.execute(select(table).order_by(table.c.id)).mappings()
            rows[table.name] = [dict(row) for row in found]
    dialect = engine.dialect
    name = "mariadb" if getattr(dialect, "is_mariadb", False) else dialect.name
    return {
        "database": NAMES.get(name, name),
        "read_by": dialect.driver,
        "how_commit_fails": how_commit_fails(),
        "announced": list(events.announced),
        **rows,
    }
