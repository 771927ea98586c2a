"""The exchange: request and reply per (layer, rank), in the rank's own thread, the same over every transport.

For one layer a rank sends its requests, computes its own rows together with what peers ask of the same layer, and then
repeats: answer requests (of any layer or step), collect answers, sleep on the doorbell. There is no collective and no
helper thread, so a rank may be in another layer, idle, new or dead without stopping the others. Experts are pure
functions: rows that a lost peer has not answered are sent to a replica at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import structlog
import torch
from torch import Tensor

from membership.base.errors import CoverageLost, Fenced, PeerTimeout, RankError
from membership.base.rank_id import RankId
from membership.base.timing import EXCHANGE_ANSWER_TIMEOUT_S
from workers.exchange.batch import ExpertFailed, Work, run
from workers.exchange.call import Call, Flight
from workers.exchange.combine import ascending
from workers.exchange.link import Link, Refusal, Request, Tag, refusal_of
from workers.exchange.links import Links
from workers.exchange.local import compute_here
from workers.exchange.model_side import ExpertBank, StepContext
from workers.exchange.router import Ints, Parcel, Router
from workers.exchange.transports import Opener
from workers.ipc.doorbell import Doorbell
from workers.protocol.far_link import FarLink

log = structlog.get_logger("exchange")
Key = tuple[int, int, int]  # layer, hidden size, dtype


@dataclass
class _Group:
    """Everything asked of one layer at this moment: by peers, and by this rank itself."""

    works: list[Work] = field(default_factory=list)
    own: list[Parcel] = field(default_factory=list)
    asked: list[tuple[Link, Request]] = field(default_factory=list)


class Exchange:
    """One rank's side. All calls come from the rank's main thread; `connect` and `stir` may come from any thread."""

    def __init__(
        self,
        me: RankId,
        bank: ExpertBank,
        doorbell: Doorbell,
        open_transport: Opener,
        mask: Callable[[], int] = lambda: 0,
        *,
        answer_timeout_s: float = EXCHANGE_ANSWER_TIMEOUT_S,
        look_ahead: Callable[[], None] = lambda: None,
    ) -> None:
        """`mask` gives the ranks that must not be used now, as bits. `doorbell` is what this rank's main thread
        sleeps on; peers ring it. `look_ahead` is called in each layer.
        """
        self.device = torch.device("cpu")  # where the experts compute
        self.failed: Callable[[BaseException], object] = lambda why: None  # called if they do not
        self.retried_rows = 0  # rows sent again to a replica in this step
        self.retried_at = 0.0  # when the last of them was answered (time.monotonic); 0: there were none
        self.suspects: set[int] = set()  # ranks that stopped answering in this step
        self._me = me
        self._bank = bank
        self._doorbell = doorbell
        self._mask = mask
        self._answer_timeout_s = answer_timeout_s
        self._look_ahead = look_ahead
        self._links = Links(me, doorbell)
        self._transport = open_transport(self._links)
        self._sequence = 0  # of the last request
        self._ctx: StepContext | None = None
        self._router = Router(me.rank, {})
        self._peers: dict[int, Link] = {}
        self._unlinked = 0
        self._seen = (-1, -1)  # (epoch, version of the links) that `_peers` reflects

    # -- membership --------------------------------------------------------------------------------------------------

    def handle(self) -> bytes:
        """Where peers reach this rank."""
        return self._transport.handle()

    def connect(
        self, peers: Mapping[RankId, bytes], timeout_s: float, given_up: Callable[[], bool] = lambda: False
    ) -> None:
        """Link with each process -> its handle; the newer incarnation dials. Existing links are left alone.

        PeerTimeout names the ranks that did not link. Fenced once `given_up()`, which is asked first and after each
        `stir`.
        """
        self._links.connect(self._transport.dial, peers, timeout_s, given_up)

    def stir(self) -> None:
        """Have `connect` ask again whether it is given up."""
        self._links.stir()

    def outbox(self, peer: RankId, nbytes: int) -> memoryview[int]:
        """Host memory for this peer: `nbytes`, or as much as there is. RankError if it is not linked."""
        return self._linked(peer).outbox(nbytes)

    def post(self, peer: RankId, then: Callable[[], None]) -> None:
        """The outbox for this peer is whole: see `Link.post`. RankError if it is not linked."""
        self._linked(peer).post(then)

    def inbox(self, peer: RankId) -> memoryview[int]:
        """What this peer has posted for us, to be read once. RankError if there is nothing, or it is not linked."""
        return self._linked(peer).inbox()

    def _linked(self, peer: RankId) -> Link:
        link = self._links.of(peer)
        if link is None:
            raise RankError(f"rank {self._me.rank} has no link with {peer}")
        return link

    def disconnect(self, peers: Iterable[RankId]) -> None:
        """End the links with these processes: nothing that they still write can be seen."""
        self._links.drop(peers)

    def close(self) -> None:
        """End all links; no peer can link afterwards."""
        self._peers = {}
        self._transport.close()
        self._links.close()

    def begin_step(self, ctx: StepContext) -> None:
        """Everything until the next call belongs to this attempt."""
        if self._ctx is None or ctx.view is not self._ctx.view:
            self._router = Router(self._me.rank, ctx.view.placement, ctx.near(self._me.rank))
            self._seen = (-1, -1)
        self._ctx = ctx
        self.retried_rows = 0
        self.retried_at = 0.0
        self.suspects.clear()
        self._links.sweep()
        self._excluded(ctx)

    def _excluded(self, ctx: StepContext) -> int:
        """Bits of the ranks that cannot be asked now: masked, not linked, or gone."""
        version = self._links.version
        if self._seen != (ctx.view.epoch, version):
            members = ctx.incarnations
            others = [rank for rank in ctx.view.placement if rank != self._me.rank]
            found = {rank: self._links.of(RankId(rank, members.get(rank, -1))) for rank in others}
            self._peers = {rank: link for rank, link in found.items() if link is not None}
            unlinked = [rank for rank in others if rank not in self._peers]
            self._unlinked = sum(1 << rank for rank in unlinked)
            self._seen = (ctx.view.epoch, version)
            self.suspects.update(rank for rank in unlinked if not ctx.masked >> rank & 1)
        return ctx.masked | self._mask() | self._unlinked

    def far_links(self) -> Mapping[RankId, FarLink]:
        """What is known of the links with peers on other hosts."""
        return self._links.far

    def unlinked(self) -> list[int]:
        """Ranks of the view, not masked, with which there is no link now."""
        if self._ctx is None or not self._unlinked:
            return []
        missing = self._unlinked & ~(self._ctx.masked | self._mask())
        return [rank for rank in range(missing.bit_length()) if missing >> rank & 1]

    @property
    def everywhere(self) -> bool:
        """Whether every rank of the view holds all experts."""
        return self._ctx is not None and self._router.everywhere

    def stays(self) -> bool:
        """Whether no rows need to travel in this step: every rank holds all experts, and no peer has asked."""
        return self.everywhere and not self.pending()

    # -- asking ------------------------------------------------------------------------------------------------------

    def dispatch_combine(self, layer: int, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """[T, H] -> [T, H]: the weighted sum of each row's experts. CoverageLost, PeerTimeout."""
        if self._ctx is None:
            raise Fenced("dispatch_combine outside of a step: call begin_step first")
        if not len(hidden):
            return torch.empty_like(hidden)
        self._doorbell.look()  # what peers on other hosts have asked
        self._look_ahead()
        ids, weights = ascending(topk_ids, topk_weights)
        experts = ids.reshape(-1).tolist()
        if self._router.all_mine(layer, experts) and hidden.device.type == self.device.type and not self.pending():
            try:
                return compute_here(self._bank, layer, hidden, experts, weights)
            except Exception as error:  # noqa: BLE001 - the call below finds the failing expert and asks a replica
                log.warning("experts_failed_together", layer=layer, error=repr(error), rank=self._me.rank)
        call = Call(layer, hidden, ids, weights)
        self._place(self._ctx, call)
        self._send(self._ctx, call)
        deadline = time.monotonic() + self._answer_timeout_s
        while True:
            moved = self._answer(call)
            moved += self._collect(self._ctx, call)
            if call.done():
                if call.retried:
                    self.retried_at = time.monotonic()
                return call.combined()
            if not moved and not self._doorbell.wait(lambda: self._stirred(call), deadline - time.monotonic()):
                raise PeerTimeout(
                    f"rank {self._me.rank}, step {self._ctx.step}, layer {layer}: no answer from ranks"
                    f" {sorted(call.flights)} in {self._answer_timeout_s} s"
                )

    def _place(self, ctx: StepContext, call: Call, pairs: Ints | None = None) -> None:
        excluded = self._excluded(ctx)
        row_bytes = call.rows.shape[1] * call.rows.itemsize
        call.place(self._router, self._me.rank, excluded, self._transport.most_pairs(row_bytes), pairs)

    def _send(self, ctx: StepContext, call: Call) -> None:
        """Send to each peer without an open request; the rest of a large parcel follows the answer."""
        for rank in [r for r in call.queued if r not in call.flights]:
            link = self._peers.get(rank)
            if link is None:
                continue  # it was lost a moment ago: the next turn finds it excluded
            parcel = call.next_parcel(rank)
            self._sequence += 1
            tag = Tag(self._sequence, ctx.view.epoch, ctx.engine_token, ctx.step, ctx.attempt, call.layer)
            link.ask(tag, parcel, call.rows, call.dtype)
            call.flights[rank] = Flight(link, tag, parcel)

    def _collect(self, ctx: StepContext, call: Call) -> int:
        """Take answers; ask replicas for what was refused or lost. Returns the number of peers that have answered."""
        settled = [f for f in call.flights.values() if f.link.answered() == f.tag.sequence]
        for flight in settled:
            parcel, link = flight.parcel, flight.link
            refusal = refusal_of(link, flight.tag)
            if refusal is None:
                del call.flights[parcel.rank]
                call.put(parcel, link.rows(len(parcel.pairs), call.rows.shape[1], call.dtype))
            else:
                log.warning("rows_refused", by=parcel.rank, layer=call.layer, reason=refusal.reason)
                call.refuse(parcel.rank, refusal.experts or parcel.experts)
                self._again(ctx, call, parcel.rank)
        if call.failed is not None:
            self._replace_own(ctx, call, call.failed)
        excluded = self._excluded(ctx)
        cut = {rank for rank, flight in call.flights.items() if flight.link.gone}  # the peer may have a new link by now
        if cut or excluded & call.asked:
            for rank in {*call.flights, *call.queued}:
                if rank in cut or excluded >> rank & 1:
                    self.suspects.add(rank)
                    self._again(ctx, call, rank)
        if call.queued:
            self._send(ctx, call)
        return len(settled)

    def _again(self, ctx: StepContext, call: Call, rank: int) -> None:
        """What `rank` has not answered goes to the next holders."""
        pairs, rows_sent = call.forget(rank)
        call.retried = call.retried or rows_sent > 0
        self.retried_rows += rows_sent
        self._place(ctx, call, pairs)

    def _replace_own(self, ctx: StepContext, call: Call, error: ExpertFailed) -> None:
        """Ask replicas for what this rank failed to compute itself; its error if there are none."""
        call.failed = None
        try:
            self._place(ctx, call, call.redo)
        except CoverageLost:
            raise error from error.__cause__

    def _stirred(self, call: Call) -> bool:
        """Whether there is a reason to stop sleeping: a request, an answer, the loss of a peer, or something unsent."""
        if self.pending() or any(rank not in call.flights for rank in call.queued):
            return True
        masked = self._mask()
        return any(
            f.link.answered() == f.tag.sequence or f.link.gone or masked >> rank & 1 for rank, f in call.flights.items()
        )

    # -- answering ---------------------------------------------------------------------------------------------------

    def pending(self) -> bool:
        """Whether `serve` has something to do."""
        for link in self._links.live:  # noqa: SIM110 - a plain loop: this runs at each turn of a spinning wait
            if link.asked():
                return True
        return False

    def serve(self) -> int:
        """Answer what peers have asked so far; returns the number of requests. Never blocks."""
        self._links.sweep()
        self._doorbell.look()
        return self._answer(None)

    def _answer(self, call: Call | None) -> int:
        """Compute what is asked now, each expert once for all requests; returns the number of requests."""
        groups: dict[Key, _Group] = {}
        if call is not None and call.own:
            groups[call.key] = _Group(*call.take_own())
        for link in self._links.live:
            request = link.take()
            if request is None:
                continue
            layer = request.tag.layer
            missing = [e for e in request.experts if not self._bank.holds(layer, e)]
            if missing:
                link.answer(request.tag, Refusal(missing, f"rank {self._me.rank} does not hold experts {missing}"))
                continue
            group = groups.setdefault((layer, request.rows.shape[1], request.dtype), _Group())
            group.works.append(Work(request.experts, request.counts, request.row_of, request.rows))
            group.asked.append((link, request))
        for key, group in groups.items():
            self._run(key, group, call)
        return sum(len(group.works) for group in groups.values())

    def _run(self, key: Key, group: _Group, call: Call | None) -> None:
        try:
            outputs, places = run(self._bank, key[0], group.works, key[2], self.device)
        except ExpertFailed as error:
            self._fail(key, group, call, error)
            return
        own = len(group.own)
        for (link, request), place in zip(group.asked, places[own:], strict=True):
            room = link.room(request)
            if place is None:
                room[:] = outputs
            else:
                outputs.take(place, 0, room, "clip")
            link.answer(request.tag)
        if call is not None:
            for parcel, place in zip(group.own, places[:own], strict=True):
                call.put(parcel, outputs if place is None else outputs.take(place, 0))

    def _fail(self, key: Key, group: _Group, call: Call | None, error: ExpertFailed) -> None:
        """Refuse the failed expert in each request that wants it, this rank's own call included, and run the rest."""
        log.error("expert_failed", error=str(error), rank=self._me.rank)
        self.failed(error.__cause__ or error)
        own = len(group.own)
        rest = _Group()
        if call is not None and any(error.expert in parcel.experts for parcel in group.own):
            call.fail_own(self._me.rank, group.own, error)
        else:
            rest = _Group(group.works[:own], group.own)
        for work, (link, request) in zip(group.works[own:], group.asked, strict=True):
            if error.expert in work.experts:
                link.answer(request.tag, Refusal([error.expert], f"rank {self._me.rank}: {error}"))
            else:
                rest.works.append(work)
                rest.asked.append((link, request))
        if rest.works:
            self._run(key, rest, call)
