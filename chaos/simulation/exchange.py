"""What a simulated rank computes with: the shipped router, over links, experts and a live mask that are only names.

The router chooses which peers get which rows. A peer refuses experts that it does not hold, and they are requested
elsewhere. Without a holder of an expert there is no token. This is the product's exchange without the arithmetic.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from chaos.simulation.invariants import Violation, require
from chaos.simulation.silence import Watch
from membership.base.errors import CoverageLost
from membership.base.rank_id import RankId
from workers.exchange.model_side import StepContext
from workers.exchange.router import Parcel, Refused, Router
from workers.exchange.tcp import redial
from workers.exchange.tcp.redial import Redial
from workers.ipc.shared_memory import Segment
from workers.protocol.exchange_handle import TcpHandle
from workers.protocol.live_mask import LiveMask
from workers.protocol.messages import SampledToken, SeqChunk, StepBatch

if TYPE_CHECKING:
    from chaos.simulation.rank import RankProcess

LAYERS, EXPERTS = 2, 8
NONSENSE = 49  # a token
NOWHERE = TcpHandle("", b"")  # there are no addresses here
Pair = tuple[int, int]
"""(layer, expert)"""


class Page:
    """Memory for a live mask."""

    def view(self, offset: int, size: int, kind: str) -> Any:
        return array("Q", bytes(size))


class SimMask(LiveMask):
    """A live mask that needs no shared memory."""

    def __init__(self, name: bytes) -> None:
        super().__init__(cast(Segment, Page()))
        self.name = name

    def handle(self) -> bytes:
        return self.name

    def close(self) -> None:
        """Nothing is mapped."""


class FarLinks:
    """A rank's links with ranks of other hosts. When they are made again is decided by the shipped `redial.py`."""

    def __init__(self, rank: RankProcess, exchange: SimExchange) -> None:
        self.returning: set[RankId] = set()  # cut, and still wanted
        self._rank, self._exchange = rank, exchange
        self._watches: dict[RankId, Watch] = {}
        self._redials: dict[RankId, Redial] = {}  # of links that this side has made, and makes again

    def has(self, peer: RankId) -> bool:
        """Whether there is a link with it, which is on another host."""
        return peer in self._watches

    def made(self, peer: RankId) -> None:
        """There is a link now, maybe again."""
        rank = self._rank
        found = rank.cluster.ranks.get(peer)
        if found is None or found.at == rank.at:
            return
        self._stop(peer)
        self.returning.discard(peer)
        self._exchange.links.add(peer)
        if peer.incarnation < rank.key.incarnation:
            before = self._redials.get(peer, Redial(NOWHERE, rank.clock.now))
            self._redials[peer] = redial.linked(before, rank.clock.now)
        self._watches[peer] = Watch(rank, found.at, lambda silent_s: self.lost(peer))

    def lost(self, peer: RankId) -> None:
        """It has ended: rows go around. The other side is notified, where that still arrives."""
        if peer not in self._watches:
            return
        self._stop(peer)
        self._exchange.links.discard(peer)
        self.returning.add(peer)
        self._rank.wake(0.0)
        found = self._rank.cluster.ranks.get(peer)
        if found is not None:
            self._rank.cluster.tell(self._rank.at, found, found.exchange.lost, self._rank.key)
        self._later(peer)

    def drop(self, peers: set[RankId]) -> None:
        """Not wanted any more."""
        self.returning -= peers
        for peer in peers & self._watches.keys():
            self._stop(peer)

    def _stop(self, peer: RankId) -> None:
        watch = self._watches.pop(peer, None)
        if watch is not None:
            watch.stop()

    def _later(self, peer: RankId) -> None:
        """Try to make it again after the pause that is due, if it is this side that does."""
        if peer in self._redials:
            known = self._redials[peer] = redial.cut(self._redials[peer], self._rank.clock.now)
            self._rank.after(known.due - self._rank.clock.now, self._try, peer)

    def _try(self, peer: RankId) -> None:
        if peer not in self.returning:
            return
        rank, now = self._rank, self._rank.clock.now
        known = self._redials[peer] = redial.begin(self._redials[peer], now)
        found = rank.cluster.ranks.get(peer)
        if found is None:  # refused
            self._later(peer)
        elif found.stopped or not rank.cluster.connected(rank, found):
            rank.after(known.due - now, self._given_up, peer)
        else:
            found.exchange.far.admitted(rank.key)
            self.made(peer)

    def _given_up(self, peer: RankId) -> None:
        if peer in self.returning:
            self._later(peer)

    def admitted(self, peer: RankId) -> None:
        """The other side has made the link again, maybe before this one has missed it."""
        if peer in self.returning or peer in self._watches:
            self.made(peer)


