"""A link over shared memory: two lanes, one per direction, and the peer's doorbell."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from membership.base.rank_id import RankId
from workers.exchange.link import Refusal, Reply, Request, Tag
from workers.exchange.router import Parcel
from workers.exchange.rows import Rows
from workers.exchange.shm.wire import ANSWER, ASK, Lane
from workers.ipc import handover
from workers.ipc.doorbell import Bell


@dataclass(eq=False, slots=True)
class ShmLink:
    """The protocol `workers.exchange.link.Link`, where each method is described."""

    incarnation: int  # ours
    peer: RankId
    ours: Lane
    theirs: Lane
    bell: Bell
    connection: handover.Link  # over which the lanes were handed out; it ends when either process hangs up or dies
    gone: bool = False
    served: int = 0  # sequence number of the peer's last request that we took

    def ask(self, tag: Tag, parcel: Parcel, rows: Rows, dtype: int) -> None:
        self.ours.ask(tag, self.incarnation, parcel, rows, dtype)
        self.bell.ring()

    def answered(self) -> int:
        return self.theirs.words[ANSWER]

    def reply(self) -> Reply:
        return self.theirs.reply()

    def rows(self, pairs: int, hidden: int, dtype: int) -> Rows:
        return self.theirs.answer_rows(pairs, hidden, dtype)

    def refusal(self) -> Refusal:
        return self.theirs.refusal()

    def asked(self) -> bool:
        return self.theirs.words[ASK] > self.served

    def take(self) -> Request | None:
        """A request that is being replaced is skipped: the newer one will be seen."""
        asked = self.theirs.words[ASK]
        if asked <= self.served:
            return None
        self.served = asked
        return self.theirs.request(asked, self.peer.incarnation)

    def room(self, request: Request) -> Rows:
        """SegmentError if there is no memory."""
        return self.ours.room_for_answer(request)

    def answer(self, tag: Tag, refusal: Refusal | None = None) -> None:
        self.ours.answer(tag, self.incarnation, refusal)
        self.bell.ring()

    def outbox(self, nbytes: int) -> memoryview[int]:
        """SegmentError if there is no memory."""
        return self.ours.room_for_bulk(nbytes)

    def post(self, then: Callable[[], None]) -> None:
        """The peer reads where we have written."""
        then()

    def inbox(self) -> memoryview[int]:
        return self.theirs.bulk()

    def hang_up(self) -> None:
        self.connection.close()

    def close(self) -> None:
        self.ours.close()
        self.theirs.close()
        self.bell.close()
