"""A request that can be given to the application once more, as long as nothing speaks against it.

What the client has sent is kept, up to a limit, and given again from its beginning. What the
application has changed in the ASGI scope is put back.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from importlib import import_module
from typing import Any

from repom.middleware.exchange import SCOPE_KEY
from repom.middleware.policy import Message, Receive, Scope, Send

#: Frameworks whose own middlewares are around repom's, and have objects of theirs in the ASGI
#: scope by then; and the module that knows how to put those back.
_OWN_STATE = {"litestar_app": "repom.middleware.litestar"}


class RepeatableRequest:
    """One request of a client, whoever is asked to serve it, and how often.

    Args:
        asgi_scope: the request. Each attempt finds it as it is now. It stays the same object, in
            which the layers outside look for the route, for instance.
        receive: of the server.
        send: of the server.
        body_limit: bytes of the body that are kept.

    Attributes:
        obstacle: why the request cannot be repeated; None if it can.
        is_gone: whether the client is.
    """

    def __init__(self, asgi_scope: Scope, receive: Receive, send: Send, *, body_limit: int) -> None:
        self.obstacle: str | None = None
        self.is_gone = False
        self.restore = _restoring(asgi_scope)
        self._receive = receive
        self._send = send
        self._limit = body_limit
        self._bytes = 0
        self._has_all = False
        #: The messages of the body, in order; None for those that nobody will ask for again.
        self._kept: list[Message | None] = []
        #: A task that an attempt has left behind may still wait for a message.
        self._turn = asyncio.Lock()

    async def send(self, message: Message) -> None:
        """The `send` of every attempt."""
        self.block("a part of its response has been sent")  # also if the server refuses it
        await self._send(message)

    def block(self, why: str) -> None:
        """From now on the request cannot be repeated."""
        self.obstacle = self.obstacle or why

    async def pause(self, seconds: float) -> None:
        """Wait; less if the client leaves meanwhile.

        That is noticed if the body was read. What comes is the body otherwise, for which it is up
        to the app to ask.
        """
        if not self._has_all:
            await asyncio.sleep(seconds)
            return
        try:
            async with asyncio.timeout(seconds) as limit:
                while not self.is_gone:
                    await self.read(len(self._kept))
                    await asyncio.sleep(0)  # whatever a server without manners sends
        except TimeoutError:
            if not limit.expired():
                raise

    # --- what the client sends

    def message(self, number: int) -> Message | None:
        """The message of that number, from 0; None if it has not been read yet."""
        if number >= len(self._kept):
            return None
        message = self._kept[number]
        assert message is not None
        if self.obstacle is not None:  # so there will be no other attempt
            self._kept[number] = None
        return {**message}

    async def read(self, number: int) -> None:
        """Wait until the message of that number has been read, or the client is gone."""
        async with self._turn:
            if number < len(self._kept) or self.is_gone:
                return  # another task has read it
            message = await self._receive()
            if message["type"] != "http.request":
                self.is_gone = True
                self.block("the client is gone")
                return
            self._kept.append(message)
            self._has_all = not message.get("more_body", False)
            self._bytes += len(message.get("body") or b"")
            if self._bytes > self._limit:
                self.block(f"its body has more than {self._limit} bytes")


class Reading:
    """The `receive` of one attempt.

    Args:
        request: what is read, from its beginning.

    Attributes:
        is_over: whether the attempt is. What its tasks still read they must not take from the
            next one.
    """

    def __init__(self, request: RepeatableRequest) -> None:
        self.is_over = False
        self._request = request
        self._next = 0

    async def __call__(self) -> Message:
        request = self._request
        while not self.is_over:
            message = request.message(self._next)
            if message is not None:
                self._next += 1
                return message
            if request.is_gone:
                break
            await request.read(self._next)
        return {"type": "http.disconnect"}


def _restoring(asgi_scope: Scope) -> Callable[[], None]:
    """What gives the ASGI scope its present content back."""
    saved = {key: copied(value) for key, value in asgi_scope.items() if key != SCOPE_KEY}
    # Of the request alone, though the lifespan may have filled it: servers give a copy
    # (https://asgi.readthedocs.io/en/latest/specs/lifespan.html#lifespan-state).
    state = asgi_scope.get("state")
    restore_own = [
        import_module(module).restoring(asgi_scope)
        for key, module in _OWN_STATE.items()
        if key in asgi_scope
    ]

    def restore() -> None:
        asgi_scope.clear()
        asgi_scope.update({key: copied(value) for key, value in saved.items()})
        if isinstance(state, dict):
            state.clear()
            state.update(saved["state"])
            asgi_scope["state"] = state
        for each in restore_own:
            each()

    return restore


def copied(value: Any) -> Any:
    """What layers change in place, the list of headers for instance, is not shared by attempts."""
    return value.copy() if type(value) in (dict, list) else value
