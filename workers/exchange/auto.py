"""Chooses a transport for each peer: shared memory on one host, TCP to another. What ranks run by default."""

from __future__ import annotations

import msgspec

from membership.base.errors import RankDied
from membership.base.network import Network
from membership.base.rank_id import RankId
from workers.exchange.links import Links
from workers.exchange.shm.transport import ShmTransport
from workers.protocol.exchange_handle import AutoHandle
from workers.queue.handle import this_host


class Auto:
    """`exchange.link.Transport` over shared memory, and over TCP if there is a network."""

    def __init__(self, links: Links, network: Network | None = None) -> None:
        self._host = this_host()
        self._shm = ShmTransport(links)
        self._tcp = None
        if network is not None:
            from workers.exchange.tcp.transport import TcpTransport  # with ZeroMQ, which one host does not need

            self._tcp = TcpTransport(links, network)

    def handle(self) -> bytes:
        """Where peers reach this rank."""
        tcp = self._tcp.handle() if self._tcp is not None else b""
        return msgspec.msgpack.encode(AutoHandle(self._host, self._shm.handle(), tcp))

    def dial(self, peer: RankId, handle: bytes, deadline: float) -> None:
        """Connect to `peer`. RankDied if it cannot be reached, or is on another host and one of us has no network."""
        to = msgspec.msgpack.decode(handle, type=AutoHandle)
        if to.host == self._host:
            self._shm.dial(peer, to.shm, deadline)
        elif self._tcp is not None and to.tcp:
            self._tcp.dial(peer, to.tcp, deadline)
        else:
            raise RankDied(f"{peer} is on another host", hint="start the roles on both hosts with --advertise")

    def most_pairs(self, row_bytes: int) -> int:
        """The number of pairs that any of the transports can send in one request."""
        most = self._shm.most_pairs(row_bytes)
        return most if self._tcp is None else min(most, self._tcp.most_pairs(row_bytes))

    def close(self) -> None:
        """Accept no more peers."""
        self._shm.close()
        if self._tcp is not None:
            self._tcp.close()
