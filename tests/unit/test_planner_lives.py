"""Random lives of a cluster: whatever happens in whatever order, no invariant breaks, and in the end it is whole."""

from __future__ import annotations

from random import Random

import pytest

from membership.types import ClusterState
from tests.simulated import World

pytestmark = pytest.mark.unit

CHANCES = {
    "agents": 30, "control": 30, "engine": 15, "kill": 2, "scale": 2, "elect": 4, "old": 3, "agent": 0.7,
    "new engine": 1, "mask": 1, "bad": 1, "wait": 6,
}  # fmt: skip


@pytest.mark.parametrize("seed", range(40))
def test_any_life(seed: int) -> None:
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
            case "scale" if world.serving and not any(op.active for op in world.state.operations.values()):
                world.scale(random.randint(1, 7), timeout_s=random.choice([0.5, 5.0, 60.0]))
            case "elect":
                world.elect()
            case "old" if past:
                world.controller_acts(*random.choice(past[-8:]))
            case "agent":
                node = random.choice(world.nodes)
                world.stop_agent(node)
                if random.random() < 0.8:
                    world.start_agent(node)
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
        if node not in world.state.agents:
            world.start_agent(node)
    world.settle(random)
    desired = world.state.desired
    assert desired is not None
    world.assert_whole(desired.ranks)
    assert world.epochs == list(range(1, len(world.epochs) + 1))
