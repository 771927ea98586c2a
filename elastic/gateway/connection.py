"""One client's connection: uvicorn's, with a deadline for what the client owes, and an answer after a half-close.

uvicorn times idle connections only: half a header could stay for ever. And it drops a client that has said all it has
to say (`shutdown(SHUT_WR)`) together with its answer.
"""

from __future__ import annotations

import asyncio
import http
import socket
import sys
from dataclasses import dataclass
from typing import Any, Protocol

import h11
import msgspec
from uvicorn.protocols.http.h11_impl import H11Protocol

from elastic.gateway.http import PARTS, SILENCE
from elastic.gateway.render import error_body
from membership.base.errors import RequestError
from membership.base.timing import HEADER_TIMEOUT_S, IDLE_TIMEOUT_S, SEND_TIMEOUT_S

FIRST_LOOK_S, LAST_LOOK_S = 0.02, 2.5  # at a client that has half-closed: is it still there? Each later than the last
CERTIFIED = "certified"  # in a request's state: the client has shown a certificate that we trust
DROP = "drop"  # in a request's state: what ends its connection at once
INTERIM = b"HTTP/1.1 100 Continue\r\n\r\n"


@dataclass(frozen=True)
class Patience:
    """How long a client may take."""

    header_s: float = HEADER_TIMEOUT_S
    idle_s: float = IDLE_TIMEOUT_S
    send_s: float = SEND_TIMEOUT_S


class Place(Protocol):
    """What a connection tells the port that it came through."""

    def entered(self, connection: Connection) -> bool:
        """It is open. False: only for what is urgent."""

    def left(self, connection: Connection) -> None:
        """It is closed."""

    def owing(self, connection: Connection, owes: bool) -> None:
        """Whether the client has to send something next: it may be asked to leave then."""


class Connection(H11Protocol):
    """`crowded`: answers instead of the application where there is no more place."""

    def __init__(self, place: Place, patience: Patience, crowded: Any, **uvicorn: Any) -> None:
        super().__init__(**uvicorn)
        self._place, self._patience, self._crowded = place, patience, crowded
        self._deadline: asyncio.TimerHandle | None = None  # of the header
        self._look: asyncio.TimerHandle | None = None  # at a client that has half-closed
        self._half_closed = self._closed = self._encrypted = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client has connected."""
        super().connection_made(transport)  # type: ignore[arg-type]
        self._encrypted = transport.get_extra_info("sslcontext") is not None
        known = {CERTIFIED: True} if transport.get_extra_info("peercert") else {}
        self.app_state = {**self.app_state, DROP: self.drop, PARTS: self, **known}
        peer = transport.get_extra_info("socket")
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(self._patience.send_s * 1000))
        if not self._place.entered(self):
            self.app = self._crowded
        self._await_header()

    def data_received(self, data: bytes) -> None:
        """Part of a request, or several requests."""
        super().data_received(data)
        self._await_header()

    def on_response_complete(self) -> None:
        """The client has its answer; a pipelined request may be under way already."""
        super().on_response_complete()
        if self._half_closed and not self._answering:
            self.transport.close()
        self._tell()

    def connection_lost(self, exc: Exception | None) -> None:
        """The end, from whichever side."""
        self._closed = True
        for timer in (self._deadline, self._look):
            if timer is not None:
                timer.cancel()
        self._place.left(self)
        super().connection_lost(exc)

    def eof_received(self) -> bool:  # type: ignore[override]
        """The client sends no more. Keep the connection if it waits for an answer: it may have closed one half only.

        Not with TLS, which has no half-closed connections.
        """
        if self._encrypted or not self._answering or self.conn.their_state is h11.SEND_BODY:
            return False
        if not self._half_closed:
            self._half_closed = True
            self._look_after(FIRST_LOOK_S)
        return True

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP, if an answer has not begun. uvicorn calls it while it handles h11's error."""
        error = sys.exception()
        hint = error.error_status_hint if isinstance(error, h11.RemoteProtocolError) else 400
        self.refuse(RequestError(f"{msg} {error or ''}".rstrip(), status=hint))

    def refuse(self, error: RequestError) -> None:
        """Close, with an answer if none has begun."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = msgspec.json.encode(error_body(error))
            headers = [
                ("content-type", "application/json"),
                ("content-length", str(len(body))),
                ("connection", "close"),
            ]
            head = h11.Response(status_code=error.status, headers=headers, reason=http.HTTPStatus(error.status).phrase)
            for event in (head, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event))
        self.transport.close()

    def drop(self) -> None:
        """Make room for another connection."""
        self.transport.abort()

    def takes_part(self) -> bool:
        """Whether a part of the answer's body may be written now: its head was sent, and the client reads."""
        return self.conn.our_state is h11.SEND_BODY and not (self.cycle.disconnected or self.flow.write_paused)

    def write_part(self, data: bytes) -> None:
        """Write a part of a stream at once, past all that stands between an application and its client.

        A stream has no length, so from HTTP/1.1 on it goes in chunks (RFC 9112, 7.1); h11 keeps no count of them, and
        takes 2 us for each.
        """
        chunked = self.scope["http_version"] >= "1.1"
        self.transport.write(b"%x\r\n%b\r\n" % (len(data), data) if chunked else data)

    @property
    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _tell(self) -> None:
        if self._closed:
            return
        owes = not self._answering or self.conn.their_state is h11.SEND_BODY
        self._place.owing(self, owes and not self.transport.get_write_buffer_size())  # it may be reading an answer

    def _await_header(self) -> None:
        """Something has come, or nothing yet: from now on the header of the next request is due."""
        if self._answering:
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None
        elif self._deadline is None:
            self._deadline = self.loop.call_later(self._patience.header_s, self._on_header_late)
        self._tell()

    def _on_header_late(self) -> None:
        received, _ = self.conn.trailing_data
        if self.transport.is_closing() or not received:
            self.transport.abort()
        else:
            message = f"the header did not arrive within {self._patience.header_s:g} s"
            self.refuse(RequestError(message, status=408))

    def _write_nothing(self) -> None:
        """What means nothing to a client that waits, and is answered by a reset if it has closed altogether."""
        silence = self.scope["state"].get(SILENCE)
        if not self.cycle.response_started and self.scope["http_version"] == "1.1":
            self.transport.write(INTERIM)
        elif silence and self.conn.our_state is h11.SEND_BODY:
            self.transport.write(self.conn.send(h11.Data(data=silence)))

    def _look_after(self, seconds: float) -> None:
        """A socket that is not read from does not tell its reset, so ask it now and then."""
        self._write_nothing()
        self._look = self.loop.call_later(seconds, self._on_look, min(5 * seconds, LAST_LOOK_S))

    def _on_look(self, next_s: float) -> None:
        if self.transport.is_closing():
            return
        if self.transport.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self.transport.abort()
        elif self._answering:
            self._look_after(next_s)
