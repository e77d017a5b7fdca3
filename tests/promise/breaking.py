"""Applications that break the protocol, each in a way of its own, with work at stake.

`BreakingApp` serves them all by name; it has to stand behind the middleware.
"""

import contextlib
from typing import Any, NamedTuple

from tests.middleware.notes import chunk, start, write
from tests.support.asgi import Message, Receive, Scope, Send

#: Not sent: here the application writes the note "<name> body".
WRITE: Message = {"type": "write"}


class Broken(NamedTuple):
    """What such an application does once it has written the note "<name> before".

    Attributes:
        steps: messages to send, `WRITE`, or an exception to raise.
        told: the status that the client gets, if any.
        committed: which of its notes.
        complete: whether the client gets the whole response.
    """

    steps: list[Any]
    told: int | None
    committed: tuple[str, ...]
    complete: bool = False


BEFORE, BODY = "before", "body"
LENGTH = (b"content-length", b"3")
PATH = {"type": "http.response.pathsend", "path": "/etc/hostname"}
TRAILERS = {"type": "http.response.trailers", "headers": []}
UNKNOWN = {"type": "http.response.nonsense"}


def more(body: bytes) -> Message:
    return chunk(body, more=True)


BROKEN: dict[str, Broken] = {
    # no response, or half of one
    "nothing": Broken([], None, ()),
    "raises-first": Broken([LookupError()], None, ()),
    "start-alone": Broken([start()], 200, (BEFORE,)),
    "raises-after-start": Broken([start(), LookupError()], 200, (BEFORE,)),
    "writes-and-raises-after-start": Broken([start(), WRITE, LookupError()], 200, (BEFORE,)),
    "raises-in-body": Broken([start(), WRITE, more(b"x"), LookupError()], 200, (BEFORE,)),
    "returns-in-body": Broken([start(), WRITE, more(b"x")], 200, (BEFORE,)),
    # what comes when it must not
    "body-first": Broken([chunk(b"x")], None, ()),
    "body-and-then-start": Broken([chunk(b"x"), start(), chunk()], None, ()),
    "start-twice": Broken([start(), WRITE, start(500), chunk()], 200, (BEFORE,)),
    "success-after-error": Broken([start(500), WRITE, start(200), chunk()], 500, ()),
    "body-after-end": Broken([start(), chunk(), WRITE, chunk(b"x")], 200, (BEFORE,), True),
    "start-after-end": Broken([start(), chunk(), WRITE, start(500)], 200, (BEFORE,), True),
    "trailers-in-body": Broken([start(), more(b"x"), WRITE, TRAILERS], 200, (BEFORE,)),
    # what is no message
    "unknown": Broken([start(), WRITE, UNKNOWN, chunk()], 200, (BEFORE,)),
    "unknown-first": Broken([UNKNOWN, start(), chunk()], None, ()),
    "no-type": Broken([{}], None, ()),
    "no-dict": Broken([None], None, ()),
    # a start that cannot be sent
    "no-status": Broken([{"type": "http.response.start"}], None, ()),
    "status-of-text": Broken([{**start(), "status": "200"}], None, ()),
    "status-of-float": Broken([start(200.0)], None, ()),  # type: ignore[arg-type]
    "line-break": Broken([start(200, (b"x-a", b"1\r\nx-b: 2")), chunk()], None, ()),
    "header-of-text": Broken([{**start(), "headers": [("x-a", "1")]}, chunk()], None, ()),
    "headers-none": Broken([{**start(), "headers": None}, chunk()], None, ()),
    "headers-in-a-dict": Broken([{**start(), "headers": {b"x-a": b"1"}}, chunk()], None, ()),
    "two-lengths": Broken([start(200, LENGTH, (b"content-length", b"4"))], None, ()),
    "length-of-letters": Broken([start(200, (b"content-length", b"three"))], None, ()),
    # a body that cannot be sent
    "body-of-text": Broken([start(), WRITE, {**chunk(), "body": "x"}], 200, (BEFORE,)),
    "too-long": Broken([start(200, LENGTH), WRITE, chunk(b"1234")], 200, (BEFORE,)),
    "too-long-at-last": Broken(
        [start(200, LENGTH), more(b"12"), WRITE, more(b"34"), chunk()], 200, (BEFORE,)
    ),
    "too-short": Broken([start(200, LENGTH), WRITE, chunk(b"12")], 200, (BEFORE,)),
    # whether the server takes it is not known before COMMIT
    "204-with-body": Broken([start(204), WRITE, chunk(b"x")], 204, (BEFORE, BODY)),
    "304-with-body": Broken([start(304), WRITE, chunk(b"x")], 304, (BEFORE, BODY)),
    "pathsend-not-offered": Broken([start(), WRITE, PATH], 200, (BEFORE, BODY)),
}


class BreakingApp:
    """Serves `/<name>`, or whatever mount that is under.

    Args:
        swallows: errors of `send()`, and goes on.
    """

    def __init__(self, *, swallows: bool = False) -> None:
        self._swallows = swallows

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        name = scope["path"].rpartition("/")[2]
        await write(f"{name} {BEFORE}")
        for step in BROKEN[name].steps:  # each send gets a dict of its own
            if step is WRITE:
                await write(f"{name} {BODY}")
            elif isinstance(step, Exception):
                raise step
            else:
                with contextlib.suppress(*[Exception, AssertionError] if self._swallows else []):
                    await send({**step} if step else step)
