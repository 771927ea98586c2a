"""Requests that move with their KV blocks off ranks about to leave: what is copied when, and what undoes it."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from chaos.simulation.kv_model import KvModel
from elastic.engine.adoption import leaving
from elastic.engine.scheduler import Scheduler
from membership.base.timing import COPY_TIMEOUT_S
from membership.store.records import ClusterState, Member, View
from tests.support.rank_model import TOKEN, Client, ask, config, drive, pool_is_whole, view
from workers.protocol.messages import CopyBlocks, StepBatch

pytestmark = pytest.mark.unit

MEMBERS = {0: 10, 1: 11}


class Scene:
    """Two ranks or more, each with requests that decode; rank 1 is about to leave."""

    def __init__(
        self, requests: int = 2, prompt: int = 9, ranks: int = 2, kv_blocks: int = 60, **changes: object
    ) -> None:
        self.scheduler = Scheduler(config(kv_blocks=kv_blocks, **changes), TOKEN)
        self.members = dict(enumerate(range(10, 10 + ranks)))
        self.scheduler.set_view(view(1, self.members), [], 0.0)
        self.ranks, self.client = KvModel(4), Client()
        for n in range(requests):
            self.client.submit(self.scheduler, ask(f"r{n}", [5 + n] * prompt, 25, ignore_eos=True), 0.0)
        for _ in range(3):
            self.step()
        self.scheduler.leave([1])

    def step(self, now: float = 0.0) -> StepBatch | None:
        batch = self.scheduler.schedule(now)
        for result in self.ranks.run(batch, self.members) if batch is not None else []:
            self.client.take(self.scheduler.apply(result, now))
        return batch

    def exported(self, **how: object) -> list[CopyBlocks]:
        """The source's half of the next copy is done; what the target is asked."""
        (order,) = self.scheduler.copies(0.0)
        assert not order.arriving
        return self.scheduler.copied(self.ranks.copy(order, **how), 0.0)  # type: ignore[arg-type]

    def move(self, piece: int = 100, *orders: CopyBlocks) -> int:
        """Copy until nothing is asked any more, with steps between; how many halves that were."""
        copies = rounds = 0
        orders += tuple(self.scheduler.copies(0.0))
        while orders or self.scheduler.waited_for:
            self.step()
            answers = [self.ranks.copy(order, piece) for order in orders]
            orders = tuple(more for answer in answers for more in self.scheduler.copied(answer, 0.0))
            orders += tuple(self.scheduler.copies(0.0))
            pool_is_whole(self.scheduler)
            copies, rounds = copies + len(orders), rounds + 1
            assert rounds < 500, "the moves do not end"
        return copies

    def homes(self) -> dict[int, int]:
        """rank -> number of requests on it."""
        return {home.rank: len(home.running) for home in self.scheduler._homes.values()}

    def finish(self, members: dict[int, int]) -> None:
        """All requests end as the oracle says, and every block is free again."""
        drive(self.scheduler, self.ranks, self.client, members)
        self.client.check()
        pool_is_whole(self.scheduler)


def test_a_request_goes_on_elsewhere_with_what_was_computed() -> None:
    scene = Scene(4)
    scene.move()
    assert scene.homes() == {0: 4, 1: 0}
    assert [(m.source, m.target) for m in scene.scheduler.moved()] == [(1, 0)] * 2
    assert scene.scheduler.moved() == []
    assert all(s.computed >= 9 for s in scene.scheduler._homes[0].running), "nothing was thrown away"
    assert scene.scheduler.set_view(view(2, {0: 10}), [], 0.0) == []
    scene.finish({0: 10})


def test_a_move_lasts_from_its_first_order_to_its_last_answer() -> None:
    scene = Scene(2)
    (order,) = scene.scheduler.copies(1.0)
    (arrival,) = scene.scheduler.copied(scene.ranks.copy(order), 1.125)
    assert scene.scheduler.copied(scene.ranks.copy(arrival), 1.25) == []
    assert [moved.ms for moved in scene.scheduler.moved()] == [250.0]


def test_several_ranks_empty_at_once() -> None:
    scene = Scene(8, ranks=4)
    scene.scheduler.leave([2, 3])
    scene.move()
    assert scene.homes() == {0: 4, 1: 4, 2: 0, 3: 0}
    assert {m.target for m in scene.scheduler.moved()} == {0, 1}
    scene.finish(scene.members)


def test_a_rank_takes_in_one_request_at_a_time() -> None:
    """However many leave: its steps go on meanwhile, and each copy that it makes delays them."""
    scene = Scene(3, ranks=3)
    scene.scheduler.leave([1, 2])
    orders = scene.scheduler.copies(0.0)
    assert len(orders) == 1
    scene.move(100, *orders)
    assert scene.homes() == {0: 3, 1: 0, 2: 0}
    scene.finish(scene.members)


