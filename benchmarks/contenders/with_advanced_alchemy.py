"""Advanced Alchemy: its extension for FastAPI, and the dependency `provide_session()`.

https://advanced-alchemy.litestar.dev/latest/usage/frameworks/fastapi.html
"""

from typing import Annotated, Any

from advanced_alchemy.extensions.fastapi import (
    AdvancedAlchemy,
    AsyncSessionConfig,
    EngineConfig,
    SQLAlchemyAsyncConfig,
)
from fastapi import Depends
from sqlalchemy.ext.asyncio import AsyncSession

from benchmarks import hosts, work
from benchmarks.work import Answer


def fastapi(url: str, engine_kwargs: dict[str, Any]) -> hosts.ASGIApp:
    """In FastAPI."""
    config = SQLAlchemyAsyncConfig(
        connection_string=url,
        engine_config=EngineConfig(**engine_kwargs),
        session_config=AsyncSessionConfig(expire_on_commit=False),
        commit_mode="autocommit",
    )
    alchemy = AdvancedAlchemy(config=config)
    Session = Annotated[AsyncSession, Depends(alchemy.provide_session())]  # noqa: N806

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

    app = hosts.fastapi(hosts.Endpoints(nothing, select, insert, mixed, service))
    alchemy.init_app(app)
    return app  # type: ignore[no-any-return]
