"""One life of a simulated cluster, drawn from a seed: faults and changes while clients are served, then peace.

Safety is checked at every commit, token and step; liveness in the end, when the faults have ceased. Swarm testing
(Groce et al., 2012): each life has only some kinds of faults, each with a weight of its own, so that rare kinds meet
without common ones drowning them. The same seed is the same life, to the bit: `digest` says so.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import suppress
from random import Random

import msgspec

from chaos.simulation.serving import SERVED, Served
from chaos.simulation.world import Violation
from membership.errors import ElasticError, OperationConflict
from membership.operations import cancel
from membership.pause import pause, resume
from membership.preview import plan_of
from membership.types import ClusterState
from membership.wish import drain, scale, undrain

MOMENTS = 150
ALWAYS = {"agents": 30, "control": 30, "engine": 25, "look": 12, "deliver": 12, "request": 4, "wait": 6}


class Life(msgspec.Struct, frozen=True, kw_only=True):
    """What came of a seed. `violation`: the promise that broke, "" if none did."""

    seed: int
    faults: int
    kinds: tuple[str, ...]
    epochs: int = 0
    requests: int = 0
    tokens: int = 0
    refused: int = 0
    digest: str = ""
    violation: str = ""


class _Life:
    """The world, what may happen to it, and what did. Each method named in FAULTS or ALWAYS is one thing to happen."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.kinds = tuple(sorted(self.random.sample(sorted(FAULTS), self.random.randint(1, len(FAULTS)))))
        self.weights = ALWAYS | {kind: FAULTS[kind] * self.random.choice([1, 1, 3]) for kind in self.kinds}
        nodes = ("a", "b", "c")[: self.random.randint(1, 3)]
        self.world = Served(desired=self.random.choice([1, 2, 4]), nodes=nodes, config=SERVED)
        self.world.mortality = self.random.choice([0.0, 0.01, 0.05]) if "kill" in self.kinds else 0.0
        self.past: list[tuple[ClusterState, int]] = []
        self.trace: list[str] = []

    def happen(self) -> None:
        """One thing happens."""
        kind = self.random.choices(list(self.weights), list(self.weights.values()))[0]
        happened = getattr(self, kind)()
        world = self.world
        self.trace.append(f"{world.now:.3f} {kind} {world.store.range('')[0]} {world.tokens}")
        world.faults += bool(happened)

    def peace(self) -> None:
        """The faults cease, and everything must come to its end."""
        world = self.world
        world.bad, world.mortality = set(), 0.0
        resume(world.store, world.config.cluster)
        for node in world.nodes:
            if node not in world.state.agents or world.state.agents[node].leaving:
                world.stop_agent(node)
                world.start_agent(node)
        world.speak_late()
        world.settle(self.random)
        desired = world.state.desired
        world.assert_whole(desired.ranks if desired else 0)
        if desired is not None and set(world.serving) & set(desired.cordoned):
            raise Violation(f"drained slots {desired.cordoned} are filled: {world.serving}")
        if world.epochs != list(range(1, len(world.epochs) + 1)):
            raise Violation(f"epochs {world.epochs}")
        world.assert_served()

    # --- what always goes on

    def agents(self) -> None:
        self.world.agents_act(self.random)

    def control(self) -> None:
        self.past.append((self.world.state, self.world.token))
        self.world.controller_acts()

    def engine(self) -> None:
        self.world.step(self.random.choice(self.world.engines), self.random)

    def look(self) -> None:
        self.world.look(self.random.choice(self.world.engines))

    def deliver(self) -> None:
        self.world.deliver(self.random.choice(self.world.engines), self.random.randint(1, 9))

    def request(self) -> None:
        prompt = [self.random.randrange(50) for _ in range(self.random.randint(1, 25))]
        self.world.request(prompt, self.random.randint(1, 20))

    def wait(self) -> None:
        self.world.now += self.random.choice([0.05, 0.5, 3.0])

    # --- what people do

    def change(self) -> None:
        world, random, desired = self.world, self.random, self.world.state.desired
        if not world.serving or world.state.active is not None or desired is None:
            return
        some, wish = random.randint(1, 2), scale(random.randint(1, 7))
        if random.random() < 0.4 and len(desired.slots) > some:
            wish = drain(*random.sample(desired.slots, some))
        elif desired.cordoned and random.random() < 0.7:
            wish = undrain(random.choice(desired.cordoned))
        if not plan_of(wish, world.state).refused and not world.state.paused(world.now):
            world.ask(wish, timeout_s=random.choice([0.5, 5.0, 60.0]), op_id=f"op{len(self.trace)}")

    def cancel(self) -> None:
        active = self.world.state.active
        if active is not None:
            with suppress(OperationConflict):
                cancel(self.world.store, self.world.config.cluster, active.id, "somebody")

    def pause(self) -> None:
        world, ttl_s = self.world, self.random.choice([1.0, 20.0])
        pause(world.store, world.config.cluster, ttl_s, clock=lambda: world.now)

    def leave(self) -> None:
        if self.world.state.agents:
            self.world.leave(self.random.choice(sorted(self.world.state.agents)))

    # --- faults: each says whether it happened

    def kill(self) -> bool:
        before, rank = len(self.world.processes), self.random.randrange(7)
        self.world.kill(rank, backoff_s=self.random.choice([0.0, 0.3, 5.0]))
        return len(self.world.processes) < before

    def elect(self) -> bool:
        self.world.elect()
        return True

    def zombie(self) -> bool:
        """A controller acts on what it saw a while ago, perhaps under a token that leads no more."""
        if not self.past:
            return False
        state, token = self.random.choice(self.past[-8:])
        stale = (state.revision, token) != (self.world.state.revision, self.world.token)
        self.world.controller_acts(state, token)
        return stale

    def agent(self) -> bool:
        node = self.random.choice(self.world.nodes)
        there = node in self.world.state.agents
        self.world.stop_agent(node)
        if self.random.random() < 0.8:
            self.world.start_agent(node)
        return there

    def depose(self) -> bool:
        """Another engine takes office; the old one goes on until it looks."""
        self.world.start_engine()
        return True

    def crash(self) -> bool:
        self.world.kill_engine()
        return True

    def reconnect(self) -> bool:
        return self.world.reconnect()

    def unable(self) -> bool:
        self.world.bad = {self.random.randrange(7)} if self.random.random() < 0.5 else set()
        return bool(self.world.bad)

    def late(self) -> bool:
        heard = bool(self.world.late)
        self.world.speak_late()
        return heard


