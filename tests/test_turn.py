"""Taking turns."""

import asyncio

import pytest

from repom.turn import Turn


async def take(turn: Turn, log: list[str], name: str) -> None:
    await turn.take()
    log.append(name)
    try:
        await asyncio.sleep(0)
    finally:
        turn.leave()


async def test_one_after_the_other_in_the_order_they_came() -> None:
    """Also those that come while others wait."""
    turn, log = Turn(), list[str]()
    await turn.take()
    waiting = [asyncio.create_task(take(turn, log, name)) for name in "abc"]
    await asyncio.sleep(0)
    turn.leave()  # to a, who does not run before the next turn of the loop
    waiting.append(asyncio.create_task(take(turn, log, "d")))
    await asyncio.gather(*waiting)
    assert log == ["a", "b", "c", "d"]


async def test_nobody_who_waits_costs_nothing() -> None:
    """It is taken without giving others a turn."""
    turn = Turn()
    with pytest.raises(StopIteration):
        turn.take().send(None)
    turn.leave()
    with pytest.raises(StopIteration):
        turn.take().send(None)


async def test_who_is_cancelled_while_waiting_is_passed_over() -> None:
    turn, log = Turn(), list[str]()
    await turn.take()
    first, second = (asyncio.create_task(take(turn, log, name)) for name in "ab")
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.wait([first])
    turn.leave()
    await second
    assert (first.cancelled(), log) == (True, ["b"])


async def test_who_is_cancelled_in_the_moment_it_gets_it_gives_it_on() -> None:
    turn, log = Turn(), list[str]()
    await turn.take()
    first, second = (asyncio.create_task(take(turn, log, name)) for name in "ab")
    await asyncio.sleep(0)
    turn.leave()
    first.cancel()
    await asyncio.wait([first, second])
    assert (first.cancelled(), log) == (True, ["b"])
    await take(turn, log, "c")
    assert log == ["b", "c"]
