"""A COMMIT that failed is answered by the application's own error handling.

Starlette and Litestar publish their exception handlers in the ASGI scope. Others apply theirs
only to what is raised inside of them. There a hook of the application, from
`repom.middleware.<framework>`, raises the failure, when the application is called for it a
second time.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, NoReturn, cast

from repom.middleware.policy import ASGIApp, Message, Receive, Scope, Send

#: What a framework has in its ASGI scope, and the module that lets its handlers answer.
_PUBLISHED = {
    "starlette.exception_handlers": "repom.middleware.starlette",
    "litestar_app": "repom.middleware.litestar",
}

#: In the ASGI scope: None when a hook is there, the failure when it has to be raised.
_KEY = "repom.failed_commit"


#: Raises what COMMIT raised. Not the error itself: its traceback would lead to every frame that
#: holds it, and the request would wait for the garbage collector.
RaiseError = Callable[[], NoReturn]


async def answer(
    raise_error: RaiseError, app: ASGIApp, asgi_scope: Scope, receive: Receive, send: Send
) -> None:
    """Let the application answer for its failed COMMIT, if its error handling can be reached.

    Args:
        app: what the middleware wraps.
        asgi_scope: the request, as the application has left it.
        receive: of the request.
        send: refuses a response that would not tell of an error.

    Raises:
        Exception: what COMMIT raised, if the application has no handler for it; what the
            handler, or sending its response, raised.
    """
    published = [key for key in asgi_scope if key in _PUBLISHED]
    if published:
        module = import_module(_PUBLISHED[published[-1]])  # of the innermost application
        await module.answer(raise_error, asgi_scope, receive, send)
    elif _KEY in asgi_scope:
        await _call_again(raise_error, app, asgi_scope, receive, send)


def is_second_call(asgi_scope: Any) -> bool:
    """What a hook asks for each request, which says that it is there: whether to raise."""
    return cast(Scope, asgi_scope).setdefault(_KEY, None) is not None


def raise_for(asgi_scope: Any) -> None:
    """What a hook does for each request.

    Raises:
        Exception: what COMMIT raised, in the call that is made for it.
    """
    if is_second_call(asgi_scope):
        asgi_scope[_KEY].has_reached_hook = True
        asgi_scope[_KEY].raise_error()


class _SecondCall:
    """The call of the application in which its hook raises what COMMIT raised."""

    def __init__(self, raise_error: RaiseError, receive: Receive, send: Send) -> None:
        self.raise_error = raise_error
        self.has_reached_hook = False
        self._receive = receive
        self._send = send
        self._has_body = True

    async def receive(self) -> Message:
        """An empty body: the first call has read what there was, and apps wait for its end."""
        if self._has_body:
            self._has_body = False
            return {"type": "http.request", "body": b"", "more_body": False}
        while (message := await self._receive())["type"] == "http.request":
            continue  # what the first call has not read
        return message

    async def send(self, message: Message) -> None:
        """Send an answer to the failure, and to nothing else.

        Without the hook it is one to another question: that there is no such path, because an
        outer application has changed it.
        """
        if not self.has_reached_hook:
            self.raise_error()
        await self._send(message)


async def _call_again(
    raise_error: RaiseError, app: ASGIApp, asgi_scope: Scope, receive: Receive, send: Send
) -> None:
    call = _SecondCall(raise_error, receive, send)
    asgi_scope[_KEY] = call
    try:
        await app(asgi_scope, call.receive, call.send)
    finally:
        del asgi_scope[_KEY]
