"""A link's data connection: requests and answers leave at once, and are read by the rank's main thread.

Without one they pass ZeroMQ and its threads, as everything else of a link does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from membership.base.errors import QueueClosed
from workers.ipc.doorbell import Doorbell
from workers.queue.data_port import flush_later
from workers.queue.remote_wire import SocketThread
from workers.queue.sealed import SealedSocket
from workers.queue.silence import Acks, Connection

Arrived = Callable[[bytes, Sequence[memoryview]], None]
Ended = Callable[[str], None]


class LinkData:
    """Of one link, from when it is made until it is closed. `arrived` raises nothing."""

    def __init__(self, sealed: SealedSocket, doorbell: Doorbell, io: SocketThread, arrived: Arrived, ended: Ended):
        """`ended` may be called more than once, and from any thread."""
        self._sealed, self._doorbell, self._io = sealed, doorbell, io
        self._arrived, self._ended = arrived, ended
        self._connection = Connection()
        self._connection.made(sealed.fileno())
        doorbell.watch(self)

    def added_to(self, acks: Acks | None, now: float) -> Acks | None:
        """What the link's other connection has carried, and this one."""
        self._connection.look(now)
        ours = self._connection.acks
        if acks is None or ours is None:
            return acks
        return replace(
            acks, sent_bytes=acks.sent_bytes + ours.sent_bytes, retransmits=acks.retransmits + ours.retransmits
        )

    def silent_s(self, now: float) -> float:
        """How long the peer's host has acknowledged nothing here, if that makes it suspected: as ZeroMQ's connection
        may go on where a firewall has forgotten this one.
        """
        return self._connection.silent_s(now)

    def fileno(self) -> int:
        """See workers.ipc.sockets.Source."""
        return self._sealed.fileno()

    def pump(self) -> None:
        """See workers.ipc.sockets.Source."""
        try:
            for head, buffers in self._sealed.take():
                self._arrived(head, buffers)
        except QueueClosed as closed:
            self._doorbell.unwatch(self)
            self._ended(str(closed))

    def send(self, head: bytes, buffers: Sequence[memoryview]) -> None:
        """Never waits."""
        try:
            if not self._sealed.send(head, buffers):
                flush_later(self._io, self._sealed, lambda: self._ended("its data connection has ended"))
        except QueueClosed as closed:
            self._ended(str(closed))

    def close(self) -> None:
        """In the transport's thread."""
        self._doorbell.unwatch(self)
        self._io.forget(self._sealed)
        self._sealed.close()
