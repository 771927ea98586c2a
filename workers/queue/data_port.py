"""How a data connection (`sealed.py`) comes to be: one side listens and makes an offer, which goes to the other side
over a connection that CURVE protects; that one connects, and shows the token of the offer; the first one greets it.
Others are hung up on.

Both are done in the thread that owns the sockets of a queue or of a transport. Without such a connection (the port is
not reached, none is free, the other side is older) everything goes over ZeroMQ, as the offer does: slower, no less.
"""

from __future__ import annotations

import hmac
import os
import secrets
import socket
import time
from collections.abc import Callable
from functools import partial
from urllib.parse import urlsplit

import structlog
import zmq

from membership.base.errors import QueueClosed
from membership.base.network import ANY_PORT, Ports, bracketed, is_ipv6
from membership.base.timing import REMOTE_SILENCE_S
from workers.queue.endpoints import in_turn
from workers.queue.handle import Offer
from workers.queue.remote_wire import SocketThread
from workers.queue.sealed import SealedSocket, new_keys

TOKEN_BYTES = 16
MOST_STRANGERS = 64  # connections that have not shown a token yet
Made = Callable[[SealedSocket], None]


def _can_seal() -> bool:
    """An environment that was made for an older version goes on without: with none, or one before 47."""
    try:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM
    except ImportError:
        return False
    return hasattr(AESGCM, "encrypt_into") and hasattr(AESGCM, "decrypt_into")


CAN_SEAL = _can_seal()
log = structlog.get_logger("data-port")


class DataPort:
    """Listens. All calls come from the thread of `io`, except the first."""

    def __init__(self, io: SocketThread, address: str, ports: Ports = ANY_PORT) -> None:
        self._io = io
        self._offers: dict[bytes, tuple[Offer, Made]] = {}
        self._strangers: dict[socket.socket, float] = {}  # and until when they may stay
        self._listener = _listen(address, ports) if CAN_SEAL else None
        self._address = ""
        if self._listener is not None:
            self._listener.setblocking(False)
            host, port, *_ = self._listener.getsockname()  # no name: who takes up an offer must not wait for DNS
            self._address = f"tcp://{bracketed(host)}:{port}"
            io.watch(self._listener, self._accept)

    def offer(self, made: Made) -> Offer | None:
        """`made` gets the connection of who takes it up; None if we do not listen."""
        if self._listener is None:
            return None
        offer = Offer(self._address, secrets.token_bytes(TOKEN_BYTES), new_keys())
        self._offers[offer.token] = offer, made
        return offer

    def withdraw(self, offer: Offer | None) -> None:
        """It is void, if it was not taken up."""
        if offer is not None:
            self._offers.pop(offer.token, None)

    def look(self, now: float) -> None:
        """In each turn: who has shown no token in time is hung up on."""
        for stranger in [each for each, until in self._strangers.items() if now > until]:
            self._hang_up(stranger)

    def close(self) -> None:
        """Accept no more."""
        for stranger in list(self._strangers):
            self._hang_up(stranger)
        if self._listener is not None:
            self._io.unwatch(self._listener)
            self._listener.close()
            self._listener = None

    def _accept(self) -> None:
        if self._listener is None:
            raise zmq.Again
        try:
            stranger, _ = self._listener.accept()
        except OSError as error:  # it is gone by now, or none waits
            raise zmq.Again from error
        if len(self._strangers) >= MOST_STRANGERS:
            self._hang_up(next(iter(self._strangers)))
        stranger.setblocking(False)
        self._strangers[stranger] = time.monotonic() + REMOTE_SILENCE_S
        self._io.watch(stranger, partial(self._greeted, stranger))

    def _greeted(self, stranger: socket.socket) -> None:
        if stranger not in self._strangers:
            raise zmq.Again
        try:
            token = stranger.recv(TOKEN_BYTES)  # so few bytes come together, or not from us
        except BlockingIOError as error:
            raise zmq.Again from error
        except OSError:
            token = b""
        found = next((each for each in self._offers if hmac.compare_digest(each, token)), None)
        if found is None:
            return self._hang_up(stranger)
        offer, made = self._offers.pop(found)
        del self._strangers[stranger]
        self._io.unwatch(stranger)
        sealed = SealedSocket(stranger, offer.keys, connects=False)
        try:
            sealed.greet()
        except QueueClosed as error:
            log.info("data_connection_ended", reason=str(error))
            return sealed.close()
        made(sealed)

    def _hang_up(self, stranger: socket.socket) -> None:
        del self._strangers[stranger]
        self._io.unwatch(stranger)
        stranger.close()


