"""One life of a simulated cluster: happenings drawn from a seed, lived while clients are served, then peace.

Safety is checked at every commit, step, token and eviction; liveness in the end, when the faults have ceased. Each
happening has a seed of its own: leaving some out changes nothing about what the others draw (`keep`). Most lives have
only some kinds, each with a weight of its own (swarm testing, Groce et al., 2012), so that rare kinds meet without
common ones drowning them; every third walks along all ordered pairs of kinds (`pairs.py`). The same seed is the same
life, to the bit: `digest` says so.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from random import Random

import msgspec
import structlog

from chaos.simulation.clock import WALL_S
from chaos.simulation.cluster import Cluster
from chaos.simulation.deeds import DEEDS
from chaos.simulation.faults import FAULTS
from chaos.simulation.laws import require
from chaos.simulation.pairs import walk
from membership.base import failpoints
from membership.base.errors import ElasticError
from membership.operations.pause import resume
from membership.operations.quarantine import unquarantine

PACES = ((120, 0.3), (120, 0.3), (120, 0.2), (60, 1.0))  # happenings, and what the gaps between them are multiplied by
GAPS_S = (0.0, 0.005, 0.05, 0.15, 0.4, 0.9)
GAP_S = 1.0  # of what is left out nothing is left but so long a gap at most
WALKED = 100
SETTLED_WITHIN_S, PEACE_WITHIN_S, POLL_S = 20.0, 60.0, 0.5
REQUEST_EVERY_S = 0.35
STAGED = 40  # views in peace: that is no progress
LATE_S = 15.0  # after its deadline, and the faults, an operation must have ended
PAIRED_EVERY = 3
USUAL = {
    "unable": 0.4, "skew": 0.4, "lag": 0.4, "outage": 0.3, "kill-agent": 0.4, "kill-two": 0.3, "kill-gateway": 0.3,
    "change": 2.5,
}  # fmt: skip


class Happening(msgspec.Struct, frozen=True):
    """One thing to happen: when, what, and the seed of what exactly."""

    at: float  # seconds after the beginning
    kind: str
    seed: int


class Step(msgspec.Struct, frozen=True):
    """A happening that was lived; `told` is what it did, "" if there was nothing to do it to."""

    index: int
    at: float
    kind: str
    told: str


class Life(msgspec.Struct, frozen=True, kw_only=True):
    """What came of a seed. `violation`: the promise that broke, "" if none did."""

    seed: int
    faults: int
    kinds: tuple[str, ...]
    steps: tuple[Step, ...] = ()
    epochs: int = 0
    requests: int = 0
    tokens: int = 0
    refused: int = 0
    seconds: float = 0.0  # of virtual time
    points: tuple[str, ...] = ()  # failpoints that struck
    digest: str = ""
    violation: str = ""


class Setup(msgspec.Struct, frozen=True, kw_only=True):
    """What a life begins with, and what will happen."""

    seed: int
    nodes: tuple[str, ...]
    desired: int
    fresh: bool  # the first happenings meet a cluster that is still starting
    schedule: tuple[Happening, ...]


def setup(seed: int) -> Setup:
    """What the seed stands for."""
    random = Random(seed)
    nodes = ("a", "b", "c")[: random.choice([1, 2, 2, 3])]
    desired, fresh = random.choice([1, 2, 3, 4, 4, 5]), random.random() < 0.15
    happenings, pace = random.choice(PACES)
    kinds = sorted({*FAULTS, *DEEDS})
    if seed % PAIRED_EVERY == 0:
        faults = walk(sorted(FAULTS), seed // PAIRED_EVERY, WALKED)
        names = [name for at, each in enumerate(faults) for name in ([each, "change"] if at % 5 == 4 else [each])]
    else:
        some = random.sample(kinds, random.choice([2, 4, 6, 8, 12, len(kinds)]))
        weights = [random.choice([1, 1, 3]) * USUAL.get(kind, 1.0) for kind in some]
        names = random.choices(some, weights, k=happenings)
    at, schedule = 0.0, list[Happening]()
    for name in names:
        at += pace * random.choice(GAPS_S) * random.uniform(0.5, 1.0)
        schedule.append(Happening(round(at, 4), name, random.getrandbits(48)))
    return Setup(seed=seed, nodes=nodes, desired=desired, fresh=fresh, schedule=tuple(schedule))


class _Life:
    """A cluster, and what has happened to it."""

    def __init__(self, plan: Setup, tell: Callable[[Step], None], timing: int) -> None:
        self.plan, self.tell = plan, tell
        seed = f"{plan.seed}.{timing}" if timing else str(plan.seed)
        self.cluster = Cluster(seed, plan.nodes, plan.desired)
        self.random = Random(f"{seed} clients")
        self.trace: list[str] = []
        self.steps: list[Step] = []
        self.loaded = True
        self.asked = 0

    def live(self, keep: Collection[int] | None) -> None:
        """Everything that is to happen, then peace."""
        cluster = self.cluster
        failpoints._armed = cluster.failpoints  # type: ignore[assignment]
        if not self.plan.fresh:
            self._until(SETTLED_WITHIN_S, "the cluster does not come up")
        began = cluster.clock.now
        cluster.clock.after(0.01, self._request)
        now = before = 0.0
        for index, happening in enumerate(self.plan.schedule):
            if keep is None or index in keep:
                now, before = now + min(happening.at - before, GAP_S), happening.at
                self._run(began + now)
                self._happen(index, happening, began)
        self._run(cluster.clock.now + 0.5)
        self._peace()

    def _happen(self, index: int, happening: Happening, began: float) -> None:
        cluster = self.cluster
        told = (FAULTS.get(happening.kind) or DEEDS[happening.kind])(cluster, Random(happening.seed))
        step = Step(index, round(cluster.clock.now - began, 3), happening.kind, told)
        self.steps.append(step)
        self.trace.append(f"{step} {cluster.store.state.revision} {cluster.tokens} {cluster.clock.calls}")
        self.tell(step)
        self._check()

    def _run(self, until: float) -> None:
        self.cluster.clock.run(until)
        self._check()

    def _check(self) -> None:
        if self.cluster.violation is not None:
            raise self.cluster.violation

    def _request(self) -> None:
        if self.loaded:
            self.ask()
            self.cluster.clock.after(self.random.uniform(0.2, 2.0) * REQUEST_EVERY_S, self._request)

    def ask(self) -> str:
        """A client asks for something."""
        self.asked += 1
        prompt = [self.random.randrange(50) for _ in range(self.random.randint(1, 25))]
        tokens, gateway = self.random.randint(1, 20), self.cluster.gateway
        if gateway.alive and not gateway.stopped:
            gateway.ask(f"r{self.asked}", prompt, tokens)
        return f"r{self.asked}"

    def _peace(self) -> None:
        """The faults cease, and everything must come to its end."""
        self.loaded = False
        self.cluster.heal()
        with suppress(ElasticError):
            resume(self.cluster.gateway.client, self.cluster.keys.cluster)
        self._until(PEACE_WITHIN_S, "the faults are over, and it never settles")
        last = self.ask()
        self._until(PEACE_WITHIN_S, "it has settled, and does not serve")
        require(self.cluster.asks[last].ended in ("stop", "length"), f"{last} ended as {self.cluster.asks[last].ended}")
        epochs = self.cluster.laws.epochs
        require(epochs == list(range(1, len(epochs) + 1)), f"epochs {epochs}")

    def _until(self, limit_s: float, what: str) -> None:
        cluster = self.cluster
        deadline, before = cluster.clock.now + limit_s, cluster.events.counts["epoch_staged"]
        while (trouble := cluster.trouble()) and cluster.clock.now < deadline:
            cluster.supervise()
            for slot, last in cluster.store.state.exits.items():
                if last.quarantined and not self.loaded:
                    with suppress(ElasticError):
                        unquarantine(cluster.gateway.client, cluster.keys.cluster, slot, clock=cluster.gateway.wall)
            self._run(cluster.clock.now + POLL_S)
            staged = cluster.events.counts["epoch_staged"] - before
            require(staged < STAGED, f"{what}: views are staged again and again")
            active = cluster.store.state.active
            if active is not None and not self.loaded:
                due = max(active.deadline - WALL_S, deadline - limit_s) + LATE_S
                require(cluster.clock.now < due, f"operation {active.id} outlives its deadline: {active.phase}")
        require(not trouble, f"{what}: {trouble}")

    def outcome(self, violation: str) -> Life:
        """What came of it."""
        cluster, steps = self.cluster, tuple(self.steps)
        asks = [f"{name} {ask.tokens} {ask.ended}" for name, ask in cluster.asks.items()]
        counted = [f"{cluster.events.counts} {cluster.clock.now} {cluster.clock.calls} {cluster.laws.epochs}"]
        digest = hashlib.blake2b("\n".join([*self.trace, *asks, *counted, violation]).encode(), digest_size=8)
        return Life(
            seed=self.plan.seed,
            faults=sum(1 for step in steps if step.kind in FAULTS and step.told and not step.told.startswith("armed"))
            + len(cluster.failpoints.struck),
            kinds=tuple(sorted({step.kind for step in steps if step.told})),
            steps=steps,
            epochs=len(cluster.laws.epochs),
            requests=len(cluster.asks),
            tokens=cluster.tokens,
            refused=sum(ask.ended == "refused" for ask in cluster.asks.values()),
            seconds=round(cluster.clock.now, 3),
            points=tuple(cluster.failpoints.struck),
            digest=digest.hexdigest(),
            violation=violation,
        )


def live(
    seed: int, keep: Collection[int] | None = None, tell: Callable[[Step], None] = lambda step: None, timing: int = 0
) -> Life:
    """The life that the seed stands for, or only the happenings `keep` of it; `tell` hears of each.

    `timing`: the same happenings at the same moments, and other delays of messages and turns between them.
    """
    with _silence():
        life, violation = _Life(setup(seed), tell, timing), ""
        try:
            life.live(keep)
        except ElasticError as broken:
            violation = f"{type(broken).__name__}: {broken}"
        return life.outcome(violation)


@contextmanager
def _silence() -> Iterator[None]:
    """What the product logs is of no interest here, and takes time; its failpoints are given back as they were."""
    before, armed = structlog.get_config(), failpoints._armed
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
    try:
        yield
    finally:
        structlog.configure(**before)
        failpoints._armed = armed
