"""Who is at the other end of a Unix socket, as the kernel says: only processes of our own user are talked to."""

from __future__ import annotations

import os
import socket
import struct
from dataclasses import dataclass

_UCRED = struct.Struct("3i")


@dataclass(frozen=True)
class Peer:
    """The process that connected, or that made the socket listen. Later changes of its user do not show."""

    pid: int
    uid: int

    @classmethod
    def of(cls, sock: socket.socket) -> Peer:
        """Of a connected socket."""
        pid, uid, _ = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
        return cls(pid, uid)

    def refusal(self) -> str:
        """Why it must not be talked to; empty: it is of our user."""
        if self.uid == os.geteuid():
            return ""
        return f"process {self.pid} belongs to user {self.uid}, we are user {os.geteuid()}"
