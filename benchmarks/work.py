"""What the endpoints do with their session: the same statements for every contender."""

from sqlalchemy import delete, func, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from benchmarks.models import Item

Answer = dict[str, object]

#: How often the case `service` asks for its session.
CALLS = 20


async def select_one(session: AsyncSession, key: int) -> Answer:
    """One SELECT by key."""
    item = (await session.scalars(select(Item).where(Item.id == key))).one()
    return {"id": item.id, "name": item.name}


async def insert_one(session: AsyncSession, key: int) -> Answer:
    """One INSERT, whose new id is in the answer."""
    item = Item(name=f"new {key}")
    session.add(item)
    await session.flush()
    return {"id": item.id, "name": item.name}


async def ten_mixed(session: AsyncSession, key: int) -> Answer:
    """Ten statements: an INSERT, five SELECTs by key, a range, an UPDATE, a count, a DELETE."""
    new = await insert_one(session, key)
    for nearby in range(key, key + 5):
        await select_one(session, nearby)
    here = Item.id.between(key, key + 9)
    names = (await session.scalars(select(Item.name).where(here))).all()
    await session.execute(update(Item).where(Item.id == key).values(name=f"item {key}"))
    count = await session.scalar(select(func.count()).where(here))
    await session.execute(delete(Item).where(Item.id == new["id"]))
    return {"names": len(names), "count": count}


async def get(session: AsyncSession, key: int) -> Item:
    """What a repository does. The first call loads the row; then the session has it."""
    return await session.get_one(Item, key)
