"""A server that waits with the start of a response until there is something of its body."""

import asyncio

from tests.support.protocol import ASGIApp, Message, Receive, Scope, Send


class PatientServer:
    """Stands before `app` as the servers do that keep to ASGI by the letter.

    They send `http.response.start` with the first message of the body
    (https://asgi.readthedocs.io/en/latest/specs/www.html#response-start-send-event). If the
    application ends before that, they answer with 500. Each message takes a turn of the loop.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start: Message | None = None
        is_started = False

        async def receive_slowly() -> Message:
            await asyncio.sleep(0)
            return await receive()

        async def send_with_body(message: Message) -> None:
            nonlocal start, is_started
            if message["type"] == "http.response.start":
                start = message
            else:
                if not is_started and start is not None:
                    is_started = True
                    await send(start)
                await send(message)
            await asyncio.sleep(0)

        try:
            await self._app(scope, receive_slowly, send_with_body)
        finally:
            if not is_started:
                await send({"type": "http.response.start", "status": 500})
                await send({"type": "http.response.body"})
