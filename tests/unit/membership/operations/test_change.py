"""Draining, undraining, cancelling and pausing: what is asked for, what comes of it, how it is taken back."""

from __future__ import annotations

import pytest

from elastic.explain import explain, explained
from elastic.status import cluster_status
from membership.base.errors import ConfigError, OperationConflict, PlanRefused
from membership.operations.change import drain, scale, undrain
from membership.operations.dry_run import plan_change
from membership.operations.operations import cancel
from membership.operations.pause import pause, resume
from membership.store.records import Desired, Operation, Phase
from tests.support.world import World

pytestmark = pytest.mark.unit


@pytest.fixture
def world() -> World:
    world = World()
    world.settle()
    return world


def operation(world: World, name: str) -> Operation:
    return world.state.operations[name]


def cancelled(world: World, name: str) -> Operation:
    return cancel(world.store, world.keys.cluster, name, "ann@desk")


@pytest.mark.parametrize("rank", [0, 1, 2, 3])
def test_any_rank_is_drained_and_comes_back(world: World, rank: int) -> None:
    drained = world.ask(drain(rank)).id
    world.settle()
    others = tuple(r for r in range(4) if r != rank)
    assert world.serving == others
    world.assert_whole(3)
    assert operation(world, drained).phase is Phase.DONE
    assert world.state.desired == Desired(ranks=3, slots=others, operation=drained, cordoned=(rank,))
    world.ask(undrain(rank))
    world.settle()
    world.assert_whole(4)
    assert world.serving == (0, 1, 2, 3)


def test_several_at_once_in_one_epoch(world: World) -> None:
    world.ask(drain(0, 2))
    world.settle()
    assert (world.serving, world.epochs) == ((1, 3), [1, 2])


def test_a_drained_slot_is_neither_restarted_nor_taken_by_a_scale(world: World) -> None:
    world.ask(drain(1))
    world.settle()
    world.kill(2)
    world.settle()
    assert world.serving == (0, 2, 3)
    world.scale(5)
    world.settle()
    assert world.serving == (0, 2, 3, 4, 5)
    world.scale(2)
    world.settle()
    assert world.serving == (0, 2)
    assert world.state.desired is not None
    assert world.state.desired.cordoned == (1,)


def test_draining_and_scaling_in_turn_never_leaves_the_slots_there_are(world: World) -> None:
    """Each drain leaves a slot empty and each scale takes another: at --max-ranks that ends."""
    most = world.config.max_ranks
    for _ in range(most - 4):
        world.ask(drain(world.serving[0]))
        world.settle()
        world.scale(4)
        world.settle()
    world.ask(drain(world.serving[0]))
    world.settle()
    with pytest.raises(PlanRefused, match=f"4 ranks and {most - 3} drained slots are more than the {most} slots"):
        world.scale(4)
    assert max(world.serving) < most
    world.ask(undrain(0))
    world.settle()
    world.assert_whole(4)


def test_a_dead_rank_can_be_drained_instead_of_restarted(world: World) -> None:
    world.kill(1, backoff_s=1e6)
    while world.epochs == [1]:
        world.controller_acts()
        world.agents_act()
    world.ask(drain(1))
    world.settle()
    world.assert_whole(3)
    assert world.serving == (0, 2, 3)


def test_a_death_during_a_drain_is_made_good_and_the_drain_goes_on(world: World) -> None:
    name = world.ask(drain(0)).id
    world.controller_acts()
    world.kill(2)
    world.settle()
    world.assert_whole(3)
    assert world.serving == (1, 2, 3)
    assert operation(world, name).phase is Phase.DONE


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (drain(9), "there is no rank 9"),
        (drain(1), "rank 1 is drained already"),
        (drain(0, 2, 3), "no rank would be left"),
        (drain(), "no rank is named"),
        (undrain(0), "rank 0 is not drained"),
    ],
)
def test_what_makes_no_sense_is_refused(world: World, change: object, words: str) -> None:
    world.ask(drain(1))
    world.settle()
    with pytest.raises(PlanRefused, match=words):
        world.ask(change)  # type: ignore[arg-type]


def test_a_slot_in_quarantine_is_not_undrained(world: World) -> None:
    world.kill(1, quarantined=True)
    world.settle()
    world.ask(drain(1))
    world.settle()
    with pytest.raises(PlanRefused, match="elastic unquarantine 1"):
        world.ask(undrain(1))


