"""Random episodes of a cluster: whatever happens in whatever order, no invariant breaks, and in the end it is whole."""

from __future__ import annotations

from contextlib import suppress
from random import Random

import pytest

from membership.base.errors import OperationConflict
from membership.operations.change import drain, scale, undrain
from membership.operations.dry_run import plan_change
from membership.operations.operations import cancel
from membership.store.records import ClusterState, Operation
from tests.support.recorded_run import alarms
from tests.support.world import World

pytestmark = pytest.mark.unit

CHANCES = {
    "agents": 30, "control": 30, "engine": 15, "kill": 2, "change": 4, "cancel": 1, "elect": 4, "old": 3, "agent": 0.7,
    "new engine": 1, "leave": 0.7, "mask": 1, "bad": 1, "wait": 6,
}  # fmt: skip


def ask_for_something(world: World, random: Random) -> None:
    """Scale, drain or undrain, within what is possible."""
    desired, some = world.state.desired, random.randint(1, 2)
    assert desired is not None
    change = scale(random.randint(1, 7))
    if random.random() < 0.4 and len(desired.slots) > some:
        change = drain(*random.sample(desired.slots, some))
    elif desired.cordoned and random.random() < 0.7:
        change = undrain(random.choice(desired.cordoned))
    if not plan_change(change, world.state).refused:
        world.ask(change, timeout_s=random.choice([0.5, 5.0, 60.0]))


def give_up(world: World, active: Operation) -> None:
    """Cancel, if it is not too late."""
    with suppress(OperationConflict):
        cancel(world.store, world.config.cluster, active.id, "a test")


@pytest.mark.parametrize("seed", range(40))
def test_any_episode(seed: int) -> None:
    """Whatever happens in whatever order, no invariant breaks, and in the end the cluster is what was asked for."""
    random = Random(seed)
    world = World(desired=random.choice([1, 2, 4]), nodes=("a", "b")[: random.randint(1, 2)])
    past: list[tuple[ClusterState, int]] = []
    for _ in range(150):
        match random.choices(list(CHANCES), list(CHANCES.values()))[0]:
            case "agents":
                world.agents_act(random)
            case "control":
                past.append((world.state, world.token))
                world.controller_acts()
            case "engine":
                world.engine_acts()
            case "kill":
                world.kill(random.randrange(7), backoff_s=random.choice([0.0, 0.3, 5.0]))
            case "change" if world.serving and world.state.active is None:
                ask_for_something(world, random)
            case "cancel" if (active := world.state.active) is not None:
                give_up(world, active)
            case "elect":
                world.elect()
            case "old" if past:
                world.controller_acts(*random.choice(past[-8:]))
            case "agent":
                node = random.choice(world.nodes)
                world.stop_agent(node)
                if random.random() < 0.8:
                    world.start_agent(node)
            case "leave" if world.state.agents:
                world.leave(random.choice(sorted(world.state.agents)))
            case "new engine":
                world.start_engine()
            case "mask" if world.epochs:
                world.mask(random.choice(world.serving))
            case "bad":
                world.bad = {random.randrange(7)} if random.random() < 0.5 else set()
            case "wait":
                world.now += random.choice([0.05, 0.5, 3.0])
    world.bad = set()
    for node in world.nodes:
        if node not in world.state.agents or world.state.agents[node].leaving:
            world.stop_agent(node)
            world.start_agent(node)
    world.settle(random)
    desired = world.state.desired
    assert desired is not None
    world.assert_whole(desired.ranks)
    assert not set(world.serving) & set(desired.cordoned), "a drained slot stays empty"
    assert world.epochs == list(range(1, len(world.epochs) + 1))
    assert not alarms(world), "the checks of a record find nothing in an episode without violation"
