"""Makes links over shared memory: each side creates the lane that it writes, and hands it over with its doorbell."""

from __future__ import annotations

import secrets
import time

import msgspec

from membership.base.errors import QueueError, RankDied, RankError
from membership.base.rank_id import RankId
from workers.exchange.links import Links
from workers.exchange.shm.link import ShmLink
from workers.exchange.shm.wire import AREA, Lane, lane_bytes, most_pairs
from workers.ipc import handover
from workers.ipc.doorbell import Bell
from workers.ipc.handover import Grant, Handover
from workers.ipc.shared_memory import Segment


class ShmHandle(msgspec.Struct, frozen=True, array_like=True):
    """Where peers reach a rank's exchange on this host."""

    address: str
    resource: str


class ShmTransport:
    """`exchange.link.Transport` for ranks of one host. `area`: bytes for the rows of one request, and of one answer."""

    def __init__(self, links: Links, area: int = AREA) -> None:
        self._links = links
        self._me = links.me
        self._area = area
        self._handover = Handover.default()
        self._resource = f"exchange-{self._me.rank}-{self._me.incarnation}-{secrets.token_hex(8)}"
        self._handover.serve(self._resource, self._accept)

    def handle(self) -> bytes:
        """Where peers reach this rank."""
        return msgspec.msgpack.encode(ShmHandle(self._handover.address, self._resource))

    def most_pairs(self, row_bytes: int) -> int:
        """The number of pairs whose rows and answer fit into one request."""
        return most_pairs(self._area, row_bytes)

    def close(self) -> None:
        """Accept no more peers."""
        self._handover.withdraw(self._resource)

    def dial(self, peer: RankId, handle: bytes, deadline: float) -> None:
        """Exchange lanes with `peer`. RankDied if it cannot be reached."""
        to = msgspec.msgpack.decode(handle, type=ShmHandle)
        ours = self._new_segment(peer.rank)
        try:
            connection = self._handover.connect(
                to.address,
                to.resource,
                self._links.hello(peer),
                [ours.fileno(), self._links.doorbell.fileno()],
                timeout_s=max(deadline - time.monotonic(), 0.001),
                on_gone=self._on_gone,
            )
        except BaseException as error:
            ours.close()
            if isinstance(error, QueueError):
                raise RankDied(f"{peer} cannot be linked: {error}") from error
            raise
        try:
            self._links.add(self._make(peer, ours, connection.reply_fds, connection))
        except BaseException:
            connection.close()
            raise
        connection.release_fds()
        if connection.gone:  # it ended before the link was known
            self._on_gone(connection)

    def _accept(self, connection: handover.Link, hello: bytes, fds: list[int]) -> Grant:
        peer = self._links.admit(hello)
        ours = self._new_segment(peer.rank)
        reply = [ours.fileno(), self._links.doorbell.fileno()]
        self._links.add(self._make(peer, ours, fds, connection))
        return Grant(fds=reply, on_gone=self._on_gone)

    def _on_gone(self, connection: handover.Link) -> None:
        for link in self._links.live:
            if isinstance(link, ShmLink) and link.connection is connection:
                self._links.retire(link)

    def _new_segment(self, rank: int) -> Segment:
        return Segment.create(lane_bytes(self._area), f"elastic-ep-lane-{self._me.rank}-{rank}")

    def _make(self, peer: RankId, ours: Segment, fds: list[int], connection: handover.Link) -> ShmLink:
        if len(fds) != 2:
            ours.close()
            raise RankError(f"rank {peer.rank} handed over {len(fds)} descriptors instead of a lane and a doorbell")
        try:
            theirs = Lane(Segment.attach(fds[0], lane_bytes(0)))
            return ShmLink(self._me.incarnation, peer, Lane(ours), theirs, Bell.attach(fds[1]), connection)
        except BaseException:
            ours.close()
            raise
