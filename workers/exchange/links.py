"""The links of one rank with its peers: which peers are connected, under which incarnation, and which are gone.

A link belongs to one pair of incarnations. Links are added and retired by the transport's threads and by the thread
that prepares an epoch. The rank's main thread reads a snapshot, and it alone closes links that are no longer in use.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping

import msgspec

from membership.base.errors import Fenced, PeerTimeout
from membership.base.rank_id import RankId
from workers.exchange.link import Link
from workers.ipc.doorbell import Doorbell
from workers.protocol.far_link import FarLink

Dial = Callable[[RankId, bytes, float], None]
"""`Transport.dial`."""


class _Hello(msgspec.Struct, frozen=True, array_like=True):
    """The first message on a link: the process that dials, and the incarnation that it wants to reach."""

    rank: int
    incarnation: int
    to_incarnation: int


class Links:
    """All links of a rank. `live`, `far` and `version` may be read at any time without a lock."""

    def __init__(self, me: RankId, doorbell: Doorbell) -> None:
        self.me = me
        self.doorbell = doorbell  # peers ring it; so does the loss of a link
        self.live: tuple[Link, ...] = ()
        self.version = 0  # rises whenever `live` changes
        self.far: Mapping[RankId, FarLink] = {}  # replaced by the transport about once per second
        self._changed = threading.Condition()
        self._closed = False
        self._retired: list[Link] = []
        self._returning: frozenset[RankId] = frozenset()  # peers whose links the transport makes again

    def of(self, peer: RankId) -> Link | None:
        """The link with this process."""
        return next((p for p in self.live if p.peer == peer), None)

    def connect(
        self, dial: Dial, peers: Mapping[RankId, bytes], timeout_s: float, given_up: Callable[[], bool]
    ) -> None:
        """Dial peers with older incarnations, then wait until the newer ones have dialled. Not for links that were cut:
        they return by themselves, and until then rows go around.

        PeerTimeout names the ranks that did not. Fenced once `given_up()`, which is asked first and after each `stir`.
        """
        deadline = time.monotonic() + timeout_s
        others = {peer: handle for peer, handle in peers.items() if peer.rank != self.me.rank}
        for peer, handle in others.items():
            if peer.incarnation < self.me.incarnation and not self._made(peer):
                dial(peer, handle, deadline)
        with self._changed:
            while missing := [peer.rank for peer in others if not self._made(peer)]:
                left = deadline - time.monotonic()
                if given_up():
                    raise Fenced(f"rank {self.me.rank} need not link with ranks {missing} any more")
                if self._closed or left <= 0 or not self._changed.wait(timeout=left):
                    raise PeerTimeout(f"ranks {missing} did not link with rank {self.me.rank} in {timeout_s} s")

    def _made(self, peer: RankId) -> bool:
        return self.of(peer) is not None or self.returning(peer)

    def stir(self) -> None:
        """Have `connect`, wherever it waits, ask again whether it is given up."""
        with self._changed:
            self._changed.notify_all()

    def drop(self, peers: Iterable[RankId]) -> None:
        """End the links with these processes; none returns."""
        unwanted = set(peers)
        with self._changed:
            self._returning -= unwanted
        for link in [p for p in self.live if p.peer in unwanted]:
            self.retire(link)

    def sweep(self) -> None:
        """Close retired links. The caller is the main thread and uses none of them."""
        if not self._retired:
            return
        with self._changed:
            retired, self._retired = self._retired, []
        for link in retired:
            link.close()

    def close(self) -> None:
        """End all links; no peer can link afterwards."""
        with self._changed:
            self._closed = True
            self._returning = frozenset()
        for link in self.live:
            self.retire(link)
        self.sweep()

    # -- called by transports ----------------------------------------------------------------------------------------

    def hello(self, peer: RankId) -> bytes:
        """What to send to `peer` first."""
        return msgspec.msgpack.encode(_Hello(*self.me, peer.incarnation))

    def admit(self, hello: bytes) -> RankId:
        """The process that dials us with `hello`. Fenced if it wants another incarnation than this one."""
        dial = msgspec.msgpack.decode(hello, type=_Hello)
        if dial.to_incarnation != self.me.incarnation or dial.rank == self.me.rank:
            raise Fenced(f"this is rank {self.me.rank} incarnation {self.me.incarnation}, not {dial.to_incarnation}")
        return RankId(dial.rank, dial.incarnation)

    @property
    def all_returning(self) -> frozenset[RankId]:
        """Processes whose links were cut, and are still wanted."""
        return self._returning

    def returning(self, peer: RankId) -> bool:
        """Whether the link with this process was cut, and is still wanted."""
        return peer in self._returning

    def add(self, link: Link, *, again: bool = False) -> None:
        """A link was made. Fenced (the link is closed) if the peer's rank is known under a newer incarnation, or if it
        was made `again` and is not wanted any more.
        """
        with self._changed:
            known = next((p for p in self.live if p.peer.rank == link.peer.rank), None)
            if self._closed or (known is not None and known.peer.incarnation > link.peer.incarnation):
                link.close()
                raise Fenced(f"rank {self.me.rank} is closed or knows a newer incarnation of rank {link.peer.rank}")
            if again and link.peer not in self._returning:
                link.close()
                raise Fenced(f"rank {self.me.rank} does not need the link with {link.peer} any more")
            self._returning = frozenset(peer for peer in self._returning if peer.rank != link.peer.rank)
            self.live = (*self.live, link)
            self.version += 1
            self._changed.notify_all()
        if known is not None:  # a slot is given to a newer incarnation only when the older one is out of use
            self.retire(known)

    def retire(self, link: Link, *, returns: bool = False) -> None:
        """The link has ended; nothing happens if that is known. The main thread is woken to ask replicas.

        `returns`: it was cut, and the transport of one of both sides makes it again.
        """
        link.hang_up()
        with self._changed:
            if link not in self.live:
                return
            if returns and not self._closed:
                self._returning |= {link.peer}
            link.gone = True
            self.live = tuple(p for p in self.live if p is not link)
            self._retired.append(link)
            self.version += 1
            self._changed.notify_all()
            if not self._closed:
                self.doorbell.ring()
