"""The links of one rank with its peers: who is connected, under which incarnation, and who is gone.

A link belongs to one pair of incarnations. It is two lanes (one per direction), the peer's doorbell, and the connection
over which they were handed out, whose end means that the peer let go or died. Links come and go in the listener's and
the preparing thread; the rank's main thread reads a snapshot and alone unmaps what is no longer in use.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import msgspec

from membership.base.errors import Fenced, PeerTimeout, QueueError, RankDied, RankError
from workers.exchange.wire import AREA, Lane, Request, lane_bytes
from workers.ipc import handover
from workers.ipc.doorbell import Bell, Doorbell
from workers.ipc.handover import Grant, Handover
from workers.ipc.shared_memory import Segment


class ExchangeHandle(msgspec.Struct, frozen=True, array_like=True):
    """Where peers reach a rank's exchange on this host."""

    address: str
    resource: str


class _Dial(msgspec.Struct, frozen=True, array_like=True):
    """Who dials, and whom it means."""

    rank: int
    incarnation: int
    to_incarnation: int


@dataclass(eq=False)
class PeerLink:
    """One peer. `sequence` numbers our requests; `served` is the last of its requests that we took."""

    rank: int
    incarnation: int
    ours: Lane
    theirs: Lane
    bell: Bell
    connection: handover.Link | None = None
    gone: bool = False
    sequence: int = 0
    served: int = 0

    def take(self) -> Request | None:
        """What the peer asks, once. One that it is replacing meanwhile is passed over: the newer will be seen."""
        asked = self.theirs.asked()
        if asked <= self.served:
            return None
        self.served = asked
        return self.theirs.request(asked, self.incarnation)

    def close(self) -> None:
        """Unmap everything; by the main thread, when nobody uses the link any more."""
        self.ours.close()
        self.theirs.close()
        self.bell.close()


