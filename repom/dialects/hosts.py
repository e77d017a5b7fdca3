"""Several hosts in one URL, of which asyncpg is to find the one that is asked for.

asyncpg by itself tries them in turn and has one time limit for all: behind a first host that
answers nothing, as one does that has lost its power or its network, the others are never tried.
Here a host that is slow to answer is overtaken by the next, as in RFC 8305 ("happy eyeballs").
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, TypeVar

from sqlalchemy import URL

T = TypeVar("T")

#: Seconds that a host has to answer, before the next one is tried beside it.
HEAD_START = 0.25
#: Seconds after which a host is given up, if the application has not said how many. A whole
#: number, as libpq wants it.
TIMEOUT = 5


def has_several_hosts(url: URL, connect_args: Mapping[str, Any]) -> bool:
    """Whether the driver is to choose among hosts."""
    host = connect_args.get("host") or url.query.get("host") or ""
    return "," in host if isinstance(host, str) else len(host) > 1


async def connect_to_one(*args: Any, **kwargs: Any) -> Any:
    """`asyncpg.connect` for several hosts: the first connection that fits.

    Args:
        kwargs: those of `asyncpg.connect`. `timeout`, in seconds, is for each host.

    Raises:
        ConnectionError: no host fits; it tells why, of each.
    """
    if kwargs.get("target_session_attrs") == "prefer-standby":
        # Whether there is a standby, only who has asked all of them knows.
        try:
            return await connect_to_one(*args, **{**kwargs, "target_session_attrs": "standby"})
        except ConnectionError:
            return await connect_to_one(*args, **{**kwargs, "target_session_attrs": "any"})
    import asyncpg

    hosts, ports = _as_list(kwargs.pop("host")), _as_list(kwargs.pop("port", 5432))
    if len(ports) == 1:
        ports *= len(hosts)
    kwargs.setdefault("timeout", TIMEOUT)
    attempts = {
        f"{host}:{port}": functools.partial(asyncpg.connect, *args, host=host, port=port, **kwargs)
        for host, port in zip(hosts, ports, strict=True)
    }
    try:
        return await first_of(list(attempts.values()), _terminate)
    except ExceptionGroup as failed:
        errors = failed.exceptions
    for error in errors:
        if isinstance(error, TypeError):  # a wrong keyword in connect_args explains itself
            raise error
    told = (f"{host}: {_told(error)}" for host, error in zip(attempts, errors, strict=True))
    raise ConnectionError("; ".join(told)) from errors[-1]


def _as_list(given: str | int | Sequence[str | int]) -> list[str | int]:
    if isinstance(given, str):
        return list(given.split(","))
    return [given] if isinstance(given, int) else list(given)


async def first_of(
    attempts: Sequence[Callable[[], Coroutine[Any, Any, T]]],
    discard: Callable[[T], object],
    *,
    head_start: float = HEAD_START,
) -> T:
    """What the first attempt to succeed has returned.

    Args:
        attempts: each is begun when the one before it has failed, or is slow.
        discard: called with what succeeded too late.
        head_start: seconds after which an attempt is slow.

    Raises:
        ExceptionGroup: the errors of all attempts, in their order.
    """
    tasks: list[asyncio.Task[T]] = []
    winner: asyncio.Task[T] | None = None
    try:
        while winner is None:
            if len(tasks) < len(attempts):
                tasks.append(asyncio.create_task(attempts[len(tasks)]()))
            running = [task for task in tasks if not task.done()]
            if not running:
                raise BaseExceptionGroup("no attempt has succeeded", _errors(tasks))
            await asyncio.wait(
                running,
                timeout=head_start if len(tasks) < len(attempts) else None,
                return_when=asyncio.FIRST_COMPLETED,
            )
            winner = next((task for task in tasks if _has_succeeded(task)), None)
        return winner.result()
    finally:
        others = [task for task in tasks if task is not winner]
        for task in others:
            task.cancel()
            # Not after the wait, which may be cancelled.
            task.add_done_callback(functools.partial(_discard, discard))
        if others:
            await asyncio.wait(others)


def _has_succeeded(task: asyncio.Task[Any]) -> bool:
    return task.done() and not task.cancelled() and task.exception() is None


def _errors(tasks: Sequence[asyncio.Task[Any]]) -> list[BaseException]:
    return [error for task in tasks if (error := task.exception()) is not None]


def _discard(discard: Callable[[T], object], task: asyncio.Task[T]) -> None:
    if _has_succeeded(task):
        discard(task.result())


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")


def _terminate(connection: Any) -> None:
    connection.terminate()
