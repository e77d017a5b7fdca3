"""What some servers and many applications put around an application: impatience.

uvicorn lets an application run on when its client has gone. Others cancel it, and so do
time-outs around it. A cancellation may come at any `await`, and more than once.
"""

import asyncio

from tests.soak.kinds import OVERDUE
from tests.support.protocol import ASGIApp, Message, Receive, Scope, Send

#: Headers of a request: the seconds that its response may take, and how often it is cancelled
#: when its client has gone.
LIMIT, WHEN_GONE = "x-limit", "x-when-gone"


def impatient(app: ASGIApp) -> ASGIApp:
    """`app`, cancelled as its requests ask for."""

    async def outermost(scope: Scope, receive: Receive, send: Send) -> None:
        headers = {name.decode(): value.decode() for name, value in scope.get("headers", ())}
        if LIMIT in headers:
            await _limited(app, float(headers[LIMIT]), scope, receive, send)
        elif WHEN_GONE in headers:
            await _cancelled_when_gone(app, int(headers[WHEN_GONE]), scope, receive, send)
        else:
            await app(scope, receive, send)

    return outermost


async def _limited(app: ASGIApp, limit: float, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer for an application whose response has not started when its time is over."""
    started = False

    async def watching_send(message: Message) -> None:
        nonlocal started
        started = True
        await send(message)
        if _completes(message) and not time_left.expired():
            time_left.reschedule(None)

    try:
        async with asyncio.timeout(limit) as time_left:
            await app(scope, receive, watching_send)
    # Up to Python 3.12 a TaskGroup can leave the task cancelled, and then it stays a cancellation.
    except (TimeoutError, asyncio.CancelledError):
        if not time_left.expired():
            raise
        if not started:
            await send({"type": "http.response.start", "status": OVERDUE, "headers": []})
            await send({"type": "http.response.body"})


async def _cancelled_when_gone(
    app: ASGIApp, times: int, scope: Scope, receive: Receive, send: Send
) -> None:
    """Cancel the application as soon as its client has gone."""
    inbox: asyncio.Queue[Message] = asyncio.Queue()
    complete = False

    async def watching_send(message: Message) -> None:
        nonlocal complete
        await send(message)
        complete = complete or _completes(message)

    async def watch() -> None:
        message: Message = {"type": ""}
        while message["type"] != "http.disconnect":
            message = await receive()
            inbox.put_nowait(message)
        # Servers say this after a complete response, too.
        for _ in range(0 if complete else times):
            working.cancel()
            await asyncio.sleep(0.001)

    async def work() -> None:
        await app(scope, inbox.get, watching_send)

    working = asyncio.create_task(work())
    watching = asyncio.create_task(watch())
    await asyncio.wait([working])
    watching.cancel()
    await asyncio.wait([watching])
    if not working.cancelled():
        working.result()


def _completes(message: Message) -> bool:
    return message["type"] == "http.response.body" and not message.get("more_body", False)
