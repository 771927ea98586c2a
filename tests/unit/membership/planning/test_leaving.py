"""Agents that leave on purpose, and a cluster whose size follows its agents: no loss, no confusion with a fault."""

from __future__ import annotations

from contextlib import closing

import pytest
from msgspec.structs import replace

from elastic.status import cluster_status
from membership.base.errors import PlanRefused
from membership.operations.change import drain
from membership.operations.pause import pause
from membership.planning.planner import reconcile
from membership.store.records import RankState
from tests.support.world import CONFIG, World
from workers.agent.decide import relief
from workers.agent.registrar import Registrar

pytestmark = pytest.mark.unit


def two_nodes(**options: object) -> World:
    world = World(nodes=("a", "b"), **options)  # type: ignore[arg-type]
    world.settle()
    return world


def on(world: World, node: str) -> set[int]:
    view = world.state.view
    return {m.rank for m in (view.members if view else ()) if m.node == node}


def desired(world: World) -> int:
    wanted = world.state.desired
    assert wanted is not None
    return wanted.ranks


def test_a_node_is_relieved_in_one_epoch_and_its_slots_are_filled_elsewhere() -> None:
    world = two_nodes()
    world.leave("b")
    world.settle(until=lambda: len(world.epochs) == 2)
    assert on(world, "b") == set()
    assert len(on(world, "a")) == 2, "no new rank is needed for it"
    world.settle()
    world.assert_whole(4)
    assert len(on(world, "a")) == 4
    assert cluster_status(world.state, world.now).nodes[1].safe_to_delete
    assert desired(world) == 4


def test_who_stays_and_cannot_load_gives_up_redundancy() -> None:
    world = two_nodes()
    before = world.state.view
    assert before is not None
    world.leave("b")
    world.bad = {min(on(world, "a"))}
    world.settle(until=lambda: world.state.next is not None and world.state.next.attempt == 1)
    staged = world.state.next
    assert staged is not None
    assert staged.placement == {rank: before.placement[rank] for rank in on(world, "a")}, "no rank has to load anything"


def test_no_rank_ends_before_the_engine_has_left_the_old_view() -> None:
    world = two_nodes()
    world.leave("b")
    while len(world.epochs) == 1:
        assert world.engine_acts() or world.controller_acts() | world.agents_act()
    assert not world.controller_acts(), "the engine has yet to flip"
    assert len(world.state.assignments["b"].ranks) == 2
    world.settle()
    assert world.state.assignments["b"].ranks == ()


@pytest.mark.parametrize("decided", ["commit", "assignments"])
def test_what_was_decided_before_an_agent_took_its_assignment_away_is_not_done(decided: str) -> None:
    """Its ranks have ended: no view may have them, and nobody would run what the controller writes there again."""
    world = two_nodes()
    world.scale(6)
    world.settle(until=lambda: any(getattr(effect, decided) for effect in reconcile(world.state, world.now)))
    seen, (effect,) = world.state, reconcile(world.state, world.now)
    node = (effect.commit.members if effect.commit is not None else effect.assignments)[0].node
    with closing(Registrar(world.store, world.keys, ttl_s=60.0, background=False)) as registrar:
        registrar.unassign(seen.agents[node])
    assert node not in world.state.assignments
    assert not world.controller_acts(seen)


def test_where_there_is_no_room_the_rest_serves_until_the_node_is_back() -> None:
    world = two_nodes(capacity=2)
    world.leave("b")
    world.settle()
    assert len(world.serving) == 2
    assert (cluster_status(world.state, world.now).state, desired(world)) == ("degraded", 4)
    world.stop_agent("b")
    world.start_agent("b")
    world.settle()
    world.assert_whole(4)
    assert len(on(world, "b")) == 2


def test_a_departing_rank_is_shown_as_draining() -> None:
    world = two_nodes()
    world.leave("b")
    world.controller_acts()
    states = {r.rank: r.state for r in cluster_status(world.state, world.now).ranks}
    assert {rank for rank, state in states.items() if state is RankState.DRAINING} == on(world, "b")


def test_if_all_agents_leave_none_is_relieved() -> None:
    world = two_nodes()
    world.leave("a")
    world.leave("b")
    world.settle()
    assert (len(world.serving), world.epochs) == (4, [1])


def test_an_agent_waits_only_while_others_can_take_over() -> None:
    world = two_nodes()
    me = world.state.agents["b"]
    assert relief(world.state, me, [(2, 3)])
    assert not relief(world.state, me, [])
    world.leave("a")
    assert not relief(world.state, me, [(2, 3)])
    alone = World()
    alone.settle()
    assert not relief(alone.state, alone.state.agents["a"], [(0, 1)])


def test_a_scale_up_goes_on_without_the_node_that_leaves() -> None:
    world = two_nodes()
    name = world.scale(6).id
    world.controller_acts()
    world.leave("b")
    world.settle()
    world.assert_whole(6)
    assert len(on(world, "a")) == 6
    assert world.state.operations[name].phase == "done"


def following() -> World:
    world = World(desired=2, config=replace(CONFIG, follow_agents=2))
    world.settle()
    return world


def test_the_size_follows_the_agents() -> None:
    world = following()
    world.assert_whole(2)
    world.start_agent("b")
    world.start_agent("c")
    world.settle()
    world.assert_whole(6)
    world.leave("b")
    world.settle()
    world.assert_whole(4)
    assert on(world, "b") == set()
    world.stop_agent("b")
    world.settle()
    assert desired(world) == 4
    assert cluster_status(world.state, world.now).owner == "agents"


def test_a_node_that_was_lost_is_counted_no_more_once_its_agent_has_come_back_and_left() -> None:
    """The way out for a pod that died while its StatefulSet was scaled down: docs/KUBERNETES.md."""
    world = following()
    world.start_agent("b")
    world.settle()
    world.stop_agent("b")
    world.settle()
    assert desired(world) == 4, "it may be back at any time"
    world.start_agent("b")
    world.leave("b")
    world.settle()
    assert desired(world) == 2
    world.assert_whole(2)


def test_an_agent_that_dies_is_a_fault_and_no_intent() -> None:
    world = following()
    world.start_agent("b")
    world.settle()
    world.stop_agent("b")
    world.settle()
    assert desired(world) == 4
    world.assert_whole(4)


def test_there_is_one_owner() -> None:
    world = following()
    with pytest.raises(PlanRefused, match="the size follows the agents, 2 ranks for each"):
        world.scale(4)
    world.start_agent("b")
    world.settle()
    world.ask(drain(0))
    world.settle()
    world.assert_whole(3)
    world.start_agent("c")
    world.settle()
    world.assert_whole(5)


def test_a_pause_holds_it_back() -> None:
    world = following()
    pause(world.store, "sim", 60.0, clock=lambda: world.now)
    world.start_agent("b")
    for _ in range(20):
        world.controller_acts()
        world.agents_act()
        world.engine_acts()
    world.assert_whole(2)
    world.settle()
    world.assert_whole(4)