def wanted_by(chunks: list[SeqChunk]) -> list[Pair]:
    """Which experts their tokens are for."""
    tokens = {token for chunk in chunks for token in chunk.tokens}
    return sorted(
        {(layer, (token * 3 + layer + k * 5) % EXPERTS) for layer in range(LAYERS) for token in tokens for k in (0, 1)}
    )


class Bank:
    """The experts that a rank holds."""

    def __init__(self) -> None:
        self.held: set[Pair] = set()

    def drop(self, kept: frozenset[Pair]) -> None:
        self.held &= kept


class SimExchange:
    """A rank's links to its peers."""

    def __init__(self, rank: RankProcess) -> None:
        self.suspects: set[int] = set()
        self.retried_rows, self.retried_at = 0, 0.0
        self.links: set[RankId] = set()
        self.far = FarLinks(rank, self)
        self._rank = rank
        self._ctx: StepContext | None = None
        self._router: Router | None = None

    def unlinked(self) -> list[int]:
        """Those of other hosts: links of one host are cut by deaths only, which the engine sees."""
        ctx = self._ctx
        if ctx is None or not self.far.returning:
            return []
        gone = ctx.masked | self._rank.worker.masked()
        keys = [RankId(*each) for each in ctx.incarnations.items()]
        return [key.rank for key in keys if key in self.far.returning and not gone >> key.rank & 1]

    def stays(self) -> bool:
        """Rows travel: nothing here computes, so no cores are shared out."""
        return False

    def begin_step(self, ctx: StepContext) -> None:
        if self._ctx is None or ctx.view is not self._ctx.view:
            self._router = Router(self._rank.key[0], ctx.view.placement, ctx.near(self._rank.key[0]))
        self._ctx = ctx
        self.suspects.clear()

    def link(self, peer: RankId) -> None:
        """A view that is prepared has this peer. A link that was cut returns by itself."""
        if peer in self.links or peer in self.far.returning:
            return
        self.links.add(peer)
        self.far.made(peer)

    def lost(self, peer: RankId) -> None:
        """The link with a rank of another host has ended."""
        self.far.lost(peer)

    def reaches(self, peer: RankId) -> bool:
        """Whether a link with it is there, or can be made, or returns by itself."""
        found = self._rank.cluster.ranks.get(peer)
        if found is None or found.stopped:
            return False
        return peer in self.links or peer in self.far.returning or self._rank.cluster.connected(self._rank, found)

    def keeps_waiting(self, peer: RankId) -> bool:
        """Whether what this peer was asked is not answered now, nor known not to be."""
        found = self._rank.cluster.ranks.get(peer)
        return found is None or found.stopped or not self._rank.cluster.connected(self._rank, found)

    def disconnect(self, left: set[RankId]) -> None:
        self.links -= left
        self.far.drop(left)

    def stir(self) -> None:
        """Nothing sleeps here."""

    def asked(self, ctx: StepContext, chunks: list[SeqChunk]) -> list[tuple[int, Parcel]]:
        """(layer, parcel for one rank), after all refusals. Raises CoverageLost."""
        self.begin_step(ctx)
        router, excluded = self._router, ctx.masked | self._rank.worker.masked() | self._unlinked(ctx)
        if router is None:
            raise CoverageLost("no view")
        pairs, answered = wanted_by(chunks), list[tuple[int, Parcel]]()
        for layer in range(LAYERS):
            wanted = np.array([expert for of_layer, expert in pairs if of_layer == layer])
            answered += self._settled(router, layer, wanted, excluded, ctx)
        return answered

    def _unlinked(self, ctx: StepContext) -> int:
        excluded = 0
        for rank, incarnation in ctx.incarnations.items():
            key = RankId(rank, incarnation)
            if key != self._rank.key and not self._linked(key):
                excluded |= 1 << rank
                if not ctx.masked >> rank & 1:
                    self.suspects.add(rank)
        return excluded

    def _linked(self, key: RankId) -> bool:
        """A death on this host is seen at once; elsewhere when the network says so."""
        return key in self.links and (key in self._rank.cluster.ranks or self.far.has(key))

    def _settled(
        self, router: Router, layer: int, wanted: Any, excluded: int, ctx: StepContext
    ) -> list[tuple[int, Parcel]]:
        refused: frozenset[Refused] = frozenset()
        while True:
            parcels = router.parcels(layer, wanted, 1, excluded, refused)
            more = {
                (parcel.rank, expert)
                for parcel in parcels
                if (peer := self._rank.cluster.ranks.get(RankId(parcel.rank, ctx.incarnations.get(parcel.rank, -1))))
                for expert in parcel.experts
                if (layer, expert) not in peer.worker.names.held
            }
            if more <= refused:
                return [(layer, parcel) for parcel in parcels]
            refused |= more


