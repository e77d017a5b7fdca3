"""fastapi-sqla: its middleware, and the dependency `AsyncSession`.

https://github.com/dialoguemd/fastapi-sqla
"""

import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import fastapi_sqla
import structlog
from fastapi import FastAPI
from fastapi_sqla import AsyncSession

from benchmarks import hosts, work
from benchmarks.work import Answer

# structlog prints everything unless it is told otherwise. In production it is.
structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """As its README has it."""
    await fastapi_sqla.startup()
    yield


async def nothing(key: int) -> Answer:
    return {"id": key}


async def select(key: int, session: AsyncSession) -> Answer:
    return await work.select_one(session, key)


async def insert(key: int, session: AsyncSession) -> Answer:
    return await work.insert_one(session, key)


async def mixed(key: int, session: AsyncSession) -> Answer:
    return await work.ten_mixed(session, key)


async def service(key: int, session: AsyncSession) -> Answer:
    for _ in range(work.CALLS):
        item = await work.get(session, key)
    return {"id": item.id, "name": item.name}


def fastapi(url: str, engine_kwargs: dict[str, Any]) -> hosts.ASGIApp:
    """In FastAPI; it is configured by the environment."""
    options = {"url": url, **engine_kwargs}
    os.environ.update({f"sqlalchemy_{key}": str(value) for key, value in options.items()})
    endpoints = hosts.Endpoints(nothing, select, insert, mixed, service)
    app = hosts.fastapi(endpoints, lifespan=lifespan)
    fastapi_sqla.setup_middlewares(app)
    return app  # type: ignore[no-any-return]
