"""A link over TCP: the newest request and the newest answer that have arrived, and what sends ours."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import numpy as np

from membership.base.errors import RankError
from membership.base.rank_id import RankId
from workers.exchange.link import Refusal, Reply, Request, Tag
from workers.exchange.router import Parcel
from workers.exchange.rows import DTYPES, Rows
from workers.exchange.tcp.data import LinkData
from workers.exchange.tcp.wire import BULK, Answer, Ask, Bulk, Message, ask_frames, bulk_pieces, raw_rows, request_of

Send = Callable[["TcpLink", Message, Sequence[memoryview]], None]
"""Sends a message, at once or by the transport's thread."""
_NOTHING_YET = Answer(Tag(0, 0, 0, 0, 0, 0), 0)


class TcpLink:
    """The protocol `workers.exchange.link.Link`, where each method is described. What arrives only replaces
    `_newest` and `_answer`, each by a newer one: in the main thread over the data connection, else in the transport's.
    """

    def __init__(self, incarnation: int, peer: RankId, send: Send, end: Callable[[TcpLink], None]) -> None:
        self.incarnation = incarnation  # ours
        self.gone = False
        self.ended = False  # its connection, or before there was one
        self.data: LinkData | None = None  # once there is one
        self._peer = peer
        self._send, self._end = send, end
        self._served = 0  # sequence number of the peer's last request that we took
        self._newest: Request | None = None
        self._answer: tuple[Answer, bytes | memoryview] = (_NOTHING_YET, b"")
        self._arriving = threading.Lock()
        self._outbox = bytearray()
        self._posted: tuple[int, Callable[[], None]] = (0, lambda: None)  # the last one, and what then follows
        self._bulk: bytearray | None = None  # the peer's last one, until it is read
        self._room: Rows = np.empty((0, 0))

    @property
    def peer(self) -> RankId:
        return self._peer

    def ask(self, tag: Tag, parcel: Parcel, rows: Rows, dtype: int) -> None:
        self._send(self, *ask_frames(tag, self.incarnation, parcel, rows, dtype))

    def answered(self) -> int:
        return self._answer[0].tag.sequence

    def reply(self) -> Reply:
        head = self._answer[0]
        return Reply(head.tag, head.incarnation, head.refused)

    def rows(self, pairs: int, hidden: int, dtype: int) -> Rows:
        return np.frombuffer(self._answer[1], DTYPES[dtype][1]).reshape(pairs, hidden)

    def refusal(self) -> Refusal:
        head = self._answer[0]
        return Refusal(head.experts, head.reason)

    def asked(self) -> bool:
        newest = self._newest
        return newest is not None and newest.tag.sequence > self._served

    def take(self) -> Request | None:
        newest = self._newest
        if newest is None or newest.tag.sequence <= self._served:
            return None
        self._served = newest.tag.sequence
        return newest

    def room(self, request: Request) -> Rows:
        self._room = np.empty((len(request.row_of), request.rows.shape[1]), request.rows.dtype)
        return self._room

    def answer(self, tag: Tag, refusal: Refusal | None = None) -> None:
        if refusal is None:
            self._send(self, Answer(tag, self.incarnation), [raw_rows(self._room)])
        else:
            self._send(self, Answer(tag, self.incarnation, True, refusal.experts, refusal.reason[:4000]), [])

    def outbox(self, nbytes: int) -> memoryview[int]:
        self._outbox = bytearray(min(nbytes, BULK))
        return memoryview(self._outbox)

    def post(self, then: Callable[[], None]) -> None:
        posted, self._outbox = self._outbox, bytearray()
        self._posted = self._posted[0] + 1, then
        self._send(self, Bulk(self._posted[0]), bulk_pieces(memoryview(posted)))

    def inbox(self) -> memoryview[int]:
        """RankError if nothing has come."""
        arrived, self._bulk = self._bulk, None
        if arrived is None:
            raise RankError(f"nothing has come from {self._peer}")
        return memoryview(arrived)

    def hang_up(self) -> None:
        self._end(self)

    def close(self) -> None:
        self._end(self)

    # -- the transport -----------------------------------------------------------------------------------------------

    def arrived(self, head: Ask | Answer, buffers: Sequence[bytes | memoryview]) -> None:
        """Take in what the peer has sent, unless it is older than what there is. RankError: it is malformed."""
        with self._arriving:
            self._arrived(head, buffers)

    def bulk_arrived(self, pieces: Sequence[bytes | memoryview]) -> None:
        """Keep it for `inbox`. RankError: it is too large."""
        if sum(map(len, pieces)) > BULK:
            raise RankError(f"{self._peer} sent more than {BULK} bytes at once")
        self._bulk = bytearray().join(pieces)

    def bulk_taken(self, number: int) -> None:
        """The peer has what was posted under this number; that of an earlier one has no effect."""
        posted, then = self._posted
        if number == posted:
            then()

    def _arrived(self, head: Ask | Answer, buffers: Sequence[bytes | memoryview]) -> None:
        if isinstance(head, Ask):
            if head.incarnation != self._peer.incarnation:
                raise RankError(f"{self._peer} sent a request of incarnation {head.incarnation}")
            request = request_of(head, buffers)
            if self._newest is None or request.tag.sequence > self._newest.tag.sequence:
                self._newest = request
        elif head.tag.sequence >= self._answer[0].tag.sequence:
            self._answer = (head, buffers[0] if buffers else b"")
