"""The server process of a soak: the application, and a page that tells what is left behind.

    python -X dev -W error -m tests.soak.server <port> <loop> <http>

The database is that of `REPOM_DATABASE_URL`. What is expected to be logged is counted; the rest is
printed with its traceback.
"""

import asyncio
import gc
import json
import logging
import os
import re
import sys
import threading
from collections import Counter
from typing import Any

import uvicorn
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session
from starlette.requests import ClientDisconnect

from repom.database import Database
from repom.errors import TransactionAbortedError, WouldDeadlockError
from repom.scope import SessionScope
from tests.soak.app import PlannedError, app_for
from tests.soak.layers import impatient
from tests.support.protocol import ASGIApp, Receive, Scope, Send

REPORT = "/report"

_ENDPOINT = (PlannedError, IntegrityError, TransactionAbortedError, WouldDeadlockError)

#: What is logged because application and clients are as they are, with the errors that may be
#: the reason.
EXPECTED: dict[str, tuple[type[BaseException], ...]] = {
    r"Exception in ASGI application": (*_ENDPOINT, ClientDisconnect),
    r"COMMIT of POST \S+ failed": (IntegrityError, TransactionAbortedError),
    r"callback .+ of POST \S+ failed\. The transaction it waited for has ended": (PlannedError,),
    r"\d callback\(s\) of POST \S+ were not run: it was cancelled": (),
    r"POST \S+ was rolled back: rollback_only\(\) was called": (),
    r"POST \S+ was answered by an error; what it has written after that was rolled back": (),
    r"ASGI callable returned without (starting|completing) response": (),
    # asyncio: a body goes on for a moment when its client has gone,
    r"socket\.send\(\) raised exception": (),
    # and the debug mode tells of a machine that is busy.
    r"Executing <.* took \d": (),
    # asyncpg, cancelled while it connects.
    r"Future exception was never retrieved\n.*'unexpected connection_lost\(\) call'": (
        ConnectionError,
    ),
}


class Tally(logging.Handler):
    """Counts what is expected, and lets the rest be seen."""

    def __init__(self) -> None:
        super().__init__()
        self.expected: Counter[str] = Counter()
        self.unexpected = 0

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        for pattern, errors in EXPECTED.items():
            if re.match(pattern, record.getMessage()) and _is_one_of(errors, error):
                reason = f", {type(error).__name__}" if error else ""
                self.expected[pattern + reason] += 1
                return
        if record.levelno >= logging.WARNING:
            self.unexpected += 1
            print("UNEXPECTED", record.name, self.format(record), flush=True)


def _is_one_of(errors: tuple[type[BaseException], ...], error: BaseException | None) -> bool:
    if isinstance(error, BaseExceptionGroup):
        return all(_is_one_of(errors, each) for each in error.exceptions)
    return error is None or isinstance(error, errors)


def report(databases: dict[str, Database], tally: Tally) -> dict[str, Any]:
    """What there is in this process, when all that nobody holds has been collected."""
    gc.collect()
    # By type(), because isinstance() would ask proxies what they stand for.
    objects = [(type(each), each) for each in gc.get_objects()]
    scopes = [each for kind, each in objects if kind is SessionScope]
    sessions = [each for kind, each in objects if issubclass(kind, Session)]
    pools: list[Any] = []
    for database in databases.values():
        pools += [database.async_engine.pool, database.engine.pool]
    return {
        "connections checked out": sum(pool.checkedout() for pool in pools),
        "tasks": sorted(map(_name, asyncio.all_tasks())),
        "open scopes": sum(scope.is_open for scope in scopes),
        "open transactions": sum(session.in_transaction() for session in sessions),
        "scopes": len(scopes),
        "sessions": len(sessions),
        "threads": threading.active_count(),
        "objects": len(objects),
        "KiB": _resident(),
        "expected in the log": tally.expected,
        "unexpected in the log": tally.unexpected,
    }


def _name(task: "asyncio.Task[Any]") -> str:
    coroutine: Any = task.get_coro()
    name: str = coroutine.__qualname__
    return name


def _resident() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024


def reporting(app: ASGIApp, databases: dict[str, Database], tally: Tally) -> ASGIApp:
    """`app`, with a page that reports."""

    async def outermost(scope: Scope, receive: Receive, send: Send) -> None:
        if scope.get("path") != REPORT:
            await app(scope, receive, send)
            return
        body = json.dumps(report(databases, tally)).encode()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": body})

    return outermost


def main(port: str, loop: str, http: str) -> None:
    tally = Tally()
    logging.basicConfig(level=logging.INFO, handlers=[tally])
    app = app_for(os.environ["REPOM_DATABASE_URL"])
    uvicorn.run(
        reporting(impatient(app), app.state.databases, tally),
        port=int(port),
        loop=loop,
        http=http,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=5,
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
