"""A rebalance on request: its plan, that it does not wait, and that the request expires."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from membership.base.errors import PlanRefused
from membership.base.timing import REQUEST_VALID_S
from membership.operations.pause import pause
from membership.operations.rebalance_now import plan_rebalance, request_rebalance
from membership.placement.balance import imbalance
from membership.planning.rebalance import UNEVEN
from membership.store.records import ExpertLoad
from tests.support.world import CONFIG, World

pytestmark = pytest.mark.unit

BYTES = 1000


def uneven(budget: int = 1 << 30) -> World:
    """Four ranks whose load is not even, but not so uneven that the background would do something."""
    world = World(desired=4, config=replace(CONFIG, expert_bytes=BYTES, rebalance_bytes=budget))
    world.settle()
    view = world.state.view
    assert view is not None
    loads = tuple(tuple(22 if e in held else 12 for e in range(8)) for held in view.placement[0])
    world.put(world.keys.expert_load, ExpertLoad(at=world.now, loads=loads))
    assert 1.1 < imbalance(view.placement, loads) < UNEVEN
    world.now += 100.0
    world.settle()
    assert world.epochs == [1]
    return world


def ask(world: World) -> None:
    request_rebalance(world.store, world.config.cluster, "me", clock=lambda: world.now)


def test_what_it_would_do_is_what_it_does() -> None:
    world = uneven()
    plan = plan_rebalance(world.state, world.now)
    assert plan.changes
    assert not plan.unasked
    assert not plan.waits
    assert plan.imbalance_before is not None
    assert plan.imbalance_after is not None
    assert plan.imbalance_after < 1.06 < plan.imbalance_before
    assert plan.slots == sum(plan.layers.values()) == sum(plan.loads.values())
    assert plan.bytes_moved == plan.slots * BYTES
    assert plan_rebalance(world.state, world.now) == plan
    assert world.state.rebalance is None, "a plan changes nothing"
    ask(world)
    world.settle()
    view, loads = world.state.view, world.state.expert_load
    assert view is not None
    assert loads is not None
    assert view.epoch == 2
    assert imbalance(view.placement, loads.loads) == plan.imbalance_after
    again = plan_rebalance(world.state, world.now)
    assert not again.changes
    assert again.imbalance_before == plan.imbalance_after


def test_a_small_budget_goes_on_until_it_is_done() -> None:
    world = uneven(budget=2 * BYTES)
    plan = plan_rebalance(world.state, world.now)
    assert (plan.slots, plan.unfinished) == (2, True)
    ask(world)
    world.settle()
    assert len(world.epochs) > 2
    assert not plan_rebalance(world.state, world.now).changes


def test_a_request_is_forgotten_after_a_while() -> None:
    world = uneven()
    ask(world)
    world.now += REQUEST_VALID_S
    world.settle()
    assert world.epochs == [1]


def test_a_request_from_a_clock_behind_the_controller_s_is_served_all_the_same() -> None:
    world = uneven()
    staged = world.state.view.staged if world.state.view else 0.0
    request_rebalance(world.store, world.config.cluster, clock=lambda: staged - 5.0)
    world.now = staged + 1.0
    world.settle()
    assert world.epochs == [1, 2]


def test_what_goes_on_and_what_would_happen_anyway_is_said() -> None:
    world = uneven()
    view = world.state.view
    assert view is not None
    steep = tuple(tuple(160 if e in held else 8 for e in range(8)) for held in view.placement[0])
    world.put(world.keys.expert_load, ExpertLoad(at=world.now, loads=steep))
    assert plan_rebalance(world.state, world.now).unasked
    world.scale(5)
    assert plan_rebalance(world.state, world.now).waits


def test_refusals_say_why() -> None:
    world = uneven()
    pause(world.store, world.config.cluster, 60.0, by="them", clock=lambda: world.now)
    with pytest.raises(PlanRefused, match="paused by them"):
        ask(world)
    with pytest.raises(PlanRefused, match="--rebalance-budget 0"):
        ask(_off())
    assert plan_rebalance(replace(world.state, view=None), 0.0).refused


def _off() -> World:
    world = World(desired=4, config=replace(CONFIG, rebalance_bytes=0))
    world.settle()
    return world
