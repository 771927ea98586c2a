"""Clusters from start to end, decided by the planner: bring-up, scaling, deaths at any point, takeovers, rollbacks."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from membership.base.timing import RECORD_MISSING_S
from membership.planning.cluster_facts import ClusterFacts
from membership.planning.own_times import OwnTimes
from membership.planning.planner import due, reconcile, sound
from membership.store.records import Assignment, ClusterState, Desired, Operation, Pause, Phase, RankState
from tests.support.world import CONFIG, World, phases

pytestmark = pytest.mark.unit

ALL = [
    Phase.PROPOSED, Phase.SPAWNING, Phase.HANDSHAKING, Phase.LOADING, Phase.READY, Phase.COMMITTED, Phase.RETIRING,
    Phase.DONE,
]  # fmt: skip


def up(count: int = 4, **options: object) -> World:
    world = World(desired=count, **options)  # type: ignore[arg-type]
    world.settle()
    world.assert_whole(count)
    return world


def operation(world: World, name: str) -> Operation:
    return world.state.operations[name]


def test_nothing_is_decided_without_config_or_desired_state() -> None:
    assert reconcile(ClusterState(revision=1), 0.0) == []
    started = ClusterState(revision=1, config=CONFIG)
    assert reconcile(started, 0.0) == []
    assert ClusterFacts(started, 0.0).desired == Desired(ranks=0)
    world = up(1)
    paused = replace(
        world.state, config=replace(CONFIG, follow_agents=True), pause=Pause(until=world.now + 60.0, since=0.0)
    )
    assert due(paused, world.now) == world.now + 60.0
    assert due(replace(paused, desired=None), world.now) is None


def test_bring_up_is_one_epoch() -> None:
    world = up()
    assert world.epochs == [1]
    assert world.serving == (0, 1, 2, 3)
    assert world.state.desired == Desired(ranks=4, slots=(0, 1, 2, 3))
    assert world.state.incarnation == 4


def test_bring_up_waits_for_an_agent_and_spreads_ranks_over_all() -> None:
    world = World(nodes=())
    world.settle()
    assert world.serving == ()
    world.start_agent("a")
    world.start_agent("b")
    world.settle()
    world.assert_whole(4)
    assert {node: len(a.ranks) for node, a in world.state.assignments.items()} == {"a": 2, "b": 2}


def test_bring_up_waits_for_as_many_agents_as_were_asked_for() -> None:
    world = World(nodes=("a",), config=replace(CONFIG, min_agents=2))
    world.settle()
    assert (world.serving, world.state.assignments) == ((), {})
    world.start_agent("b")
    world.settle()
    world.assert_whole(4)
    assert {node: len(a.ranks) for node, a in world.state.assignments.items()} == {"a": 2, "b": 2}
    world.stop_agent("b")
    world.settle()
    assert len(world.serving) == 4, "once there was an epoch, one agent does"


def test_bring_up_goes_on_without_a_quarantined_slot() -> None:
    world = World()
    world.controller_acts()
    world.agents_act()
    world.kill(2, quarantined=True)
    world.settle()
    assert world.serving == (0, 1, 3)


def test_drained_slots_are_passed_by_however_many_there_are() -> None:
    state = replace(up(1).state, desired=Desired(ranks=3, cordoned=(1, 2)))
    assert ClusterFacts(state, 0.0).fill == (3, 4)


def test_scale_up_and_down_go_through_all_phases() -> None:
    world = up()
    before = world.state.view
    assert before is not None
    name = world.scale(6).id
    world.settle()
    world.assert_whole(6)
    assert phases(operation(world, name)) == ALL
    assert (operation(world, name).epoch, operation(world, name).progress) == (2, 1.0)
    assert world.state.view is not None
    assert world.state.view.members[:4] == before.members, "serving ranks go on as they were"
    down = world.scale(3).id
    world.settle()
    world.assert_whole(3)
    assert world.serving == (0, 1, 2)
    assert phases(operation(world, down)) == [p for p in ALL if p not in (Phase.SPAWNING, Phase.HANDSHAKING)]
    assert world.epochs == [1, 2, 3]


def test_scale_to_what_is_there_is_done_at_once() -> None:
    world = up()
    name = world.scale(4).id
    world.settle()
    assert phases(operation(world, name)) == [Phase.PROPOSED, Phase.COMMITTED, Phase.RETIRING, Phase.DONE]
    assert (world.epochs, operation(world, name).epoch) == ([1], 1)


def test_a_scale_that_changes_nothing_reports_no_earlier_pause() -> None:
    world = up()
    world.pause_ms = 21.0
    assert world.engine_acts()
    name = world.scale(4).id
    world.settle()
    assert (operation(world, name).phase, operation(world, name).pause_ms) == (Phase.DONE, 0.0)


def test_victims_stay_until_the_engine_has_left_the_old_view() -> None:
    world = up()
    name = world.scale(2).id
    while world.epochs == [1]:
        assert world.engine_acts() or world.controller_acts() | world.agents_act()
    for _ in range(5):
        world.controller_acts()
        world.agents_act()
    assert len(world.state.ranks) == 4
    assert operation(world, name).phase is Phase.COMMITTED
    world.settle()
    world.assert_whole(2)


def test_a_stuck_engine_delays_retirement_to_the_deadline_at_most() -> None:
    world = up()
    name = world.scale(2, timeout_s=30.0).id
    while world.epochs == [1]:
        assert world.engine_acts() or world.controller_acts() | world.agents_act()
    world.now += 31.0
    for _ in range(6):
        world.controller_acts()
        world.agents_act()
    assert operation(world, name).phase is Phase.DONE
    assert sorted(rank for rank, _ in world.state.ranks) == [0, 1]


@pytest.mark.parametrize("rank", range(4))
def test_a_dead_rank_leaves_and_comes_back_in_its_slot(rank: int) -> None:
    world = up()
    world.kill(rank, backoff_s=5.0)
    died = world.now
    while world.epochs == [1]:
        assert world.controller_acts() | world.agents_act()
    assert rank not in world.serving
    assert world.now < died + 5.0, "the loss is durable long before the restart may happen"
    world.settle()
    world.assert_whole(4)
    assert world.epochs == [1, 2, 3]
    member = world.state.view.member(rank) if world.state.view else None
    assert member is not None
    assert member.incarnation == 5
    spawned = [spec for e in world.effects for a in e.assignments for spec in a.ranks if spec.incarnation == 5]
    assert spawned[0].launched >= died + 5.0


def test_a_masked_rank_is_evicted_and_replaced() -> None:
    world = up()
    world.mask(2)
    world.settle()
    world.assert_whole(4)
    assert world.state.view is not None
    assert [m.incarnation for m in world.state.view.members] == [1, 2, 5, 4]


def test_a_mask_of_another_epoch_or_engine_means_nothing() -> None:
    world = up()
    world.mask(2)
    world.start_engine()
    world.settle()
    assert world.epochs == [1]


def test_a_lapsed_lease_alone_evicts_no_rank() -> None:
    world = up()
    world.store.delete(world.keys.rank(1, 2))
    assert reconcile(world.state, world.now) == []


def test_all_leases_lapsing_at_once_evicts_no_rank_that_the_engine_uses() -> None:
    """So it is after a stall of the store: every rank serves, and no record says so."""
    world = up()
    world.lapse("a")
    assert reconcile(world.state, world.now) == []
    world.elect()
    assert reconcile(world.state, world.now + 600.0) == []
    world.mask(2)  # it does not answer the engine either
    world.controller_acts()
    assert (2, 3) in world.evicted
    assert len(world.evicted) == 1


def test_a_quarantined_slot_stays_empty_until_the_next_scale() -> None:
    world = up()
    world.kill(1, quarantined=True)
    world.settle()
    assert world.serving == (0, 2, 3)
    name = world.scale(6).id
    world.settle()
    assert operation(world, name).phase is Phase.DONE
    assert world.serving == (0, 2, 3, 4, 5, 6)
    world.kill(5)
    world.settle()
    assert world.serving == (0, 2, 3, 4, 5, 6)


@pytest.mark.parametrize("all_of_it", [True, False], ids=["agent", "rank"])
def test_a_scale_goes_on_if_what_had_no_lease_is_back_in_time(all_of_it: bool) -> None:
    """A busy machine renews late. The new ranks run on, and nobody but their leases says so."""
    world, times = up(), OwnTimes()
    name = world.scale(6).id
    world.settle(until=lambda: {(4, 5), (5, 6)} <= {*world.state.ranks})
    times.own(world.state, world.now)
    before = world.state
    for key in ((4, 5), (5, 6)):
        world.store.delete(world.keys.rank(*key))
    if all_of_it:
        world.lapse("a")
    for _ in range(3):
        while world.controller_acts(times.own(world.state, world.now)):
            pass
        assert operation(world, name).active
        world.now += RECORD_MISSING_S / 4
    for node, agent in before.agents.items():
        world.put(world.keys.agent(node), agent)
    for key, record in before.ranks.items():
        world.put(world.keys.rank(*key), record)
    world.settle()
    world.assert_whole(6)
    assert operation(world, name).phase is Phase.DONE
    assert world.state.incarnation == 6, "with the very ranks"


def test_a_new_rank_is_lost_once_its_agent_stays_away() -> None:
    world, times = up(nodes=("a", "b"), capacity=3), OwnTimes()
    name = world.scale(6).id
    world.settle(until=lambda: {(4, 5), (5, 6)} <= {*world.state.ranks})
    node = world.state.ranks[5, 6].node
    world.lapse(node)
    own = times.own(world.state, world.now)
    assert due(own, world.now) == world.now + RECORD_MISSING_S
    world.now += RECORD_MISSING_S
    while world.controller_acts(times.own(world.state, world.now)):
        pass
    assert operation(world, name).phase is Phase.ABORTED
    assert operation(world, name).error.endswith(f"lost with the agent of node {node}")


def test_a_newcomer_that_dies_aborts_and_rolls_back() -> None:
    world = up()
    before = world.state.view
    name = world.scale(6).id
    world.controller_acts()
    world.agents_act()
    world.agents_act()
    world.kill(5)
    world.settle()
    world.assert_whole(4)
    assert operation(world, name).phase is Phase.ABORTED
    assert operation(world, name).error == "rank 5 died: killed by signal 9"
    assert world.state.desired == Desired(ranks=4, slots=(0, 1, 2, 3))
    assert world.state.view == before


@pytest.mark.parametrize(
    ("trouble", "target", "words"),
    [("bad", 6, "rank 4 could not prepare: no memory"), ("mute", 6, "rank 4 did not register within 20 s"),
     ("bad", 3, "rank 0 could not prepare: no memory")],
)  # fmt: skip
def test_what_cannot_be_is_rolled_back_with_its_reason(trouble: str, target: int, words: str) -> None:
    world = up()
    getattr(world, trouble).add(4 if target > 4 else 0)
    name = world.scale(target).id
    world.settle()
    world.assert_whole(4)
    assert operation(world, name).phase is Phase.ABORTED
    assert words in operation(world, name).error
    assert world.epochs == [1]


def test_no_scale_brings_in_another_model() -> None:
    world = up()
    world.others = {4}
    name = world.scale(6).id
    world.settle()
    world.assert_whole(4)
    assert operation(world, name).phase is Phase.ABORTED
    assert (
        "rank 4 on node a has another model than the cluster serves: weights (another" in operation(world, name).error
    )
    assert world.epochs == [1]
    assert world.state.exits[4].refused


def test_no_repair_brings_in_another_model() -> None:
    world = up()
    world.others = {2}
    world.kill(2)
    world.settle()
    assert world.serving == (0, 1, 3)
    assert (world.state.exits[2].refused, world.state.exits[2].quarantined) == (True, True)
    assert world.deaths[2] == 2, "it is not started again and again"


def test_the_first_view_is_of_one_model() -> None:
    world = World(desired=3)
    world.others = {2}
    world.settle()
    assert world.serving == (0, 1)
    assert world.state.checkpoint is not None
    assert world.state.checkpoint.parts == {"weights": "ours"}


def test_a_newcomer_that_its_agent_did_not_refuse_is_not_committed() -> None:
    """Such as one of an agent of an earlier version."""
    world = up()
    world.scale(5)
    world.settle(until=lambda: any(key.rank == 4 for key in world.state.ranks))
    (key,) = [key for key in world.state.ranks if key.rank == 4]
    record = replace(world.state.ranks[key], state=RankState.STANDBY, identity={"weights": "another"})
    world.put(world.keys.rank(*key), record)
    (effect,) = reconcile(world.state, world.now)
    assert effect.operation is not None
    assert "another model" in effect.operation.error


def test_the_deadline_aborts_and_names_who_was_waited_for() -> None:
    world = up()
    world.mute = {5}
    name = world.scale(6, timeout_s=10.0).id
    world.settle()
    assert operation(world, name).error == "not done by its deadline; waited for ranks [5] to register"
    assert operation(world, name).finished <= operation(world, name).deadline + 1.0
    world.assert_whole(4)


def test_a_death_during_an_operation_is_repaired_first_and_the_operation_goes_on() -> None:
    world = up()
    name = world.scale(6).id
    while world.state.next is None:
        world.controller_acts()
        world.agents_act()
    staged = world.state.next_revision
    world.kill(1)
    world.settle()
    world.assert_whole(6)
    assert operation(world, name).phase is Phase.DONE
    assert world.state.next_revision != staged
    assert world.epochs == [1, 2, 3]


def test_an_agent_takes_its_ranks_with_it_and_another_node_takes_over() -> None:
    world = up(nodes=("a", "b"))
    world.stop_agent("a")
    world.settle()
    world.assert_whole(4)
    assert {m.node for m in world.state.view.members} == {"b"} if world.state.view else False


def test_a_new_agent_never_gets_the_old_ones_incarnations() -> None:
    world = up()
    old = world.state.assignments["a"]
    world.store.delete(world.keys.agent("a"))
    world.start_agent("a")  # so soon that the leases of the dead ranks still stand
    world.controller_acts()
    emptied = world.state.assignments["a"]
    assert emptied == Assignment(node="a", agent_started=world.state.agents["a"].started)
    world.settle()
    world.assert_whole(4)
    new = world.state.assignments["a"]
    assert min(s.incarnation for s in new.ranks) > max(s.incarnation for s in old.ranks)


def test_a_cluster_that_died_wholly_comes_back_one_epoch_later() -> None:
    world = up()
    world.stop_agent("a")
    world.settle()
    assert world.epochs == [1]
    world.start_agent("a")
    world.settle()
    world.assert_whole(4)
    assert world.epochs == [1, 2]


def test_the_last_survivor_loads_what_is_lost() -> None:
    world = up()
    for rank in (0, 1, 2):
        world.kill(rank, backoff_s=3.0)
    world.settle()
    world.assert_whole(4)
    assert world.epochs == [1, 2, 3]


def test_a_repair_waits_for_all_ranks_that_are_starting() -> None:
    """One epoch for both, rather than one for each."""
    world = up()
    world.mute = {2}
    world.kill(1)
    world.kill(2)
    world.settle(until=lambda: any(spec.incarnation == 6 for spec in world.state.assignments["a"].ranks))
    for _ in range(5):
        world.agents_act()
        world.controller_acts()
    assert [m.rank for m in ClusterFacts(world.state, world.now).ready] == [1]
    assert world.state.next is None
    world.mute.clear()
    world.settle()
    world.assert_whole(4)
    assert world.epochs == [1, 2, 3]


def test_survivors_that_cannot_load_wait_for_the_restarted() -> None:
    world = up()
    for rank in (0, 1, 2):
        world.kill(rank)
    world.bad = {3}
    for _ in range(100):
        world.controller_acts()
        world.agents_act()
        world.now += 0.1
    assert world.state.view is not None
    world.bad = set()
    world.settle()
    world.assert_whole(4)


def test_survivors_that_cannot_load_give_up_redundancy_before_coverage() -> None:
    world = up()
    world.kill(1, backoff_s=1e6)
    world.bad = {2}
    while world.state.next is None:
        world.controller_acts()
    first = world.state.next
    for _ in range(10):
        world.agents_act()
        world.controller_acts()
        world.now += 0.1
    second = world.state.next
    assert second is not None
    assert (first.attempt, second.attempt) == (0, 1)
    before = world.state.view
    assert before is not None
    assert second.placement == {rank: before.placement[rank] for rank in (0, 2, 3)}, "no rank has to load anything"
    world.bad = set()
    while world.epochs == [1]:
        world.controller_acts()
        world.agents_act()
        world.now += 0.1
    assert world.serving == (0, 2, 3)


def test_a_staged_view_waits_for_as_long_as_a_member_loads() -> None:
    world = World(slow={2})
    world.settle()
    staged = world.state.next_revision
    assert staged
    world.now += 1000 * CONFIG.launch_deadline_s
    world.settle()
    assert (world.state.next_revision, world.epochs) == (staged, [])
    world.slow.clear()
    world.settle()
    world.assert_whole(4)
    assert world.state.incarnation == 4, "no rank was replaced"


def test_a_staged_view_waits_a_launch_for_a_member_whose_record_is_gone() -> None:
    world = up()
    world.slow = {2}
    world.kill(1)
    while world.state.next is None:
        world.controller_acts()
    world.agents_act()
    staged = world.state.next
    world.store.delete(world.keys.rank(2, 3))
    world.now = staged.staged + CONFIG.launch_deadline_s - 0.1
    world.controller_acts()
    assert world.state.next == staged
    world.now += 0.2
    world.controller_acts()
    assert world.state.next is not None
    assert world.state.next.attempt == staged.attempt + 1


def test_who_alone_can_never_prepare_is_replaced() -> None:
    world = up()
    world.kill(1)
    world.bad = {2}
    for _ in range(200):
        world.controller_acts()
        world.agents_act()
        world.now += 0.1
        if (2, 3) not in world.state.ranks:
            world.bad = set()
    world.settle()
    world.assert_whole(4)
    assert (2, 3) in world.evicted


def test_a_view_staged_by_another_controller_is_not_committed() -> None:
    world = up()
    world.kill(1)
    while world.state.next is None:
        world.controller_acts()
    staged = world.state.next
    world.put(world.keys.next, replace(staged, placement={rank: ((0,), (0,)) for rank in staged.placement}))
    assert not sound(ClusterFacts(world.state, world.now)), "most experts have no holder"
    world.settle()
    world.assert_whole(4)


def test_an_old_controller_changes_nothing() -> None:
    world = up()
    world.kill(1)
    stale, old = world.state, world.token
    world.elect()
    assert not world.controller_acts(stale, token=old)
    world.settle()
    world.assert_whole(4)


def test_a_controller_that_missed_a_change_changes_nothing() -> None:
    world = up()
    world.scale(6)
    stale = world.state
    assert world.controller_acts()
    world.settle()
    assert not world.controller_acts(stale)
    world.assert_whole(6)


def test_due_names_the_next_time_to_look() -> None:
    world = up()
    assert due(world.state, world.now) is None
    world.kill(1, backoff_s=7.0)
    back = world.now + 7.0
    operation = world.scale(6, timeout_s=60.0)
    assert due(world.state, world.now) == back
    assert due(world.state, back) == operation.deadline