class Links:
    """All links of a rank. `live` and `version` may be read at any time without a lock."""

    def __init__(self, rank: int, incarnation: int, doorbell: Doorbell, area: int = AREA) -> None:
        self._rank = rank
        self._incarnation = incarnation
        self._doorbell = doorbell
        self._area = area
        self._handover = Handover.default()
        self._resource = f"exchange-{rank}-{incarnation}-{secrets.token_hex(8)}"
        self._changed = threading.Condition()
        self._closed = False
        self._retired: list[PeerLink] = []
        self.live: tuple[PeerLink, ...] = ()
        self.version = 0
        self._handover.serve(self._resource, self._accept)

    def handle(self) -> bytes:
        """Where to dial."""
        return msgspec.msgpack.encode(ExchangeHandle(self._handover.address, self._resource))

    def of(self, rank: int, incarnation: int) -> PeerLink | None:
        """The link with this incarnation of a rank."""
        return next((p for p in self.live if p.rank == rank and p.incarnation == incarnation), None)

    def connect(
        self, peers: Mapping[int, tuple[int, bytes]], timeout_s: float, given_up: Callable[[], bool] = lambda: False
    ) -> None:
        """Dial the older ones, then wait until the newer ones have dialled. Fenced once `given_up()`: see `stir`."""
        deadline = time.monotonic() + timeout_s
        others = {rank: peer for rank, peer in peers.items() if rank != self._rank}
        for rank, (incarnation, handle) in others.items():
            if incarnation < self._incarnation and self.of(rank, incarnation) is None:
                self._dial(rank, incarnation, handle, deadline)
        with self._changed:
            while missing := [r for r, (incarnation, _) in others.items() if self.of(r, incarnation) is None]:
                left = deadline - time.monotonic()
                if given_up():
                    raise Fenced(f"rank {self._rank} need not link with ranks {missing} any more")
                if self._closed or left <= 0 or not self._changed.wait(timeout=left):
                    raise PeerTimeout(f"ranks {missing} did not link with rank {self._rank} in {timeout_s} s")

    def stir(self) -> None:
        """Have those who wait in `connect` ask again whether they should."""
        with self._changed:
            self._changed.notify_all()

    def drop(self, peers: Iterable[tuple[int, int]]) -> None:
        """Let go of these (rank, incarnation)."""
        unwanted = set(peers)
        for link in [p for p in self.live if (p.rank, p.incarnation) in unwanted]:
            self._retire(link)

    def sweep(self) -> None:
        """Unmap retired links; the caller is the main thread and uses none of them."""
        if not self._retired:
            return
        with self._changed:
            retired, self._retired = self._retired, []
        for link in retired:
            link.close()

    def close(self) -> None:
        """Let go of all; afterwards nobody can link."""
        self._handover.withdraw(self._resource)
        with self._changed:
            self._closed = True
        for link in self.live:
            self._retire(link)
        self.sweep()

    # -- making a link -----------------------------------------------------------------------------------------------

    def _dial(self, rank: int, incarnation: int, handle: bytes, deadline: float) -> None:
        to = msgspec.msgpack.decode(handle, type=ExchangeHandle)
        hello = msgspec.msgpack.encode(_Dial(self._rank, self._incarnation, incarnation))
        ours = self._new_segment(rank)
        try:
            left = max(deadline - time.monotonic(), 0.001)
            fds = [ours.fileno(), self._doorbell.fileno()]
            connection = self._handover.connect(
                to.address, to.resource, hello, fds, timeout_s=left, on_gone=self._on_gone
            )
        except QueueError as error:
            ours.close()
            raise RankDied(f"rank {rank} (incarnation {incarnation}) cannot be linked: {error}") from error
        except BaseException:
            ours.close()
            raise
        try:
            self._add(self._make(rank, incarnation, ours, connection.reply_fds, connection))
        except BaseException:
            connection.close()
            raise
        connection.release_fds()
        if connection.gone:  # it ended before we knew it by name
            self._on_gone(connection)

    def _accept(self, connection: handover.Link, request: bytes, fds: list[int]) -> Grant:
        dial = msgspec.msgpack.decode(request, type=_Dial)
        if dial.to_incarnation != self._incarnation or dial.rank == self._rank:
            raise Fenced(f"this is rank {self._rank} incarnation {self._incarnation}, not {dial.to_incarnation}")
        ours = self._new_segment(dial.rank)
        reply = [ours.fileno(), self._doorbell.fileno()]
        self._add(self._make(dial.rank, dial.incarnation, ours, fds, connection))
        return Grant(fds=reply, on_gone=self._on_gone)

    def _new_segment(self, rank: int) -> Segment:
        return Segment.create(lane_bytes(self._area), f"elastic-ep-lane-{self._rank}-{rank}")

    def _make(self, rank: int, incarnation: int, ours: Segment, fds: list[int], connection: handover.Link) -> PeerLink:
        if len(fds) != 2:
            ours.close()
            raise RankError(f"rank {rank} handed over {len(fds)} descriptors instead of a lane and a doorbell")
        try:
            theirs = Lane(Segment.attach(fds[0], lane_bytes(0)))
            return PeerLink(rank, incarnation, Lane(ours), theirs, Bell.attach(fds[1]), connection)
        except BaseException:
            ours.close()
            raise

    def _add(self, link: PeerLink) -> None:
        with self._changed:
            known = next((p for p in self.live if p.rank == link.rank), None)
            if self._closed or (known is not None and known.incarnation > link.incarnation):
                link.close()
                raise Fenced(f"rank {self._rank} is closed or knows a newer incarnation of rank {link.rank}")
            self.live = (*self.live, link)
            self.version += 1
            self._changed.notify_all()
        if known is not None:  # a slot is given to a newer incarnation only when the older one is out of use
            self._retire(known)

    # -- ending a link -----------------------------------------------------------------------------------------------

    def _on_gone(self, connection: handover.Link) -> None:
        for link in [p for p in self.live if p.connection is connection]:
            self._retire(link)

    def _retire(self, link: PeerLink) -> None:
        if link.connection is not None:
            link.connection.close()
        with self._changed:
            if link not in self.live:
                return
            link.gone = True
            self.live = tuple(p for p in self.live if p is not link)
            self._retired.append(link)
            self.version += 1
            self._changed.notify_all()
            if not self._closed:
                self._doorbell.ring()
