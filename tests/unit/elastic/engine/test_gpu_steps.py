"""Steps that all ranks run together over their GPUs: which they are, and that a rank's loss ends them for all."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from elastic.engine.gpu_steps import GpuSteps
from elastic.engine.loop import Engine, Peers
from elastic.engine.scheduler import Scheduler
from membership.base.enums import DetectedBy
from membership.base.rank_id import RankId
from membership.store.records import ClusterState, View
from tests.support.rank_model import TOKEN, ask, config, view
from tests.unit.elastic.engine.test_loop import Ranks
from workers.fleet.fleet import RankLost
from workers.protocol.messages import SeqChunk, StepBatch, StepResult, StepStatus

pytestmark = pytest.mark.unit

NEAR = frozenset({RankId(0, 10), RankId(1, 11), RankId(2, 12)})
HALF = {0: ((0,), (0,)), 1: ((1,), (1,)), 2: ((0, 1), (0, 1))}  # of the experts of both layers


def apart_view(epoch: int = 1, ranks: tuple[int, ...] = (0, 1), other: str = "n") -> View:
    """Each of ranks 0 and 1 holds half of the experts. `other`: the agent of the last one."""
    whole = view(epoch, {rank: 10 + rank for rank in ranks})
    members = *whole.members[:-1], msgspec.structs.replace(whole.members[-1], node=other)
    whole = msgspec.structs.replace(whole, members=members)
    return msgspec.structs.replace(whole, placement={rank: HALF[rank] for rank in ranks})


def batch(sizes: dict[int, list[int]], masked: tuple[int, ...] = (), epoch: int = 1) -> StepBatch:
    ranks = {r: [SeqChunk(i, 0, [5] * n, [0]) for i, n in enumerate(each)] for r, each in sizes.items()}
    return StepBatch(TOKEN, epoch, 1, 0, [*masked], ranks)


def steps(slots: int = 2) -> GpuSteps:
    return GpuSteps(config(gpu_exchange=slots))


def test_a_decode_step_names_all_live_ranks_and_rises() -> None:
    gpu, used = steps(3), apart_view(1, (0, 1, 2))
    first = gpu.plan(batch({0: [1, 1]}, masked=(2,)), used, NEAR, 5.0)
    assert (first.together, list(first.ranks), first.ranks[1]) == (5_000_000, [0, 1], [])
    assert not gpu.plan(batch({0: [1]}, masked=(1, 2)), used, NEAR, 5.0).together, "alone"
    assert gpu.plan(batch({0: [1]}), used, NEAR, 5.0).together == 5_000_002, "past both layers of the one before"


@pytest.mark.parametrize(
    ("sizes", "used", "near"),
    [
        ({0: [1]}, apart_view(1, (0, 2)), NEAR),
        ({0: [1]}, apart_view(), frozenset({RankId(0, 10)})),
        ({0: [1]}, apart_view(other="m"), NEAR),
        ({0: [1]}, view(1, {0: 10, 1: 11}), NEAR),
    ],
    ids=["no slot", "another host", "another agent's windows", "all hold all"],
)
def test_other_steps_are_as_ever(sizes: dict[int, list[int]], used: View, near: frozenset[RankId]) -> None:
    given = batch(sizes)
    gpu = steps()
    assert gpu.plan(given, used, near, 5.0) is given
    assert gpu.failed() == 0, "there is nothing to call off"


def test_a_loss_calls_off_all_numbers_so_far_once() -> None:
    gpu = steps()
    assert gpu.plan(batch({0: [1]}), apart_view(), NEAR, 5.0).together == 5_000_000
    assert (gpu.failed(), gpu.failed()) == (5_000_002, 0)
    assert not gpu.ended()


def answer(status: StepStatus, epoch: int = 1) -> StepResult:
    return StepResult(1, 11, TOKEN, epoch, 1, 0, status)


def test_a_rank_that_fails_ends_the_step_of_all() -> None:
    gpu = steps()
    gpu.plan(batch({0: [1]}), apart_view(), NEAR, 5.0)
    assert gpu.answered(answer(StepStatus.OK)) == 0
    assert gpu.answered(answer(StepStatus.FAILED)) == 5_000_002
    assert gpu.plan(batch({0: [1]}), apart_view(), NEAR, 6.0).together


@pytest.mark.parametrize("status", [StepStatus.APART, StepStatus.CALLED_OFF])
def test_a_view_in_which_a_rank_cannot_or_gives_up_by_itself_has_no_more(status: StepStatus) -> None:
    gpu = steps()
    gpu.plan(batch({0: [1]}), apart_view(), NEAR, 5.0)
    assert gpu.answered(answer(status)) == 5_000_002
    assert not gpu.plan(batch({0: [1]}), apart_view(), NEAR, 6.0).together
    assert gpu.plan(batch({0: [1]}, epoch=2), apart_view(2), NEAR, 6.0).together


def test_what_we_have_called_off_is_no_reason_against_the_view() -> None:
    gpu = steps()
    gpu.plan(batch({0: [1]}), apart_view(), NEAR, 5.0)
    assert gpu.failed()
    assert gpu.answered(answer(StepStatus.CALLED_OFF)) == 0
    assert gpu.plan(batch({0: [1]}), apart_view(), NEAR, 6.0).together


def test_the_first_of_a_view_that_goes_well_is_told() -> None:
    gpu, told = steps(), []
    for epoch in (1, 1, 2):
        gpu.plan(batch({0: [1]}, epoch=epoch), apart_view(epoch), NEAR, 5.0)
        told.append(gpu.ended())
    assert told == [True, False, True]


class GpuRanks(Ranks):
    """Two ranks on GPUs: rank 0 answers a step of both only once it is called off after the death of rank 1."""

    def __init__(self) -> None:
        super().__init__()
        self.near = NEAR
        self.batches: list[StepBatch] = []
        self.events: list[str] = []

    def broadcast(self, batch: StepBatch) -> None:
        self.batches.append(batch)
        dying = self.dying
        super().broadcast(batch)
        if batch.together and not dying:
            idle = [rank for rank, chunks in batch.ranks.items() if not chunks]
            self.happened += [self._answer(batch, rank, StepStatus.OK) for rank in idle]
        if dying:
            self.happened = [each for each in self.happened if isinstance(each, RankLost)]

    def call_off(self, below: int) -> None:
        self.log.append(("called off", below))
        self.happened.append(self._answer(self.batches[-1], 0, StepStatus.CALLED_OFF))

    def _answer(self, batch: StepBatch, rank: int, status: StepStatus) -> StepResult:
        return StepResult(rank, self.members[rank], TOKEN, batch.epoch, batch.step, batch.attempt, status)

    def emit(self, kind: str, **_: object) -> None:
        self.events.append(kind)


def test_a_step_waits_for_ranks_without_requests_and_goes_on_without_a_dead_one() -> None:
    ranks: Any = GpuRanks()
    mirror: Any = SimpleNamespace(state=lambda: ClusterState(revision=1, engine_token=TOKEN))
    engine = Engine(config(gpu_exchange=3), TOKEN, Peers(mirror, ranks, ranks, ranks, ranks), clock=lambda: 1.0)
    used = msgspec.structs.replace(apart_view(), placement={0: HALF[2], 1: HALF[1]})  # rank 0 can do it alone
    engine._scheduler.set_view(used, (), 0.0)
    engine._scheduler.submit(ask("a", [1], 20, ignore_eos=True), 0.0)
    engine.turn()
    assert [(rank, len(chunks)) for rank, chunks in ranks.batches[-1].ranks.items()] == [(0, 1), (1, 0)]
    assert "gpu_exchange_used" in ranks.events
    ranks.dying = True
    engine.turn()  # begins the step, and learns of the death
    assert ranks.log[-1] == ("called off", ranks.batches[-1].together + 2)
    assert engine._scheduler.unanswered == {0}
    engine.turn()
    assert not engine._scheduler.unanswered
    engine.turn()
    assert (ranks.batches[-1].together, list(ranks.batches[-1].ranks)) == (0, [0]), "at once, and alone"
    assert ranks.batches[-1].ranks[0] == ranks.batches[-2].ranks[0], "the same chunk"


def test_the_loss_of_a_rank_without_requests_is_a_loss_all_the_same() -> None:
    ranks: Any = GpuRanks()
    ranks.kv.run = lambda batch, members: []  # nobody answers
    mirror: Any = SimpleNamespace(state=lambda: ClusterState(revision=1, engine_token=TOKEN))
    engine = Engine(config(gpu_exchange=2), TOKEN, Peers(mirror, ranks, ranks, ranks, ranks), clock=lambda: 1.0)
    engine._scheduler.set_view(apart_view(), (), 0.0)
    engine._scheduler.submit(ask("a", [1], 20, ignore_eos=True), 0.0)
    ranks.happened.append(RankLost(RankId(1, 11), DetectedBy.ROBUST_FUTEX, 0.0, ended=True))
    engine.turn()
    assert ("called off", ranks.batches[-1].together + 2) in ranks.log
    assert engine._scheduler.unanswered == {0}


def test_a_piece_of_a_prompt_is_computed_together_too() -> None:
    """Whatever its length: windows have room for what the scheduler gives a rank at most."""
    gpu = steps()
    most = config().max_batched_tokens
    assert gpu.plan(batch({0: [1, most - 1], 1: [60, 60]}), apart_view(), NEAR, 5.0).together


def test_an_answer_that_a_dead_rank_owed_is_not_owed_by_its_successor() -> None:
    """It had no requests, so nothing else followed before the view in which its slot is filled again."""
    scheduler = Scheduler(config(), TOKEN, 0.0)
    scheduler.set_view(apart_view(), (), 0.0)
    scheduler.served_by([1])
    assert scheduler.unanswered == {1}
    scheduler.lose_ranks([1], 0.0, ended=True)
    successor = msgspec.structs.replace(view(2, {0: 10, 1: 12}), placement=apart_view().placement)
    scheduler.set_view(successor, (), 0.0)
    assert not scheduler.unanswered
