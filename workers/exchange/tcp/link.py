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
from workers.exchange.tcp.wire import Answer, Ask, Message, ask_frames, raw_rows, request_of

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
        """RankError: the engine moves no KV blocks between hosts."""
        raise RankError(f"KV blocks cannot be copied to {self._peer}, which is on another host")

    def inbox(self) -> memoryview[int]:
        """As `outbox`."""
        raise RankError(f"KV blocks cannot be copied from {self._peer}, which is on another host")

    def hang_up(self) -> None:
        self._end(self)

    def close(self) -> None:
        self._end(self)

    # -- the transport -----------------------------------------------------------------------------------------------

    def arrived(self, head: Ask | Answer, buffers: Sequence[bytes | memoryview]) -> None:
        """Take in what the peer has sent, unless it is older than what there is. RankError: it is malformed."""
        with self._arriving:
            self._arrived(head, buffers)

    def _arrived(self, head: Ask | Answer, buffers: Sequence[bytes | memoryview]) -> None:
        if isinstance(head, Ask):
            if head.incarnation != self._peer.incarnation:
                raise RankError(f"{self._peer} sent a request of incarnation {head.incarnation}")
            request = request_of(head, buffers)
            if self._newest is None or request.tag.sequence > self._newest.tag.sequence:
                self._newest = request
        elif head.tag.sequence >= self._answer[0].tag.sequence:
            self._answer = (head, buffers[0] if buffers else b"")
