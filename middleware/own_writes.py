"""A client that has written reads its own writes: what it has written comes along with it.

The token tells positions in the log of the writer, and nothing else. Whoever makes one up reads
from the writer, or what is there anyway.
"""

from __future__ import annotations

import math
import re
import time
from typing import Literal

from repom.middleware.policy import Message, Scope, Send
from repom.own_writes import OwnWrites

#: How the token gets to the client and back.
CarriedBy = Literal["cookie", "header"]

COOKIE = "repom_written"
HEADER = b"repom-written"

#: Seconds that a browser keeps it at least; longer where a reader may be further behind.
MAX_AGE = 300

# `key:position` in hexadecimal, or `key@time`; several, for as many databases, with dots between.
_PART = re.compile(r"([0-9a-f]{8})([:@])([0-9a-f]{1,16})")
#: How many databases it names at most, those that were written last, and its length then.
_MOST = 40
_LONGEST = _MOST * 26
#: Seconds: nobody sends the server to the writer for longer.
_FURTHEST = 86_400


def token(own: OwnWrites) -> str:
    """What the client is to bring along."""
    now = time.time()
    until = {key: f"{key}@{int(now + left):x}" for key, left in own.seconds_left().items()}
    positions = {key: f"{key}:{position:x}" for key, position in own.positions.items()}
    return ".".join(list((positions | until).values())[-_MOST:])


def own_writes_of(value: str) -> OwnWrites:
    """What a token says; nothing, if it is none."""
    own = OwnWrites()
    if len(value) > _LONGEST:
        return own
    for part in value.split("."):
        found = _PART.fullmatch(part)
        if found is None:
            continue
        key, kind, number = found[1], found[2], int(found[3], 16)
        if kind == ":":
            own.positions[key] = number
        elif (left := number - time.time()) <= _FURTHEST:
            own.require_writer(key, left)
    return own


def sent_with(asgi_scope: Scope, by: CarriedBy) -> OwnWrites:
    """What the client of a request has written before."""
    name = HEADER if by == "header" else b"cookie"
    for found, value in asgi_scope.get("headers", ()):
        if found == name:
            text = value.decode("latin-1")
            sent = text if by == "header" else _in_cookies(text)
            if sent is not None:
                return own_writes_of(sent)
    return OwnWrites()


def telling(own: OwnWrites, asgi_scope: Scope, send: Send, by: CarriedBy) -> Send:
    """A `send` that adds the token to a response, if the request has written."""

    async def send_with_token(message: Message) -> None:
        if message["type"] == "http.response.start" and own.is_unlocated:
            await own.locate()
            header = _header(own, asgi_scope, by)
            message = {**message, "headers": [*message.get("headers", ()), header]}
        await send(message)

    return send_with_token


def _header(own: OwnWrites, asgi_scope: Scope, by: CarriedBy) -> tuple[bytes, bytes]:
    value = token(own)
    if by == "header":
        return HEADER, value.encode()
    age = math.ceil(max(MAX_AGE, own.window))
    secure = "; Secure" if asgi_scope.get("scheme") == "https" else ""
    cookie = f"{COOKIE}={value}; Max-Age={age}; Path=/; HttpOnly; SameSite=Lax{secure}"
    return b"set-cookie", cookie.encode()


def _in_cookies(text: str) -> str | None:
    if f"{COOKIE}=" not in text:
        return None
    for pair in text.split(";"):
        name, _, value = pair.strip().partition("=")
        if name == COOKIE:
            return value
    return None