@pytest.mark.parametrize("change", [scale(6), drain(0), undrain(3)])
@pytest.mark.parametrize("steps", range(5))
def test_cancelled_before_its_commit_it_leaves_nothing_behind(world: World, change: object, steps: int) -> None:
    world.ask(drain(3))
    world.settle()
    before, view = world.state.desired, world.state.view
    assert before is not None
    name = world.ask(change).id  # type: ignore[arg-type]
    for _ in range(steps):
        world.controller_acts()
        world.agents_act()
        if world.state.view != view:
            with pytest.raises(OperationConflict, match="stands"):
                cancelled(world, name)
            return
    assert cancelled(world, name).cancelled == "ann@desk"
    assert cancelled(world, name).cancelled == "ann@desk", "twice is once"
    world.settle()
    after = world.state.desired
    assert after is not None
    assert (after.ranks, after.slots, after.cordoned) == (before.ranks, before.slots, before.cordoned)
    assert world.state.view == view
    world.assert_whole(3)
    ended = operation(world, name)
    assert (ended.phase, ended.error) == (Phase.ABORTED, "cancelled by ann@desk")
    assert cancelled(world, name) == ended


def test_cancelled_though_all_have_prepared(world: World) -> None:
    """The last report of readiness and the cancellation meet: nothing is committed."""
    name = world.ask(drain(0)).id
    world.controller_acts()
    world.agents_act()
    cancelled(world, name)
    world.settle()
    assert (world.epochs, operation(world, name).phase) == ([1], Phase.ABORTED)


def test_only_what_there_is_can_be_cancelled(world: World) -> None:
    with pytest.raises(ConfigError, match="no operation 'x'"):
        cancelled(world, "x")


def test_a_drain_that_misses_its_deadline_is_taken_back(world: World) -> None:
    world.bad = {1, 2, 3}
    name = world.ask(drain(0), timeout_s=5.0).id
    world.settle()
    world.assert_whole(4)
    assert operation(world, name).phase is Phase.ABORTED
    assert world.state.desired == Desired(ranks=4, slots=(0, 1, 2, 3))


def test_while_paused_nothing_planned_begins_and_losses_are_made_good(world: World) -> None:
    pause(world.store, "sim", 600.0, by="ann@desk", reason="new switches", clock=lambda: world.now)
    with pytest.raises(PlanRefused, match="paused by ann@desk for another 600 s: new switches"):
        world.scale(6)
    assert plan_change(scale(6), world.state).changes, "planning is free"
    world.kill(1)
    world.settle()
    world.assert_whole(4)
    status = cluster_status(world.state, world.now)
    assert status.pause is not None
    assert "new switches" in status.pause.words
    assert resume(world.store, "sim")
    assert not resume(world.store, "sim")
    world.scale(6)


def test_a_pause_ends_by_itself_and_never_stops_what_is_under_way(world: World) -> None:
    world.scale(6)
    pause(world.store, "sim", 5.0, clock=lambda: world.now)
    world.settle()
    world.assert_whole(6)
    world.now += 5.0
    assert cluster_status(world.state, world.now).pause is None
    world.scale(4)


def test_no_cluster_no_pause(world: World) -> None:
    with pytest.raises(ConfigError, match="no cluster 'elsewhere'"):
        pause(world.store, "elsewhere", 5.0)


def test_status_and_explain_show_it(world: World) -> None:
    name = world.ask(drain(0), op_id="out").id
    status = cluster_status(world.state, world.now)
    assert status.operation is not None
    assert status.operation.what == "drain of rank 0"
    world.controller_acts()
    text = explained(explain(world.state, world.now, name))
    assert "drain of rank 0, from 4 ranks" in text
    assert "waits for ranks [1, 2, 3] to prepare" in text
    assert "elastic ops cancel out" in text
    world.settle()
    status = cluster_status(world.state, world.now)
    assert (status.drained, status.state, status.nodes[0].safe_to_delete) == ((0,), "serving", False)
    (rank,) = explain(world.state, world.now, "0")
    assert (rank.state, rank.do) == ("drained", "to fill it again: elastic undrain 0")
    assert "operation out drained it" in rank.because[0]
    assert "epoch 2" in explained(explain(world.state, world.now, name))


def test_a_node_without_ranks_is_safe_to_delete() -> None:
    world = World(nodes=("a", "b"))
    world.settle()
    on_b = [spec.rank for spec in world.state.assignments["b"].ranks]
    world.ask(drain(*on_b))
    world.settle()
    safe = {node.node: node.safe_to_delete for node in cluster_status(world.state, world.now).nodes}
    assert safe == {"a": False, "b": True}
