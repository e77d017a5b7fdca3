"""`atomic()`, as a decorator and as a block.

These files are checked by mypy --strict and pyright (`make lint`), and not run.
"""

# pyright: reportUnnecessaryTypeIgnoreComment=true

from collections.abc import Callable, Coroutine
from typing import Any, assert_type

from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from repom import Database, atomic


@atomic()
async def transfer(a: int, b: int, *, amount: float = 1.0) -> str:
    return f"{a} {b} {amount}"


@atomic("reports", durable=True)
def transfer_sync(a: int, b: int, *, amount: float = 1.0) -> str:
    return f"{a} {b} {amount}"


class Accounts:
    @atomic()
    async def open(self, name: str) -> int:
        return len(name)

    @staticmethod
    @atomic()
    def close(number: int) -> None: ...


async def calls(accounts: Accounts) -> None:
    assert_type(await transfer(1, 2), str)
    assert_type(transfer_sync(1, 2), str)
    assert_type(await accounts.open("a"), int)
    accounts.close(1)


async def blocks(database: Database) -> None:
    async with atomic() as session:
        assert_type(session, AsyncSession)
    async with atomic(database) as session:
        assert_type(session, AsyncSession)
    with atomic() as sync_session:
        assert_type(sync_session, Session)


def takes_the_function(function: Callable[[int, int], Coroutine[Any, Any, str]]) -> None: ...


takes_the_function(transfer)

# --- refused


async def wrong_arguments(accounts: Accounts) -> None:
    await transfer("1", 2)  # type: ignore[arg-type]
    await transfer(1)  # type: ignore[call-arg]
    await transfer(1, 2, sum=3)  # type: ignore[call-arg]
    transfer_sync(1, 2, amount="all")  # type: ignore[arg-type]
    await transfer_sync(1, 2)  # type: ignore[misc]
    await accounts.open(1)  # type: ignore[arg-type]


@atomic  # type: ignore[arg-type]
async def without_parentheses() -> None: ...
