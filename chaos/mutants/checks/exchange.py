"""Three ranks exchange rows in one process, a thread each: whoever is lost on the way, the sums are the same bits."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from chaos.mutants.checks.promise import require
from membership.base.errors import CoverageLost, ElasticError
from membership.base.rank_id import RankId
from membership.store.records import Member, Placement, View
from workers.exchange.router import Parcel

if TYPE_CHECKING:
    from torch import Tensor


EXPERTS = 4
WITHIN_S, AT_ONCE_S = 5.0, 0.25
PLACEMENT: Placement = {0: ((0, 1),), 1: ((2, 3),), 2: ((1, 2),)}  # expert 3: on rank 1 alone
REPLICATED: Placement = {0: ((0, 1),), 1: ((2, 3),), 2: ((0, 2, 3),)}


class _Experts:
    """Cheap experts that are no linear maps: a row summed in another order or by another expert shows in the bits."""

    def __init__(self, held: Sequence[int]) -> None:
        self.held = set(held)
        self.computed = 0

    def holds(self, layer: int, expert: int) -> bool:
        return expert in self.held

    def padded(self, rows: int) -> int:
        return rows

    def compute_many(self, layer: int, experts: Sequence[int], sizes: Sequence[int], rows: Tensor) -> Tensor:
        import torch

        self.computed += len(rows)
        parts = zip(experts, torch.split_with_sizes(rows, list(sizes)), strict=True)
        return torch.cat([(part * (1.0 + 0.37 * e)).tanh() * 3.7**e for e, part in parts])


class _Rank:
    """One rank. Its thread answers its peers, unless it hangs."""

    def __init__(self, rank: int, placement: Placement) -> None:
        from workers.exchange.loop import Exchange
        from workers.exchange.shm.transport import ShmTransport
        from workers.ipc.doorbell import Doorbell

        self.bank = _Experts(placement[rank][0])
        self.bell, self.masked, self._stop = Doorbell(), 0, threading.Event()
        self.key = RankId(rank, rank + 1)
        self.exchange = Exchange(
            self.key,
            self.bank,
            self.bell,
            partial(ShmTransport, area=1 << 20),
            lambda: self.masked,
            answer_timeout_s=2 * WITHIN_S,
        )
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def answer(self) -> None:
        """Begin to answer peers."""
        self._thread.start()

    def _serve(self) -> None:
        while not self._stop.is_set():
            self.bell.wait(self.exchange.pending, 0.05)
            self.exchange.serve()

    def end(self) -> None:
        """As when its process ends: its peers' links break."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(WITHIN_S)
        self.exchange.close()


@contextmanager
def _ranks(placement: Placement, *, hanging: int = -1) -> Iterator[list[_Rank]]:
    """Three ranks that are linked; all but the first, which asks, and the one that hangs, answer."""
    from workers.exchange.base import StepContext

    ranks = [_Rank(rank, placement) for rank in sorted(placement)]
    with ExitStack() as ends:
        for rank in ranks:
            ends.callback(rank.end)
        handles = {rank.key: rank.exchange.handle() for rank in ranks}
        for rank in reversed(ranks):  # the newer dials
            older = {peer: handle for peer, handle in handles.items() if peer < rank.key}
            rank.exchange.connect(older, WITHIN_S)
        ranks[0].exchange.connect(handles, WITHIN_S)
        members = tuple(Member(rank=rank.key.rank, node="a", incarnation=rank.key.incarnation) for rank in ranks)
        ranks[0].exchange.begin_step(StepContext(View(epoch=1, members=members, placement=placement), 7, 1, 0))
        for rank in ranks[1:]:
            if rank.key.rank != hanging:
                rank.answer()
        yield ranks


def _rows() -> tuple[Tensor, Tensor, Tensor]:
    """(hidden, ids, weights): the last row wants expert 3 too."""
    import torch

    g = torch.Generator().manual_seed(5)
    ids = torch.tensor([[2, 0, 1], [1, 2, 0], [0, 1, 2], [3, 0, 2]])
    return torch.randn(4, 16, generator=g), ids, torch.rand(4, 3, generator=g)


