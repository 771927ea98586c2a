"""The exchange over this host's shared memory: one loop in the rank's own thread, no collective, no helper threads.

A rank writes its requests into its lanes, rings the peers, computes what it can itself together with what peers ask of
the same layer, and then alternates: answer who asks (whatever layer or step that one is in), take answers, sleep on the
doorbell. Experts are pure, so what a lost peer had not answered is asked again of a replica at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import structlog
import torch
from torch import Tensor

from membership.base.errors import CoverageLost, Fenced, PeerTimeout, RankError
from membership.base.timing import EXCHANGE_ANSWER_TIMEOUT_S
from workers.exchange.base import ExpertBank, StepContext
from workers.exchange.batch import ExpertFailed, Work, run
from workers.exchange.call import Call, Flight
from workers.exchange.combine import ascending
from workers.exchange.links import Links, PeerLink
from workers.exchange.local import compute_here
from workers.exchange.router import Ints, Parcel, Router
from workers.exchange.wire import AREA, Refusal, Request, Tag, most_pairs
from workers.ipc.doorbell import Doorbell

log = structlog.get_logger("exchange")
Key = tuple[int, int, int]  # layer, hidden size, dtype


def _nobody_masked() -> int:
    return 0


@dataclass
class _Group:
    """Everything asked of one layer at this moment: by peers, and by this rank itself."""

    works: list[Work] = field(default_factory=list)
    own: list[Parcel] = field(default_factory=list)
    asked: list[tuple[PeerLink, Request]] = field(default_factory=list)


class ShmExchange:
    """`base.Exchange` for ranks of one host."""

    def __init__(
        self,
        rank: int,
        incarnation: int,
        bank: ExpertBank,
        doorbell: Doorbell,
        mask: Callable[[], int] = _nobody_masked,
        *,
        answer_timeout_s: float = EXCHANGE_ANSWER_TIMEOUT_S,
        device: torch.device | None = None,
        area: int = AREA,
    ) -> None:
        self.retried_rows = 0
        self.retried_at = 0.0
        self.suspects: set[int] = set()
        self._rank = rank
        self._incarnation = incarnation
        self._bank = bank
        self._doorbell = doorbell
        self._mask = mask
        self._answer_timeout_s = answer_timeout_s
        self.device = device or torch.device("cpu")  # where the experts compute
        self._area = area
        self._links = Links(rank, incarnation, doorbell, area)
        self._ctx: StepContext | None = None
        self._router = Router(rank, {})
        self._peers: dict[int, PeerLink] = {}
        self._unlinked = 0
        self._seen = (-1, -1)  # (epoch, version of the links) that `_peers` reflects

    # -- membership --------------------------------------------------------------------------------------------------

    def handle(self) -> bytes:
        """Where peers reach this rank."""
        return self._links.handle()

    def connect(
        self, peers: Mapping[int, tuple[int, bytes]], timeout_s: float, given_up: Callable[[], bool] = lambda: False
    ) -> None:
        """Link with each rank -> (incarnation, handle); the newer incarnation dials. Linked ones are left alone."""
        self._links.connect(peers, timeout_s, given_up)

    def stir(self) -> None:
        """Have `connect` ask again whether it is given up."""
        self._links.stir()

    def outbox(self, rank: int, incarnation: int, nbytes: int) -> memoryview[int]:
        """Memory that this peer can read, `nbytes` or as much as there is. RankError if it is not linked."""
        return self._linked(rank, incarnation).ours.room_for_bulk(nbytes)

    def inbox(self, rank: int, incarnation: int) -> memoryview[int]:
        """What this peer has put into its outbox for us; it may change if the peer writes again."""
        return self._linked(rank, incarnation).theirs.bulk()

    def _linked(self, rank: int, incarnation: int) -> PeerLink:
        link = self._links.of(rank, incarnation)
        if link is None:
            raise RankError(f"rank {self._rank} has no link with rank {rank} (incarnation {incarnation})")
        return link

    def disconnect(self, peers: Iterable[tuple[int, int]]) -> None:
        """Drop the links with these (rank, incarnation): nothing that they still write can be seen."""
        self._links.drop(peers)

    def close(self) -> None:
        """Drop all links."""
        self._peers = {}
        self._links.close()

    def begin_step(self, ctx: StepContext) -> None:
        """Everything until the next call belongs to this attempt."""
        if self._ctx is None or ctx.view is not self._ctx.view:
            self._router = Router(self._rank, ctx.view.placement)
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
            found = {r: self._links.of(r, members.get(r, -1)) for r in ctx.view.placement if r != self._rank}
            self._peers = {r: link for r, link in found.items() if link is not None}
            self._unlinked = sum(1 << r for r, link in found.items() if link is None)
            self._seen = (ctx.view.epoch, version)
            self.suspects.update(r for r, link in found.items() if link is None and not ctx.masked >> r & 1)
        return ctx.masked | self._mask() | self._unlinked

    # -- asking ------------------------------------------------------------------------------------------------------

    def dispatch_combine(self, layer: int, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """[T, H] -> [T, H]: the weighted sum of each row's experts. CoverageLost, PeerTimeout."""
        if self._ctx is None:
            raise Fenced("dispatch_combine outside of a step: call begin_step first")
        if not len(hidden):
            return torch.empty_like(hidden)
        ids, weights = ascending(topk_ids, topk_weights)
        experts = ids.reshape(-1).tolist()
        if self._router.all_mine(layer, experts) and hidden.device.type == self.device.type and not self.pending():
            try:
                return compute_here(self._bank, layer, hidden, experts, weights)
            except Exception as error:  # noqa: BLE001 - what follows finds out which expert it is, and asks a replica
                log.warning("experts failed together", layer=layer, error=repr(error), rank=self._rank)
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
                    f"rank {self._rank}, step {self._ctx.step}, layer {layer}: no answer from ranks"
                    f" {sorted(call.flights)} in {self._answer_timeout_s} s"
                )

    def _place(self, ctx: StepContext, call: Call, pairs: Ints | None = None) -> None:
        excluded = self._excluded(ctx)
        row_bytes = call.rows.shape[1] * call.rows.itemsize
        call.place(self._router, self._rank, excluded, most_pairs(self._area, row_bytes), pairs)

    def _send(self, ctx: StepContext, call: Call) -> None:
        """Ask every peer that is not being asked already; the rest of a large parcel follows its answer."""
        for rank in [r for r in call.queued if r not in call.flights]:
            link, parcel = self._peers[rank], call.next_parcel(rank)
            link.sequence += 1
            tag = Tag(link.sequence, ctx.view.epoch, ctx.engine_token, ctx.step, ctx.attempt, call.layer)
            link.ours.ask(tag, self._incarnation, parcel, call.rows, call.dtype)
            call.flights[rank] = Flight(link, tag, parcel)
            link.bell.ring()

    def _collect(self, ctx: StepContext, call: Call) -> int:
        """Take what was answered, ask others for what was refused or lost; how many peers have answered."""
        settled = [f for f in call.flights.values() if f.link.theirs.answered() == f.tag.sequence]
        for flight in settled:
            parcel, lane = flight.parcel, flight.link.theirs
            refusal = lane.refusal(flight.tag, flight.link.incarnation)
            if refusal is None:
                del call.flights[parcel.rank]
                call.put(parcel, lane.answer_rows(len(parcel.pairs), call.rows.shape[1], call.dtype))
            else:
                log.warning("rows refused", by=parcel.rank, layer=call.layer, reason=refusal.reason)
                call.refuse(parcel.rank, refusal.experts or parcel.experts)
                self._again(ctx, call, parcel.rank)
        if call.failed is not None:
            self._replace_own(ctx, call, call.failed)
        excluded = self._excluded(ctx)
        if excluded & call.asked:
            for rank in {*call.flights, *call.queued}:
                if excluded >> rank & 1:
                    self.suspects.add(rank)
                    self._again(ctx, call, rank)
        if call.queued:
            self._send(ctx, call)
        return len(settled)

    def _again(self, ctx: StepContext, call: Call, rank: int) -> None:
        """Whatever `rank` has not answered goes to the next holders."""
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
            raise error from None

    def _stirred(self, call: Call) -> bool:
        """Whether there is a reason to stop sleeping: a question, an answer, or a peer lost."""
        if self.pending():
            return True
        masked = self._mask()
        return any(
            f.link.theirs.answered() == f.tag.sequence or f.link.gone or masked >> rank & 1
            for rank, f in call.flights.items()
        )

    # -- answering ---------------------------------------------------------------------------------------------------

    def pending(self) -> bool:
        """Whether `serve` has something to do."""
        for link in self._links.live:  # noqa: SIM110 - a plain loop: this runs at each turn of a spinning wait
            if link.theirs.asked() > link.served:
                return True
        return False

    def serve(self) -> int:
        """Answer what peers have asked so far; how many requests that were. Never blocks."""
        self._links.sweep()
        return self._answer(None)

    def _answer(self, call: Call | None) -> int:
        """Compute what is asked now, each expert once for all who want it; how many askers that were."""
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
                self._refuse(link, request, missing, f"rank {self._rank} does not hold experts {missing}")
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
            room = link.ours.room_for_answer(request)
            if place is None:
                room[:] = outputs
            else:
                outputs.take(place, 0, room, "clip")
            link.ours.answer(request.tag, self._incarnation)
            link.bell.ring()
        if call is not None:
            for parcel, place in zip(group.own, places[:own], strict=True):
                call.put(parcel, outputs if place is None else outputs.take(place, 0))

    def _fail(self, key: Key, group: _Group, call: Call | None, error: ExpertFailed) -> None:
        """Refuse the failed expert to those who want it, this rank's own call included, and run the rest."""
        log.error("expert failed", error=str(error), rank=self._rank)
        own = len(group.own)
        rest = _Group()
        if call is not None and any(error.expert in parcel.experts for parcel in group.own):
            call.fail_own(self._rank, group.own, error)
        else:
            rest = _Group(group.works[:own], group.own)
        for work, asker in zip(group.works[own:], group.asked, strict=True):
            if error.expert in work.experts:
                self._refuse(*asker, [error.expert], f"rank {self._rank}: {error}")
            else:
                rest.works.append(work)
                rest.asked.append(asker)
        if rest.works:
            self._run(key, rest, call)

    def _refuse(self, link: PeerLink, request: Request, experts: list[int], reason: str) -> None:
        link.ours.answer(request.tag, self._incarnation, Refusal(experts, reason))
        link.bell.ring()
