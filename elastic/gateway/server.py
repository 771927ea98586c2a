"""One port: uvicorn on a bound socket, with a limit of connections that no client can use up for the others.

A connection whose client owes something (half a header, half a body, the next request) gives way to a new one when the
port is full, the one that owes longest first. If all of them wait for us, a few more are let in: probes and metrics get
their answer there, other requests a 503. What is not accepted waits in the backlog; so descriptors never run out here,
and those of the engine link, the store and the other port are left alone.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import structlog
import uvicorn
from starlette.types import ASGIApp

from elastic.gateway.connection import Connection, Patience, Place
from elastic.gateway.http import error_response
from elastic.gateway.target import MAX_HEADER_BYTES, Plain, plain_path
from elastic.gateway.unread import Unread
from elastic.serve.listening import BACKLOG, OVERFLOW
from elastic.serve.tls import Certificates
from membership.base.errors import RequestError

ACCEPT_RETRY_S = 0.2
REPORT_EVERY_S = 10.0
ROOM_TIMEOUT_S = 1.0

log = structlog.get_logger(__name__)


class Guest(Protocol):
    """A connection, or what is to become one."""

    def drop(self) -> None:
        """Make room for another one."""


class Door:
    """The connections of one port. Each tells what it is about (see `Place` in connection.py)."""

    def __init__(self, most: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._most = most
        self._clock = clock
        self._open: set[Guest] = set()
        self._owing: dict[Guest, None] = {}  # the one that owes longest is first
        self._left = asyncio.Event()
        self._reported_at, self._unreported = -REPORT_EVERY_S, 0

    async def room(self) -> None:
        """Return once there is room for one more, or after a second."""
        if len(self._open) >= self._most + OVERFLOW:
            self._left.clear()
            async with asyncio.timeout(ROOM_TIMEOUT_S):
                await self._left.wait()

    def entered(self, connection: Guest) -> bool:
        """Let it in; another one leaves if the port is full. False: none could, so only for what is urgent."""
        self._open.add(connection)
        if len(self._open) > self._most and (longest := next(iter(self._owing), None)):
            self.left(longest)
            longest.drop()
        return len(self._open) <= self._most

    def left(self, connection: Guest) -> None:
        """Its place is free."""
        self._open.discard(connection)
        self._owing.pop(connection, None)
        self._left.set()

    def owing(self, connection: Guest, owes: bool) -> None:
        """It may be dropped, or not."""
        if not owes:
            self._owing.pop(connection, None)
        elif connection in self._open:
            self._owing.setdefault(connection)

    def drop_owing(self) -> None:
        """End those that have not asked for anything yet."""
        for connection in list(self._owing):
            connection.drop()

    def report(self, error: OSError) -> None:
        """Log that a connection could not be accepted, once per period."""
        self._unreported += 1
        now = self._clock()
        if now - self._reported_at >= REPORT_EVERY_S:
            log.warning("accept_failed", error=str(error), times=self._unreported, connections=len(self._open))
            self._reported_at, self._unreported = now, 0


class Handshake:
    """A connection until its TLS handshake is done. It owes something all the while, so it gives way to others.

    Beside the loop that accepts: a client that is slow here delays no other one.
    """

    def __init__(self, door: Door, accepted: socket.socket) -> None:
        self._door, self._accepted = door, accepted
        self._begun = False
        self._task: asyncio.Task[None] | None = None

    def begin(self, connection: Callable[[Place], Connection], context: ssl.SSLContext, timeout_s: float) -> None:
        """Start it; it ends by itself."""
        self._task = asyncio.create_task(self._run(connection, context, timeout_s), name="handshake")
        self._task.add_done_callback(self._ended)
        self._door.entered(self)
        self._door.owing(self, True)

    def drop(self) -> None:
        """Make room for another connection."""
        if self._task is not None:
            self._task.cancel()

    def entered(self, connection: Connection) -> bool:
        """It has become a connection."""
        self._door.left(self)
        return self._door.entered(connection)

    def left(self, connection: Connection) -> None:
        """That connection is closed."""
        self._door.left(connection)

    def owing(self, connection: Connection, owes: bool) -> None:
        """See `Place`."""
        self._door.owing(connection, owes)

    async def _run(self, connection: Callable[[Place], Connection], context: ssl.SSLContext, timeout_s: float) -> None:
        self._begun = True
        loop = asyncio.get_running_loop()
        try:
            await loop.connect_accepted_socket(
                partial(connection, self), self._accepted, ssl=context, ssl_handshake_timeout=timeout_s
            )
        except OSError as error:  # no TLS, a certificate that is not good, a client that went away or is too slow
            log.debug("handshake_failed", error=str(error))

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._door.left(self)
        if not self._begun:
            self._accepted.close()


class Server(uvicorn.Server):
    """uvicorn on a socket that is bound already, leaving signals to the role. `urgent`: paths answered when crowded."""

    def __init__(
        self,
        app: ASGIApp,
        bound: socket.socket,
        grace_s: float,
        most: int,
        *,
        urgent: frozenset[str] = frozenset(),
        patience: Patience | None = None,
        certificates: Certificates | None = None,
    ) -> None:
        """`certificates`: for TLS."""
        self._bound = bound
        self._door = Door(most)
        self._urgent = urgent
        self._patience = patience or Patience()
        self._certificates = certificates
        self._accepting: asyncio.Task[None] | None = None
        config = uvicorn.Config(
            Unread(Plain(app)),
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="error",  # its warnings are about what clients send: they could fill the disk with them
            access_log=False,
            server_header=False,
            h11_max_incomplete_event_size=MAX_HEADER_BYTES,
            timeout_keep_alive=int(self._patience.idle_s),
            timeout_graceful_shutdown=int(grace_s) + 1,
        )
        super().__init__(config)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to accept connections."""
        await super().startup(sockets=[])
        self._bound.setblocking(False)
        self._bound.listen(BACKLOG)
        self._accepting = asyncio.create_task(self._accept(), name="accept")

    async def on_tick(self, counter: int) -> bool:
        """Also fail when connections are accepted no more."""
        if self._accepting is not None and self._accepting.done():
            await self._accepting
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept no more, and let those that are there end."""
        if self._accepting is not None:
            self._accepting.cancel()
            await asyncio.gather(self._accepting, return_exceptions=True)
        self._door.drop_owing()
        await super().shutdown([self._bound])

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """The role handles signals."""
        yield

    async def _accept(self) -> None:
        """One connection at a time: what is read from those that are there comes between."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                await self._door.room()
                accepted, _ = await loop.sock_accept(self._bound)
                if self._certificates is None:
                    await loop.connect_accepted_socket(partial(self._connection, self._door), accepted)
                else:
                    Handshake(self._door, accepted).begin(
                        self._connection, self._certificates.context(), self._patience.header_s
                    )
            except TimeoutError:
                continue  # still full
            except OSError as error:
                self._door.report(error)
                await asyncio.sleep(ACCEPT_RETRY_S)

    def _connection(self, place: Place) -> Connection:
        return Connection(
            place, self._patience, self._when_crowded,
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state,
        )  # fmt: skip

    async def _when_crowded(self, scope: Any, receive: Any, send: Any) -> None:
        answer: ASGIApp = self.config.loaded_app
        if plain_path(scope["path"]) not in self._urgent:
            full = RequestError("all connections are in use", status=503, code="overloaded", retry_after_s=1.0)
            answer = error_response(full, {"Connection": "close"})
        await answer(scope, receive, send)