class TakeUp:
    """Connects; `made` gets the connection once the other side has greeted over it. Else `failed` gets the reason.

    A port forward, or a mesh, accepts what no process takes: so the greeting counts. All calls come from the thread of
    `io`, `look` in each of its turns. One of `made` and `failed` is called, once; perhaps before this has returned.
    """

    def __init__(self, io: SocketThread, offer: Offer, made: Made, failed: Callable[[str], None]) -> None:
        self._io, self._offer, self._made, self._failed = io, offer, made, failed
        self._until = time.monotonic() + REMOTE_SILENCE_S
        self._sealed: SealedSocket | None = None
        self.settled = False
        where = urlsplit(offer.address)
        host = where.hostname or ""
        self._connection = socket.socket(socket.AF_INET6 if is_ipv6(host) else socket.AF_INET, socket.SOCK_STREAM)
        self._connection.setblocking(False)
        try:
            self._connection.connect((host, where.port or 0))
        except BlockingIOError:
            pass  # it is under way: `_connected` says how it ends
        except OSError as error:
            return self._fail(str(error))
        io.watch(self._connection, self._connected, zmq.POLLOUT)

    def look(self, now: float) -> None:
        """Give up at the deadline."""
        if not self.settled and now > self._until:
            self._fail(f"it did not answer within {REMOTE_SILENCE_S} s")

    def close(self) -> None:
        """Not wanted any more: neither of both is called."""
        if not self.settled:
            self.settled = True
            self._io.forget(self._connection)
            self._connection.close()

    def _connected(self) -> None:
        self._io.unwatch(self._connection, zmq.POLLOUT)
        if code := self._connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            return self._fail(os.strerror(code))
        try:
            self._connection.send(self._offer.token)
            self._sealed = SealedSocket(self._connection, self._offer.keys, connects=True)
        except OSError as error:
            return self._fail(str(error))
        self._io.watch(self._connection, self._greeted)

    def _greeted(self) -> None:
        if self._sealed is not None and not self.settled:
            try:
                if self._sealed.greeted():
                    self.settled = True
                    self._io.unwatch(self._connection)
                    self._made(self._sealed)
            except QueueClosed as error:
                self._fail(str(error))
        raise zmq.Again

    def _fail(self, why: str) -> None:
        self.close()
        self._failed(why)


def flush_later(io: SocketThread, connection: SealedSocket, ended: Callable[[], None]) -> None:
    """Send the rest of what was sent, as the other side takes it. From any thread.

    `ended` is called in the thread of `io`, if the connection ends first: a peer's death must not end that thread.
    """

    def writable() -> None:
        try:
            done = connection.flush()
        except QueueClosed:
            io.unwatch(connection, zmq.POLLOUT)
            return ended()
        if done:
            io.unwatch(connection, zmq.POLLOUT)

    io.call(lambda: None if connection.fileno() < 0 else io.watch(connection, writable, zmq.POLLOUT))


def _listen(address: str, ports: Ports) -> socket.socket | None:
    """None if no port is free: a range may be meant for fewer."""
    family = socket.AF_INET6 if is_ipv6(address) else socket.AF_INET
    for port in in_turn(ports):
        try:
            return socket.create_server((address.strip("[]"), port), family=family, backlog=128)
        except OSError:
            continue
    log.warning("no_data_port", address=address, ports=str(ports))
    return None