def _right(hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """What one rank that holds everything computes."""
    from workers.exchange.local import LocalExchange

    return LocalExchange(_Experts(range(EXPERTS))).dispatch_combine(0, hidden, *_sorted(ids, weights))


def _sorted(ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """In an order that the product has no say in."""
    order = [sorted(range(ids.shape[1]), key=row.__getitem__) for row in ids.tolist()]
    return ids.gather(1, ids.new_tensor(order)), weights.gather(1, ids.new_tensor(order))


def rows() -> None:
    """All alive; one masked; one that stops answering and then dies; the only holder of an expert dead."""
    import torch

    hidden, ids, weights = _rows()
    right = _right(hidden, ids, weights)

    def same(asker: _Rank, what: str) -> None:
        began = time.monotonic()
        got = asker.exchange.dispatch_combine(0, hidden, ids, weights)
        require(torch.equal(got, right), f"the sums differ {what}")
        require(time.monotonic() - began < WITHIN_S, f"{time.monotonic() - began:.1f} s {what}")

    with _ranks(PLACEMENT) as ranks:
        same(ranks[0], "with all ranks alive")
        ranks[1].end()
        try:
            ranks[0].exchange.dispatch_combine(0, hidden, ids, weights)
        except CoverageLost as lost:
            require("3" in str(lost), f"it is not said what is lost: {lost}")
        else:
            require(False, "an answer was computed without an expert")
    with _ranks(REPLICATED) as ranks:
        ranks[0].masked = 1 << 2
        same(ranks[0], "with a rank masked")
        require(not ranks[2].bank.computed, "a masked rank was asked")
    noticed_s = [_after_death(hidden, ids, weights, right) for _ in range(3)]
    require(min(noticed_s) < AT_ONCE_S, f"the asker slept on for {min(noticed_s):.2f} s after a rank had died")


def _after_death(hidden: Tensor, ids: Tensor, weights: Tensor, right: Tensor) -> float:
    """A rank dies that was asked and has not answered: how long it takes from then until the sums are there."""
    import torch

    died = list[float]()
    with _ranks(REPLICATED, hanging=2) as ranks:

        def die() -> None:
            died.append(time.monotonic())
            ranks[2].end()

        dies = threading.Timer(0.05, die)
        dies.start()
        try:
            got = ranks[0].exchange.dispatch_combine(0, hidden, ids, weights)
        finally:
            dies.join(WITHIN_S)
        require(torch.equal(got, right), "the sums differ after a rank died that had been asked")
        require(ranks[0].exchange.retried_rows, "nothing had been asked of the rank that died")
        return time.monotonic() - died[0]


def strangers() -> None:
    """Who means another incarnation of a rank, or is an older one itself, is not linked: one of them is a zombie."""
    from workers.exchange.loop import Exchange
    from workers.exchange.shm.transport import ShmTransport
    from workers.ipc.doorbell import Doorbell

    with ExitStack() as ends:

        def exchange(rank: int, incarnation: int) -> Exchange:
            bell = Doorbell()
            made = Exchange(RankId(rank, incarnation), _Experts(()), bell, partial(ShmTransport, area=1 << 16))
            ends.callback(bell.close)
            ends.callback(made.close)
            return made

        here, newer, older = exchange(0, 5), exchange(1, 9), exchange(1, 8)
        newer.connect({RankId(0, 5): here.handle()}, WITHIN_S)
        for dialler, means in ((older, 5), (exchange(2, 7), 4)):
            try:
                dialler.connect({RankId(0, means): here.handle()}, 0.5)
            except ElasticError as refused:
                require(str(refused), "a refusal without a reason")
            else:
                require(False, f"a link was made with incarnation {means} of a rank that is 5, or from an older one")
        require(len(here.inbox(RankId(1, 9))) > 0, "the newest incarnation's link is gone")


class _Seen(Parcel):
    """A parcel that has the peer look into the lane whenever the writer looks at the parcel: as if it stopped there."""

    def __getattribute__(self, name: str) -> Any:
        if name in ("rows", "pairs", "row_of", "experts", "counts"):
            object.__getattribute__(self, "look")()
        return object.__getattribute__(self, name)


def torn_requests() -> None:
    """A rank may be stopped in the middle of asking: its peer sees the request before, or the new one, or none."""
    import numpy as np

    from workers.exchange.link import Tag
    from workers.exchange.shm.wire import ASK, Lane, lane_bytes
    from workers.ipc.shared_memory import Segment

    with Segment.create(lane_bytes(1 << 16), "elastic-ep-check-lane") as segment:
        writer, reader = Lane(segment), Lane(Segment.attach(segment.fileno()))
        seen = Counter[int]()

        def look() -> None:
            number = reader.words[ASK]
            request = reader.request(number, 3) if number else None
            if request is not None:
                size = 1 + number % 9
                says = [request.experts, request.counts, request.row_of.tolist()]
                require(says == [[size] * size, [size] * size, [size - 1] * size], f"a torn request was seen: {says}")
                seen[number] += 1

        for number in range(1, 40):
            size = 1 + number % 9
            rows = np.arange(size)
            parcel = _Seen(1, rows, rows, np.full(size, size - 1), [size] * size, [size] * size)
            object.__setattr__(parcel, "look", look)
            content = np.full((size, 8), size, dtype=np.int32)
            writer.ask(Tag(number, 1, 7, number, 0, 0), 3, parcel, content, 0)
            look()
        reader.close()
        writer.close()
    require(set(seen) == set(range(1, 40)), f"of 39 requests {len(seen)} were seen")
