"""CURVE for ZeroMQ sockets: key pairs, and the authenticator that accepts only keys on a list."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import zmq
from zmq.utils import z85

from workers.queue.handle import CurveKeys

_ZAP_ADDRESS = "inproc://zeromq.zap.01"  # where ZeroMQ asks whether a peer may come in (one per context)
_ZAP_DOMAIN = "elastic-ep"


def new_keys() -> CurveKeys:
    """A fresh pair."""
    return CurveKeys(*zmq.curve_keypair())


class Authenticator:
    """Answers ZeroMQ's questions about peers of a context. Polled by the thread that owns `socket`."""

    def __init__(self, context: zmq.Context[Any], allowed: Iterable[bytes]) -> None:
        self._allowed = {z85.decode(key) for key in allowed}
        self.socket = context.socket(zmq.REP)
        self.socket.linger = 0
        self.socket.bind(_ZAP_ADDRESS)

    def answer(self) -> None:
        """Take one question and answer it: a key that is not on the list is refused."""
        version, request, _, _, _, mechanism, *credentials = self.socket.recv_multipart(zmq.NOBLOCK)
        accepted = mechanism == b"CURVE" and len(credentials) == 1 and credentials[0] in self._allowed
        status = [b"200", b"OK"] if accepted else [b"400", b"not on the list"]
        self.socket.send_multipart([version, request, *status, b"", b""])


def serve_curve(socket: zmq.Socket[Any], keys: CurveKeys) -> None:
    """Encrypt as the side that is connected to; the context needs a Authenticator."""
    socket.curve_server = True
    socket.curve_publickey, socket.curve_secretkey = keys.public, keys.secret
    socket.zap_domain = _ZAP_DOMAIN.encode()


def use_curve(socket: zmq.Socket[Any], keys: CurveKeys, server_key: bytes) -> None:
    """Encrypt as the side that connects, and only to the owner of `server_key`."""
    socket.curve_publickey, socket.curve_secretkey = keys.public, keys.secret
    socket.curve_serverkey = server_key
