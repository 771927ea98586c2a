"""Random episodes of a cluster: whatever happens in whatever order, no invariant breaks, and in the end it is whole."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from random import Random

import pytest

from membership.base.errors import OperationConflict
from membership.operations.change import drain, scale, undrain
from membership.operations.dry_run import plan_change
from membership.operations.operations import cancel
from membership.store.records import ClusterState
from tests.support.recorded_run import alarms
from tests.support.world import World

pytestmark = pytest.mark.unit


@dataclass
class Episode:
    """A random cluster, and the events that may happen to it. One that is not possible at the moment does nothing."""

    world: World
    random: Random
    past: list[tuple[ClusterState, int]] = field(default_factory=list)  # what controllers saw, and their tokens

    def agents(self) -> None:
        self.world.agents_act(self.random)

    def controller(self) -> None:
        self.past.append((self.world.state, self.world.token))
        self.world.controller_acts()

    def old_controller(self) -> None:
        """One acts late, on what it saw under a token of then."""
        if self.past:
            self.world.controller_acts(*self.random.choice(self.past[-8:]))

    def elect(self) -> None:
        self.world.elect()

    def engine(self) -> None:
        self.world.engine_acts()

    def new_engine(self) -> None:
        self.world.start_engine()

    def mask(self) -> None:
        if self.world.epochs:
            self.world.mask(self.random.choice(self.world.serving))

    def kill(self) -> None:
        self.world.kill(self.random.randrange(7), backoff_s=self.random.choice([0.0, 0.3, 5.0]))

    def ask(self) -> None:
        """Scale, drain or undrain, within what is possible."""
        world, random, desired = self.world, self.random, self.world.state.desired
        if not world.serving or world.state.active is not None or desired is None:
            return
        some, change = random.randint(1, 2), scale(random.randint(1, 7))
        if random.random() < 0.4 and len(desired.slots) > some:
            change = drain(*random.sample(desired.slots, some))
        elif desired.cordoned and random.random() < 0.7:
            change = undrain(random.choice(desired.cordoned))
        if not plan_change(change, world.state).refused:
            world.ask(change, timeout_s=random.choice([0.5, 5.0, 60.0]))

    def cancel(self) -> None:
        """If it is not too late."""
        active = self.world.state.active
        if active is not None:
            with suppress(OperationConflict):
                cancel(self.world.store, self.world.config.cluster, active.id, "a test")

    def agent_stops(self) -> None:
        """Mostly it is started again."""
        node = self.random.choice(self.world.nodes)
        self.world.stop_agent(node)
        if self.random.random() < 0.8:
            self.world.start_agent(node)

    def agent_leaves(self) -> None:
        if self.world.state.agents:
            self.world.leave(self.random.choice(sorted(self.world.state.agents)))

    def bad_slot(self) -> None:
        self.world.bad = {self.random.randrange(7)} if self.random.random() < 0.5 else set()

    def wait(self) -> None:
        self.world.now += self.random.choice([0.05, 0.5, 3.0])


CHANCES: dict[Callable[[Episode], None], float] = {
    Episode.agents: 30, Episode.controller: 30, Episode.engine: 15, Episode.kill: 2, Episode.ask: 4, Episode.cancel: 1,
    Episode.elect: 4, Episode.old_controller: 3, Episode.agent_stops: 0.7, Episode.new_engine: 1,
    Episode.agent_leaves: 0.7, Episode.mask: 1, Episode.bad_slot: 1, Episode.wait: 6,
}  # fmt: skip


@pytest.mark.parametrize("seed", range(40))
def test_any_episode(seed: int) -> None:
    """Whatever happens in whatever order, no invariant breaks, and in the end the cluster is what was asked for."""
    random = Random(seed)
    world = World(desired=random.choice([1, 2, 4]), nodes=("a", "b")[: random.randint(1, 2)])
    episode = Episode(world, random)
    for event in random.choices(list(CHANCES), list(CHANCES.values()), k=150):
        event(episode)
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
