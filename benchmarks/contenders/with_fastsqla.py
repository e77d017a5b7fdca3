"""FastSQLA: its lifespan, and the dependency `Session`.

https://github.com/hadrien/FastSQLA
"""

import logging
from typing import Any

import structlog
from fastsqla import Session, new_lifespan

from benchmarks import hosts, work
from benchmarks.work import Answer

# structlog prints everything unless it is told otherwise. In production it is.
structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))


async def nothing(key: int) -> Answer:
    return {"id": key}


async def select(key: int, session: Session) -> Answer:
    return await work.select_one(session, key)


async def insert(key: int, session: Session) -> Answer:
    return await work.insert_one(session, key)


async def mixed(key: int, session: Session) -> Answer:
    return await work.ten_mixed(session, key)


async def service(key: int, session: Session) -> Answer:
    for _ in range(work.CALLS):
        item = await work.get(session, key)
    return {"id": item.id, "name": item.name}


def fastapi(url: str, engine_kwargs: dict[str, Any]) -> hosts.ASGIApp:
    """In FastAPI."""
    endpoints = hosts.Endpoints(nothing, select, insert, mixed, service)
    app: hosts.ASGIApp = hosts.fastapi(endpoints, lifespan=new_lifespan(url, **engine_kwargs))
    return app
