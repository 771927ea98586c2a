"""The engine's hold on ranks: joining, death, silence and full queues, with real rank processes."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator

import msgspec
import pytest

from membership.base.rank_id import RankId
from tests.support.helpers import eventually, hang
from tests.support.standins import StandInRank
from workers.fleet.fleet import Fleet, FleetEvent, RankJoined, RankLost
from workers.protocol.messages import Sampling, SeqChunk, StepBatch, StepResult

pytestmark = pytest.mark.integration
TOKEN = 5


class Ranks:
    """A fleet with its ranks attached."""

    def __init__(self, count: int) -> None:
        self.fleet = Fleet(step_deadline_s=60.0)
        self.fleet.open(TOKEN)
        self.ranks = [StandInRank(rank, 100 + rank, 4, 0.0) for rank in range(count)]
        for rank in self.ranks:
            rank.record = msgspec.structs.replace(
                rank.record, liveness_handle=bytes.fromhex(rank.receive()["liveness"])
            )
            handles = {"broadcast": self.fleet.broadcast_handle.hex(), "mask": self.fleet.mask_handle.hex()}
            rank.send(do="attach", token=TOKEN, **handles)
            rank.record = msgspec.structs.replace(
                rank.record, response_handle=bytes.fromhex(rank.receive()["response"])
            )

    def attach(self) -> None:
        for rank in self.ranks:
            self.fleet.attach(rank.record)
        joined = self.collect(lambda seen: len(seen) == len(self.ranks))
        assert sorted(joined, key=str) == [RankJoined(RankId(n, 100 + n)) for n in range(len(self.ranks))]
        self.collect(lambda _: not any(link.owed for link in self.fleet._links.values()))  # a ping to whoever joins

    def collect(self, enough: Callable[[list[FleetEvent]], bool], timeout_s: float = 30.0) -> list[FleetEvent]:
        seen: list[FleetEvent] = []
        deadline = time.monotonic() + timeout_s
        while not enough(seen):
            assert time.monotonic() < deadline, seen
            seen += self.fleet.collect(0.1, lambda: False)
        return seen

    def batch(self, step: int, *ranks: int, tokens: int = 3) -> StepBatch:
        chunk = SeqChunk(1, 0, list(range(tokens)), list(range(tokens)), Sampling())
        return StepBatch(TOKEN, 1, step, 0, [], {rank: [chunk] for rank in ranks})

    def close(self) -> None:
        self.fleet.close()
        for rank in self.ranks:
            rank.close()


@pytest.fixture
def three() -> Iterator[Ranks]:
    ranks = Ranks(3)
    yield ranks
    ranks.close()


def test_ranks_join_answer_and_leave(three: Ranks) -> None:
    three.attach()
    three.fleet.broadcast(three.batch(1, 0, 2))
    answers = three.collect(lambda seen: len(seen) == 2)
    assert {(a.rank, a.incarnation, a.step) for a in answers if isinstance(a, StepResult)} == {(0, 100, 1), (2, 102, 1)}
    three.fleet.detach(RankId(2, 102))
    three.fleet.broadcast(three.batch(2, 0, 2))
    (answer,) = three.collect(lambda seen: len(seen) == 1)
    assert isinstance(answer, StepResult)
    assert answer.rank == 0


def test_a_killed_rank_is_lost_once_and_the_others_answer(three: Ranks) -> None:
    three.attach()
    three.ranks[1].process.send_signal(signal.SIGKILL)
    three.fleet.broadcast(three.batch(1, 0, 2))
    seen = three.collect(lambda seen: len(seen) >= 3)
    (lost,) = [event for event in seen if isinstance(event, RankLost)]
    assert lost.rank_id == (1, 101)
    assert lost.source in ("robust futex", "pidfd", "queue")
    assert three.fleet.collect(0.3, lambda: False) == []


def test_an_answer_counts_even_if_its_rank_died_afterwards(three: Ranks) -> None:
    three.attach()
    link = three.fleet._links[RankId(1, 101)]
    eventually(lambda: three.fleet.collect(0.0, lambda: True) == [] and not link.owed, 30, "its answer to each ping")
    three.fleet.broadcast(three.batch(1, 1))
    eventually(link.answers.pending, 30, "its answer, which is not read yet")
    three.ranks[1].kill()
    answer, lost = three.collect(lambda seen: len(seen) == 2)
    assert isinstance(answer, StepResult)
    assert isinstance(lost, RankLost)


def test_a_stopped_rank_without_work_is_found_by_a_probe(three: Ranks) -> None:
    three.fleet._step_deadline_s = 0.5
    three.attach()
    hang(three.ranks[2].process.pid)
    three.fleet.probe()
    (lost,) = three.collect(lambda seen: len(seen) == 1)
    assert isinstance(lost, RankLost)
    assert (lost.rank_id.rank, lost.source) == (2, "deadline")
    assert lost.silent_s >= 0.5


def test_a_rank_that_loads_owes_no_ping_and_answers_it_afterwards(three: Ranks) -> None:
    three.fleet._step_deadline_s = 0.5
    three.attach()
    three.ranks[2].send(do="load")
    assert three.ranks[2].receive() == {"done": True}
    three.collect(lambda _: not any(link.owed for link in three.fleet._links.values() if link.key.rank != 2))
    hang(three.ranks[1].process.pid)
    three.fleet.probe()
    (lost,) = three.collect(lambda seen: len(seen) == 1)
    assert isinstance(lost, RankLost)
    assert lost.rank_id.rank == 1, "which owed the same ping, for as long"
    for _ in range(20):  # four deadlines
        assert three.fleet.collect(0.1, lambda: False) == []
    three.ranks[2].send(do="loaded")
    three.fleet.broadcast(three.batch(1, 2))
    (answer,) = three.collect(lambda seen: len(seen) == 1)
    assert isinstance(answer, StepResult)
    assert answer.rank == 2


def test_a_stopped_rank_whose_queue_is_full_is_given_up(three: Ranks) -> None:
    three.fleet._step_deadline_s = 0.5
    three.attach()
    hang(three.ranks[2].process.pid)
    seen: list[FleetEvent] = []
    for step in range(100):
        three.fleet.broadcast(three.batch(step, 7, tokens=3000))
        seen += three.fleet.collect(0.0, lambda: False)
    assert [(e.rank_id.rank, e.source) for e in seen if isinstance(e, RankLost)] == [(2, "deadline")]
    three.fleet.broadcast(three.batch(200, 0))
    assert three.collect(lambda seen: len(seen) == 1)


def test_a_record_that_is_no_handle_does_not_keep_others_from_joining(three: Ranks) -> None:
    bad = msgspec.structs.replace(three.ranks[0].record, incarnation=7, response_handle=b"\xc1", liveness_handle=b"x")
    three.fleet.attach(bad)
    three.attach()


def test_masking_reaches_the_ranks_page(three: Ranks) -> None:
    three.attach()
    three.fleet.mask(1)
    three.ranks[0].send(do="masked")
    assert three.ranks[0].receive() == {"masked": 0b10}
    three.fleet.adopt([])
    three.ranks[0].send(do="masked")
    assert three.ranks[0].receive() == {"masked": 0}


def test_a_rank_ten_times_slower_is_flagged_and_kept(three: Ranks) -> None:
    three.attach()
    for rank in three.ranks:
        rank.send(do="pace", step_s=0.05 if rank is three.ranks[1] else 0.005)
    deadline = time.monotonic() + 60.0
    step = 0
    while not three.fleet.slow:
        assert time.monotonic() < deadline, "it is not flagged"
        step += 1
        three.fleet.broadcast(three.batch(step, 0, 1, 2))
        seen = three.collect(lambda seen: len(seen) == 3, 30.0)
        assert all(isinstance(event, StepResult) for event in seen), seen
    assert set(three.fleet.slow) == {1}


@pytest.mark.parametrize("how", ["free", "locked"])
def test_a_native_hang_is_found_with_the_interpreters_lock_held_and_without(three: Ranks, how: str) -> None:
    three.attach()
    three.ranks[1].send(do="hang", how=how)
    seen: list[FleetEvent] = []
    for step in range(100):  # until it has taken note
        three.fleet.broadcast(three.batch(step, 0, 1, 2))
        seen = three.collect(lambda seen: len(seen) == 3, 30.0)
        if any(isinstance(event, RankLost) for event in seen):
            break
    assert [(e.rank_id.rank, e.source) for e in seen if isinstance(e, RankLost)] == [(1, "hung")]


def test_a_rank_that_computes_for_long_is_waited_for(three: Ranks) -> None:
    three.attach()
    three.ranks[1].send(do="hang", how="busy")
    for step in range(100):
        three.fleet.broadcast(three.batch(step, 0, 1, 2))
        began = time.monotonic()
        seen = three.collect(lambda seen: len(seen) == 3, 30.0)
        assert all(isinstance(event, StepResult) for event in seen), seen
        if time.monotonic() - began > 2.0:
            return
    raise AssertionError("it has never computed for long")


def test_a_stopped_rank_is_given_up_long_before_the_deadline_and_learns_it(three: Ranks) -> None:
    three.attach()
    for step in range(10):
        three.fleet.broadcast(three.batch(step, 0, 1, 2))
        three.collect(lambda seen: len(seen) == 3, 30.0)
    hang(three.ranks[2].process.pid)
    three.fleet.broadcast(three.batch(10, 0, 1, 2))
    seen = three.collect(lambda seen: len(seen) == 3, 30.0)
    (lost,) = [event for event in seen if isinstance(event, RankLost)]
    assert (lost.rank_id.rank, lost.source) == (2, "stopped")
    three.ranks[2].process.send_signal(signal.SIGCONT)
    three.ranks[2].send(do="evicted")
    assert three.ranks[2].receive() == {"evicted": True}
    three.ranks[1].send(do="evicted")
    assert three.ranks[1].receive() == {"evicted": False}
