"""The smallest transport that works: ranks of one process, and messages that are objects. Registered as "toy"."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from membership.base.errors import Fenced, RankDied
from membership.base.rank_id import RankId
from workers.exchange.link import Refusal, Reply, Request, Tag
from workers.exchange.links import Links
from workers.exchange.router import Parcel
from workers.exchange.rows import Rows
from workers.exchange.transports import register


@dataclass
class Side:
    """What one rank has written for the other, and how that rank is woken."""

    ring: Callable[[], None]
    request: Request | None = None
    reply: Reply | None = None
    refusal: Refusal | None = None
    rows: Rows | None = None
    bulk: memoryview = field(default_factory=lambda: memoryview(bytearray(1 << 16)))


class ToyLink:
    def __init__(self, incarnation: int, peer: RankId, ours: Side, theirs: Side) -> None:
        self.incarnation, self.peer, self.ours, self.theirs = incarnation, peer, ours, theirs
        self.gone = False
        self.served = 0
        self.on_hang_up: Callable[[], None] | None = None

    def ask(self, tag: Tag, parcel: Parcel, rows: Rows, dtype: int) -> None:
        sent = rows[parcel.rows]
        self.ours.request = Request(tag, parcel.experts, parcel.counts, parcel.row_of, sent, dtype)
        self.theirs.ring()

    def answered(self) -> int:
        return self.theirs.reply.tag[0] if self.theirs.reply else 0

    def reply(self) -> Reply:
        return self.theirs.reply

    def rows(self, pairs: int, hidden: int, dtype: int) -> Rows:
        return self.theirs.rows

    def refusal(self) -> Refusal:
        return self.theirs.refusal

    def asked(self) -> bool:
        request = self.theirs.request
        return request is not None and request.tag.sequence > self.served

    def take(self) -> Request | None:
        if not self.asked():
            return None
        self.served = self.theirs.request.tag.sequence
        return self.theirs.request

    def room(self, request: Request) -> Rows:
        self.ours.rows = np.empty((len(request.row_of), request.rows.shape[1]), request.rows.dtype)
        return self.ours.rows

    def answer(self, tag: Tag, refusal: Refusal | None = None) -> None:
        self.ours.refusal = refusal
        self.ours.reply = Reply(tag, self.incarnation, refusal is not None)
        self.theirs.ring()

    def outbox(self, nbytes: int) -> memoryview:
        return self.ours.bulk[:nbytes]

    def post(self, then: Callable[[], None]) -> None:
        then()

    def inbox(self) -> memoryview:
        return self.theirs.bulk

    def hang_up(self) -> None:
        on_hang_up, self.on_hang_up = self.on_hang_up, None
        if on_hang_up is not None:
            on_hang_up()

    def close(self) -> None:
        pass


class ToyTransport:
    by_handle: dict[bytes, ToyTransport] = {}  # noqa: RUF012 - this is the network

    def __init__(self, links: Links, most_pairs: int = 1 << 15) -> None:
        self._links = links
        self._most_pairs = most_pairs
        self._handle = uuid.uuid4().bytes
        self.by_handle[self._handle] = self

    def handle(self) -> bytes:
        return self._handle

    def dial(self, peer: RankId, handle: bytes, deadline: float) -> None:
        there = self.by_handle.get(handle)
        if there is None:
            raise RankDied(f"rank {peer.rank} is not there")
        me, far_links = self._links.me, there._links
        ours, theirs = Side(self._links.doorbell.ring), Side(far_links.doorbell.ring)
        near = ToyLink(me.incarnation, peer, ours, theirs)
        try:
            far = ToyLink(peer.incarnation, far_links.admit(self._links.hello(peer)), theirs, ours)
            near.on_hang_up = lambda: far_links.retire(far)
            far.on_hang_up = lambda: self._links.retire(near)
            far_links.add(far)
        except Fenced as error:
            raise RankDied(f"rank {peer.rank} refuses to link: {error}") from error
        self._links.add(near)

    def most_pairs(self, row_bytes: int) -> int:
        return self._most_pairs

    def close(self) -> None:
        self.by_handle.pop(self._handle, None)


register("toy", ToyTransport)