def test_nothing_goes_on_to_a_rank_that_is_about_to_leave_too() -> None:
    scene = Scene(3, ranks=3)
    (order,) = scene.scheduler.copies(0.0)
    (arrival,) = scene.scheduler.copied(scene.ranks.copy(order), 0.0)
    target = arrival.addressee.rank
    (other,) = {0, 2} - {target}
    scene.scheduler.leave([1, target])
    scene.move(100, arrival)
    assert {moved.target for moved in scene.scheduler.moved()} == {other}
    assert scene.homes() == {other: 3, target: 0, 1: 0}
    scene.finish(scene.members)


def test_only_the_request_on_its_way_pauses_and_only_while_its_last_blocks_are_copied() -> None:
    scene = Scene(2)
    (order,) = scene.scheduler.copies(0.0)
    batch = scene.step()
    assert batch is not None
    assert {rank: len(chunks) for rank, chunks in batch.ranks.items()} == {0: 1}, "it may fit into one piece"
    (order,) = scene.scheduler.copied(scene.ranks.copy(order, 1), 0.0)
    assert (order.arriving, len(order.blocks)) == (True, 1), "one piece of several after all"
    orders = scene.scheduler.copied(scene.ranks.copy(order), 0.0)
    batch = scene.step()
    assert batch is not None
    assert set(batch.ranks) == {0, 1}, "so it goes on meanwhile"
    assert scene.move(1, *orders) > 4
    assert scene.homes() == {0: 2, 1: 0}
    scene.finish(MEMBERS)


def test_no_new_request_is_homed_on_a_departing_rank() -> None:
    scene = Scene(0)
    for n in range(3):
        scene.client.submit(scene.scheduler, ask(f"r{n}", [5 + n]), 0.0)
    scene.step()
    assert scene.homes() == {0: 3, 1: 0}
    scene.scheduler.leave([0, 1])
    scene.client.submit(scene.scheduler, ask("more", [9]), 0.0)
    scene.step()
    assert scene.homes() == {0: 3, 1: 1}, "unless all of them leave"
    scene.finish(MEMBERS)


def test_a_request_in_mid_prefill_moves_what_it_has() -> None:
    scene = Scene(0, max_batched_tokens=9)
    scene.scheduler.leave([0])
    scene.client.submit(scene.scheduler, ask("long", list(range(40)), 4, ignore_eos=True), 0.0)
    scene.step()
    scene.scheduler.leave([1])
    scene.move()
    (moved,) = scene.scheduler.moved()
    assert 9 <= moved.tokens < 40
    assert moved.tokens == scene.scheduler._homes[0].running[0].computed
    scene.finish(MEMBERS)


def test_a_request_that_has_computed_nothing_moves_without_a_copy() -> None:
    scene = Scene(0)
    scene.scheduler.leave([0])
    scene.client.submit(scene.scheduler, ask("new", [5], ignore_eos=True), 0.0)
    scene.scheduler._admit(0.0)
    scene.scheduler.leave([1])
    assert scene.scheduler.copies(0.0) == []
    assert scene.homes() == {0: 1, 1: 0}
    scene.finish(MEMBERS)


def test_a_change_taken_back_leaves_each_request_where_it_is() -> None:
    scene = Scene(6)
    asked = scene.exported()
    scene.scheduler.leave([])
    assert [scene.scheduler.copied(scene.ranks.copy(order), 0.0) for order in asked] == [[]]
    assert scene.scheduler.copies(0.0) == []
    assert scene.homes() == {0: 3, 1: 3}
    assert not scene.scheduler.waited_for
    scene.finish(MEMBERS)


@pytest.mark.parametrize("half", ["source", "target"])
@pytest.mark.parametrize("dead", [0, 1])
def test_a_death_in_mid_copy(half: str, dead: int) -> None:
    scene = Scene(2)
    (order,) = scene.exported() if half == "target" else scene.scheduler.copies(0.0)
    lost = scene.scheduler.lose_ranks([dead], 0.0)
    assert lost == [f"r{dead}"], "the moved one still lived at its source"
    assert scene.scheduler.copied(scene.ranks.copy(order), 0.0) == []
    pool_is_whole(scene.scheduler)
    if dead == 0:
        assert not scene.scheduler.waited_for, "there is no rank left to move to"
        assert scene.homes() == {1: 1}
    scene.finish({1 - dead: MEMBERS[1 - dead]})


