"""fastapi-async-sqlalchemy: its middleware, and `db.session`.

https://github.com/h0rn3t/fastapi-async-sqlalchemy
"""

from typing import Any

from fastapi_async_sqlalchemy import SQLAlchemyMiddleware, db

from benchmarks import hosts, work
from benchmarks.work import Answer


async def nothing(key: int) -> Answer:
    return {"id": key}


async def select(key: int) -> Answer:
    return await work.select_one(db.session, key)


async def insert(key: int) -> Answer:
    return await work.insert_one(db.session, key)


async def mixed(key: int) -> Answer:
    return await work.ten_mixed(db.session, key)


async def service(key: int) -> Answer:
    for _ in range(work.CALLS):
        item = await work.get(db.session, key)
    return {"id": item.id, "name": item.name}


def fastapi(url: str, engine_kwargs: dict[str, Any]) -> hosts.ASGIApp:
    """In FastAPI."""
    app = hosts.fastapi(hosts.Endpoints(nothing, select, insert, mixed, service))
    app.add_middleware(
        SQLAlchemyMiddleware, db_url=url, engine_args=engine_kwargs, commit_on_exit=True
    )
    return app  # type: ignore[no-any-return]