class Runner:
    """A rank's model: the pretended one of `kv_model.py`, with the experts of `asked`."""

    def __init__(self, rank: RankProcess) -> None:
        self._rank = rank
        self.batch: StepBatch | None = None

    def run(self, chunks: list[SeqChunk], *, together: bool = False) -> list[SampledToken]:
        """The sampled tokens. Raises CoverageLost where an expert has no holder: the commit gate."""
        try:
            return self._run(chunks, together)
        except Violation as violation:  # the caller takes any error for the model's
            self._rank.cluster.report(violation)
            raise

    def _run(self, chunks: list[SeqChunk], together: bool) -> list[SampledToken]:
        rank, batch, view = self._rank, self.batch, self._rank.worker._view
        if batch is None:
            raise CoverageLost("no step")
        if rank.key not in rank.cluster.invariants.members.get(batch.epoch, ()):
            # It prepared an epoch of this number that was never committed. No answer of it may have an effect.
            return [SampledToken(chunk.seq, NONSENSE) for chunk in chunks if chunk.sample is not None]
        if together:
            if rank.worker.gpu is None:
                raise Violation("a step over GPUs, of which there are none here")
            rank.worker.gpu.shared.check()
            rank.worker.gpu.shared.require_held(wanted_by(chunks))
            return rank.cluster.kv.answer(batch, *rank.key).tokens
        masked = sum(1 << r for r in set(batch.masked))
        ctx = StepContext(view, batch.engine_token, batch.step, batch.attempt, masked)
        for layer, parcel in rank.exchange.asked(ctx, chunks):
            peer = rank.cluster.ranks.get(RankId(parcel.rank, ctx.incarnations.get(parcel.rank, -1)))
            require(peer is not None, f"rank {rank.key[0]} asked rank {parcel.rank}, which is dead or another now")
            held = peer is not None and all((layer, e) in peer.worker.names.held for e in parcel.experts)
            require(held, f"rank {rank.key[0]} was answered without experts {parcel.experts} of layer {layer}")
        return rank.cluster.kv.answer(batch, *rank.key).tokens

    def take_load(self) -> bytes:
        """Nothing is counted."""
        return b""
