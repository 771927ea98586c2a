"""Three ranks of one process, a thread each: whichever is lost on the way, the sums are the same bits.

Rank 0 asks; experts 0 and 1 are its own. Cheaper and closer in time than the processes of `test_exchange.py`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import pytest
import torch
from torch import Tensor

from membership.base.errors import CoverageLost
from membership.base.rank_id import RankId
from membership.store.records import Member, Placement, View
from tests.support.exchange_ranks import Experts
from tests.support.helpers import eventually
from tests.support.local_exchange import LocalExchange
from workers.exchange.loop import Exchange
from workers.exchange.model_side import StepContext
from workers.exchange.shm.transport import ShmTransport
from workers.ipc.doorbell import Doorbell

pytestmark = pytest.mark.integration

WITHIN_S, AT_ONCE_S = 30.0, 0.25
SINGLE: Placement = {0: ((0, 1),), 1: ((2, 3),), 2: ((1, 2),)}  # expert 3 is on rank 1 alone
REPLICATED: Placement = {0: ((0, 1),), 1: ((2, 3),), 2: ((0, 2, 3),)}
IDS = torch.tensor([[2, 0, 1], [1, 2, 0], [0, 1, 2], [3, 0, 2]])


class ThreadRank:
    """One rank. Once `answering`, its thread answers its peers."""

    def __init__(self, rank: int, placement: Placement) -> None:
        self.id = RankId(rank, rank + 1)
        self.bank, self.bell, self.masked = Experts(rank, placement), Doorbell(), 0
        self.exchange = Exchange(
            self.id,
            self.bank,
            self.bell,
            partial(ShmTransport, area=1 << 20),
            lambda: self.masked,
            answer_timeout_s=20.0,
        )
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def answer(self) -> None:
        self._thread.start()

    def _serve(self) -> None:
        while not self._stop.is_set():
            self.bell.wait(self.exchange.pending, 0.05)
            self.exchange.serve()

    def end(self) -> None:
        """Break its peers' links, as the end of its process does."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(WITHIN_S)
        self.exchange.close()


@contextmanager
def linked(placement: Placement, *, hanging: int = -1) -> Iterator[list[ThreadRank]]:
    """Three linked ranks in their first step. All but rank 0, and the one that hangs, answer."""
    ranks = [ThreadRank(rank, placement) for rank in sorted(placement)]
    with ExitStack() as ends:
        for rank in ranks:
            ends.callback(rank.bell.close)
            ends.callback(rank.end)
        handles = {rank.id: rank.exchange.handle() for rank in ranks}
        for rank in reversed(ranks):  # the newer one dials
            rank.exchange.connect({peer: handle for peer, handle in handles.items() if peer < rank.id}, WITHIN_S)
        ranks[0].exchange.connect(handles, WITHIN_S)
        members = tuple(Member(rank=rank.id.rank, node="a", incarnation=rank.id.incarnation) for rank in ranks)
        ranks[0].exchange.begin_step(StepContext(View(epoch=1, members=members, placement=placement), 7, 1, 0))
        for rank in ranks[1:]:
            if rank.id.rank != hanging:
                rank.answer()
        yield ranks


@pytest.fixture
def rows() -> tuple[Tensor, Tensor]:
    """(hidden, weights) for IDS."""
    g = torch.Generator().manual_seed(5)
    return torch.randn(4, 16, generator=g), torch.rand(4, 3, generator=g)


@pytest.fixture
def right(rows: tuple[Tensor, Tensor]) -> Tensor:
    """What a rank that holds everything computes, from ids sorted here."""
    hidden, weights = rows
    order = torch.tensor([sorted(range(3), key=row.__getitem__) for row in IDS.tolist()])
    everything = Experts(0, {0: (tuple(range(4)),)})
    return LocalExchange(everything).dispatch_combine(0, hidden, IDS.gather(1, order), weights.gather(1, order))


def test_with_all_alive_and_without_the_only_holder(rows: tuple[Tensor, Tensor], right: Tensor) -> None:
    hidden, weights = rows
    with linked(SINGLE) as ranks:
        assert torch.equal(ranks[0].exchange.dispatch_combine(0, hidden, IDS, weights), right)
        ranks[1].end()
        with pytest.raises(CoverageLost, match="3"):
            ranks[0].exchange.dispatch_combine(0, hidden, IDS, weights)


def test_a_masked_rank_is_not_asked(rows: tuple[Tensor, Tensor], right: Tensor) -> None:
    hidden, weights = rows
    with linked(REPLICATED) as ranks:
        ranks[0].masked = 1 << 2
        assert torch.equal(ranks[0].exchange.dispatch_combine(0, hidden, IDS, weights), right)
        assert not ranks[2].bank.calls


def test_a_death_wakes_whichever_rank_waits_for_an_answer(rows: tuple[Tensor, Tensor], right: Tensor) -> None:
    assert any(_noticed_s(rows, right) < AT_ONCE_S for _ in range(10)), "not once in ten times"


def _noticed_s(rows: tuple[Tensor, Tensor], right: Tensor) -> float:
    """Seconds from the death of a rank that was asked until the sums are there."""
    hidden, weights = rows
    died_at = list[float]()
    with linked(REPLICATED, hanging=2) as ranks:

        def die() -> None:
            eventually(ranks[2].exchange.pending, WITHIN_S, "it to be asked")
            died_at.append(time.monotonic())
            ranks[2].end()

        dies = threading.Thread(target=die)
        dies.start()
        try:
            got = ranks[0].exchange.dispatch_combine(0, hidden, IDS, weights)
        finally:
            dies.join(WITHIN_S)
        assert torch.equal(got, right)
        assert ranks[0].exchange.retried_rows, "nothing had been asked of the rank that died"
        return time.monotonic() - died_at[0]