FAULTS: dict[str, float] = {
    "change": 4, "cancel": 1, "pause": 0.5, "leave": 0.7,
    "kill": 4, "elect": 4, "zombie": 4, "agent": 1, "depose": 1, "crash": 1, "reconnect": 1, "unable": 1, "late": 2,
}  # fmt: skip


def live(seed: int, tell: Callable[[str], None] = lambda line: None) -> Life:
    """The life that the seed stands for; `tell` hears of each thing that happens."""
    life, violation = _Life(seed), ""
    try:
        for _ in range(MOMENTS):
            life.happen()
            tell(life.trace[-1])
        life.peace()
    except ElasticError as broken:
        violation = f"{type(broken).__name__}: {broken}"
    world = life.world
    effects = [f"{effect.reason}" for effect in world.effects]
    outcome = [f"{name} {world.outputs[name]} {world.ends.get(name)}" for name in world.requests]
    digest = hashlib.blake2b("\n".join([*life.trace, *effects, *outcome, violation]).encode(), digest_size=8)
    return Life(
        seed=seed,
        faults=world.faults,
        kinds=life.kinds,
        epochs=len(world.epochs),
        requests=len(world.requests),
        tokens=world.tokens,
        refused=world.refused,
        digest=digest.hexdigest(),
        violation=violation,
    )
