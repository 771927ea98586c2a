"""What a transport gives the exchange: a `Transport` that connects to peers, and one `Link` per connected peer.

To add a transport (say `rdma`):

1. Make a folder `rdma/` with a class that implements `Transport` and one that implements `Link`. `shm/` is the example;
   `tests/support/toy_transport.py` is the smallest one that works.
2. Add its name to `transports.py`, and to the list at the top of `tests/unit/workers/exchange/test_transports.py`,
   which runs the same tests over each transport.
3. Say in `auto.py` between which peers it is used: that is what ranks run.

A transport only carries messages. Which rank is asked, retries, refusals, timeouts, and the check that an answer
belongs to the open request are in `loop.py`; which incarnations may connect is decided in `links.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

from membership.base.rank_id import RankId
from workers.exchange.router import Ints, Parcel
from workers.exchange.rows import Rows


class Tag(NamedTuple):
    """What a request belongs to. `sequence` is unique on a link and rises; the rest must agree too."""

    sequence: int
    epoch: int
    engine_token: int
    step: int
    attempt: int
    layer: int


class Request(NamedTuple):
    """What a peer asks: the first `counts[0]` pairs are for `experts[0]` and so on; pair i is over `rows[row_of[i]]`.

    `rows` [R, H] may be a view of the transport's memory. It may change if the peer gives up on this request; the
    answer is then discarded by its tag.
    """

    tag: Tag
    experts: list[int]
    counts: list[int]
    row_of: Ints
    rows: Rows
    dtype: int


class Refusal(NamedTuple):
    """Why a peer has not computed a request, and the experts that it cannot answer for (empty: all of the request)."""

    experts: list[int]
    reason: str


class Reply(NamedTuple):
    """The head of an answer as it arrived, unchecked: which request it says it answers, and which process sent it."""

    tag: tuple[int, ...]
    incarnation: int
    refused: bool


class Link(Protocol):
    """The connection with one peer process. At most one request per direction is open; a newer one replaces it.

    Only the rank's main thread calls these methods, except `hang_up`, and none of them blocks. `asked` and `answered`
    are called at each turn of a spinning wait: they must be cheap.
    """

    @property
    def peer(self) -> RankId:
        """The process at the other end. A link never changes to another incarnation."""

    gone: bool
    """Set by `links.py` when the peer has died or either side has hung up."""

    # -- we ask ------------------------------------------------------------------------------------------------------

    def ask(self, tag: Tag, parcel: Parcel, rows: Rows, dtype: int) -> None:
        """Send `rows[parcel.rows]`, in place of any earlier request, and wake the peer. `rows` is [T, H]."""

    def answered(self) -> int:
        """Sequence number of the newest answer (0: none yet)."""

    def reply(self) -> Reply:
        """The head of the newest answer. The exchange checks it before it reads `rows` or `refusal`."""

    def rows(self, pairs: int, hidden: int, dtype: int) -> Rows:
        """[pairs, hidden]: the rows of the newest answer. The caller copies them before it asks again."""

    def refusal(self) -> Refusal:
        """Why the newest answer has no rows."""

    # -- the peer asks -----------------------------------------------------------------------------------------------

    def asked(self) -> bool:
        """Whether the peer has asked something that `take` has not returned yet."""

    def take(self) -> Request | None:
        """What the peer asks now; each request is returned once. None if there is nothing, or it is being replaced."""

    def room(self, request: Request) -> Rows:
        """[pairs, H]: where the rows of the answer are to be written."""

    def answer(self, tag: Tag, refusal: Refusal | None = None) -> None:
        """Publish the rows in `room`, or a refusal, and wake the peer."""

    # -- bulk data of no step (KV blocks) ----------------------------------------------------------------------------

    def outbox(self, nbytes: int) -> memoryview[int]:
        """Memory for what the peer is to have: `nbytes`, or as much as there is."""

    def post(self, then: Callable[[], None]) -> None:
        """The outbox is whole. `then` is called once the peer can read it: at once, or later by a thread of the
        transport, which rings our doorbell after it; never if the link ends before.
        """

    def inbox(self) -> memoryview[int]:
        """What the peer has posted for us, to be read once. It may change when the peer writes again."""

    # -- the end -----------------------------------------------------------------------------------------------------

    def hang_up(self) -> None:
        """Let the peer see that we are gone. May be called from any thread, and again."""

    def close(self) -> None:
        """Release memory and descriptors. Called once, from the main thread, when nothing uses the link any more."""


def refusal_of(link: Link, tag: Tag) -> Refusal | None:
    """None if the newest answer has the rows for `tag`; else why not. Answers to anything else are caught here."""
    reply, sender = link.reply(), link.peer.incarnation
    if reply.tag != tag or reply.incarnation != sender:
        return Refusal([], f"answer to {[*reply.tag]} of incarnation {reply.incarnation} instead of {tag} of {sender}")
    return link.refusal() if reply.refused else None


class Transport(Protocol):
    """Makes links. Links come and go in threads of the transport; it reports each to `Links.add` and `Links.retire`."""

    def handle(self) -> bytes:
        """Where peers reach this rank; they pass it to `dial`."""

    def dial(self, peer: RankId, handle: bytes, deadline: float) -> None:
        """Connect to `peer`, send it `Links.hello` (its side calls `Links.admit`), and `add` the link on both sides.

        `deadline` is on `time.monotonic`. RankDied if the peer cannot be reached, or refuses.
        """

    def most_pairs(self, row_bytes: int) -> int:
        """The number of pairs whose rows and answer fit into one request (at least 1)."""

    def close(self) -> None:
        """Accept no more peers. The links that exist are ended by `Links`."""
