"""The rest of a body that was not read, where the connection closes after the answer: it is taken, and dropped.

Closed with unread bytes, a socket answers further ones by a reset, at which the client's kernel throws away the answer,
too: a client that sends 5 MB and `Connection: close` never saw the 413. Where a connection is kept, uvicorn reads on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from contextlib import suppress

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from membership.base.timing import UNREAD_S

MOST_BYTES = 64 << 20


class Unread:
    """An application whose answers reach clients that still send."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request; where the connection closes, once the client has said all, or too much, or for too long."""
        if scope["type"] != "http" or not closes(scope["http_version"], scope["headers"]):
            await self._app(scope, receive, send)
            return
        body = _Body(receive, comes=not any(name == b"expect" for name, _ in scope["headers"]))

        async def send_last(message: Message) -> None:
            if message["type"] == "http.response.start":
                await body.drop()
            await send(message)

        await self._app(scope, body.receive, send_last)


def closes(http_version: str, headers: Iterable[tuple[bytes, bytes]]) -> bool:
    """Whether a connection ends with the answer."""
    return http_version == "1.0" or any(name == b"connection" and b"close" in value.lower() for name, value in headers)


class _Body:
    """`comes`: by itself. Who waits for a 100 gets an answer without one, unless the body was asked for."""

    def __init__(self, receive: Receive, *, comes: bool) -> None:
        self._receive = receive
        self._more = comes

    async def receive(self) -> Message:
        message = await self._receive()
        self._more = message["type"] == "http.request" and bool(message.get("more_body"))
        return message

    async def drop(self) -> None:
        left = MOST_BYTES
        with suppress(TimeoutError):
            async with asyncio.timeout(UNREAD_S):
                while self._more and left > 0:
                    left -= len((await self.receive()).get("body", b""))