def test_a_commit_in_mid_copy_computes_again_what_has_not_arrived() -> None:
    scene = Scene(2)
    (order,) = scene.exported()
    assert scene.scheduler.set_view(view(2, {0: 10}), [], 0.0) == ["r1"]
    assert scene.scheduler.copied(scene.ranks.copy(order), 0.0) == []
    scene.finish({0: 10})


@pytest.mark.parametrize("half", ["source", "target"])
def test_a_copy_that_fails_leaves_the_request_where_it_is(half: str) -> None:
    scene = Scene(4)
    (order,) = scene.exported() if half == "target" else scene.scheduler.copies(0.0)
    assert scene.scheduler.copied(scene.ranks.copy(order, error="no link"), 0.0) == []
    assert scene.scheduler.waited_for == {1}, "the other one may still be moved"
    scene.move()
    assert scene.homes() == {0: 3, 1: 1}
    assert not scene.scheduler.waited_for
    scene.finish(MEMBERS)


@pytest.mark.parametrize("half", ["leaving", "arriving"])
def test_an_answer_to_an_earlier_copy_has_no_effect(half: str) -> None:
    scene = Scene()
    (order,) = scene.exported() if half == "arriving" else scene.scheduler.copies(0.0)
    answer = scene.ranks.copy(order)
    assert scene.scheduler.copied(replace(answer, copy=order.copy - 1), 0.0) == []
    before = scene.homes()
    assert scene.scheduler.copied(answer, 0.0) or scene.homes() != before, "the answer to this one has"


def test_a_rank_that_says_nothing_is_not_waited_for() -> None:
    scene = Scene(2)
    (order,) = scene.scheduler.copies(0.0)
    late = COPY_TIMEOUT_S + 1.0
    assert scene.scheduler.copies(late) == []
    assert not scene.scheduler.waited_for
    assert scene.scheduler.copied(scene.ranks.copy(order), late) == []
    batch = scene.step(late)
    assert batch is not None
    assert set(batch.ranks) == {0, 1}, "it runs again where it was"
    scene.finish(MEMBERS)


def test_a_request_that_ends_on_its_way_gives_back_the_room_it_was_to_have() -> None:
    scene = Scene(2)
    (order,) = scene.exported()
    scene.scheduler.abort("r1")
    del scene.client.requests["r1"]
    assert scene.scheduler.copied(scene.ranks.copy(order), 0.0) == []
    assert scene.scheduler._homes[1].pool.used == 0
    scene.finish(MEMBERS)


def test_without_room_a_request_waits_for_it_where_it_is() -> None:
    scene = Scene(4, prompt=14, kv_blocks=12)
    for _ in range(4):
        scene.step()
    assert scene.scheduler.copies(0.0) == []
    assert scene.scheduler.waited_for == {1}
    scene.scheduler.abort("r0")
    del scene.client.requests["r0"]
    assert len(scene.scheduler.copies(0.0)) == 1
    scene.finish(MEMBERS)


@pytest.mark.parametrize("near", [True, False], ids=["room on its host", "none left there"])
def test_another_host_is_the_second_choice(*, near: bool) -> None:
    scene = Scene(0, ranks=3)
    nodes = {0: "other", 1: "n", 2: "n"}
    members = tuple(Member(rank=r, node=nodes[r], incarnation=i) for r, i in scene.members.items())
    scene.scheduler = Scheduler(config(), TOKEN)
    placement = view(1, scene.members).placement
    scene.scheduler.set_view(View(epoch=1, members=members, placement=placement), [], 0.0)
    scene.scheduler.leave([0, 2])
    scene.client.submit(scene.scheduler, ask("r", [5] * 9, 12, ignore_eos=True), 0.0)
    scene.step()
    assert scene.homes() == {0: 0, 1: 1, 2: 0}
    scene.scheduler.leave([1] if near else [1, 2])
    scene.move()
    (moved,) = scene.scheduler.moved()
    assert (moved.source, moved.target) == (1, 2 if near else 0)
    assert moved.tokens >= 9, "nothing is computed again"
    scene.finish(scene.members)


def test_who_leaves_is_said_by_the_next_view() -> None:
    now, staged, far = view(1, {0: 1, 1: 2}), view(2, {0: 1}), view(3, {1: 2})
    assert leaving(now, ClusterState(revision=1, view=now)) == ()
    assert leaving(now, ClusterState(revision=1, view=now, next=staged)) == (1,)
    assert leaving(now, ClusterState(revision=1, view=staged, next=far)) == (1,), "that one comes first"
    assert leaving(staged, ClusterState(revision=1, view=staged, next=now)) == (), "out of date"
    assert leaving(now, ClusterState(revision=1, view=now, next=view(2, {0: 1, 1: 3}))) == (1,), "one that is replaced"
