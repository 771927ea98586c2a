"""A view that leaves ranks out is committed once their requests have moved, and not much later in any case."""

from __future__ import annotations

import pytest

from elastic.explain import explain_operation
from membership.base.timing import VACATE_S
from membership.planning.cluster_facts import ClusterFacts
from membership.store.records import EngineStatus, Phase
from tests.support.world import CONFIG, World

pytestmark = pytest.mark.unit

LIMIT_S = min(VACATE_S, CONFIG.launch_deadline_s / 2)


def shrinking(timeout_s: float = 60.0) -> World:
    """4 -> 2, all prepared; ranks 2 and 3 still have requests."""
    world = World()
    world.settle()
    world.crowded = True
    world.scale(2, timeout_s)
    act(world)
    assert world.state.next is not None
    assert not ClusterFacts(world.state, world.now).unprepared
    assert world.serving == (0, 1, 2, 3)
    return world


def act(world: World) -> None:
    """Each process does what there is to do now."""
    while world.controller_acts() | world.agents_act() | world.engine_acts():
        pass


def test_the_commit_waits_for_requests_to_move() -> None:
    world = shrinking()
    staged = world.now
    world.now += LIMIT_S / 2
    act(world)
    assert world.epochs == [1]
    (operation,) = world.state.operations.values()
    assert "waits for requests to migrate" in str(explain_operation(world.state, world.now, operation).because)
    world.crowded = False
    world.settle()
    world.assert_whole(2)
    assert world.now < staged + LIMIT_S


def test_the_commit_does_not_wait_for_ever() -> None:
    world = shrinking()
    staged = world.now
    world.settle()
    world.assert_whole(2)
    assert world.epochs == [1, 2]
    (operation,) = world.state.operations.values()
    assert operation.phase_times["committed"] == pytest.approx(staged + LIMIT_S, abs=0.1)


def test_an_operation_at_its_deadline_is_committed_not_rolled_back() -> None:
    world = shrinking(timeout_s=5.0)
    world.settle()
    world.assert_whole(2)
    (operation,) = world.state.operations.values()
    assert operation.phase is Phase.DONE
    assert operation.phase_times["committed"] == pytest.approx(operation.deadline, abs=0.1)


def test_without_an_engine_there_is_nothing_to_wait_for() -> None:
    world = shrinking()
    world.store.delete(world.keys.engine)
    act(world)
    assert world.serving == (0, 1)


def test_a_death_on_the_way_is_not_kept_waiting() -> None:
    world = shrinking()
    before = world.now
    world.kill(0)
    while world.epochs == [1]:
        assert world.controller_acts() | world.agents_act()
    assert world.now == before
    assert 0 not in world.serving


@pytest.mark.parametrize("wrong", ["revision", "token"])
def test_what_was_said_of_another_view_or_by_another_engine_means_nothing(wrong: str) -> None:
    world = shrinking()
    state = world.state
    token, revision = state.engine_token - (wrong == "token"), state.next_revision - (wrong == "revision")
    world.put(world.keys.engine_status, EngineStatus(token=token, epoch=1, vacated_revision=revision))
    assert not world.controller_acts()
    world.put(
        world.keys.engine_status, EngineStatus(token=state.engine_token, epoch=1, vacated_revision=state.next_revision)
    )
    assert world.controller_acts()


def test_a_view_that_leaves_no_rank_out_does_not_wait() -> None:
    world = World()
    world.settle()
    world.crowded = True
    before = world.now
    assert ClusterFacts(world.state, world.now).vacated_by == 0.0
    world.scale(6)
    act(world)
    assert world.serving == (0, 1, 2, 3, 4, 5)
    assert world.now == before
