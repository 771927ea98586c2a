"""One episode of a simulated cluster: events drawn from a seed, while clients are served; then quiescence.

Safety is checked at every commit, step, token and eviction, liveness in the end without faults. Each event has its own
seed, so leaving some out (`keep`) changes nothing about what the others draw. Most episodes have only some
kinds of events, each with its own weight (swarm testing, Groce et al., 2012), so that rare kinds meet without common
ones drowning them. Every third walks along all ordered pairs of faults (`pairs.py`). The same seed gives the same
episode, bit for bit: its `digest` is the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from random import Random

import msgspec
import structlog

from chaos.simulation.actions import ACTIONS
from chaos.simulation.clock import WALL_S
from chaos.simulation.cluster import SERVED, WITH_GPUS, Cluster
from chaos.simulation.faults import FAULTS, Action
from chaos.simulation.gpu_faults import GPU_FAULTS
from chaos.simulation.host_faults import ENDS, HOST_FAULTS
from chaos.simulation.invariants import require
from chaos.simulation.pairs import walk
from membership.base import failpoints
from membership.base.errors import ElasticError
from membership.base.timing import FAILED_REST_S
from membership.operations.pause import resume
from membership.operations.quarantine import unquarantine

PACES = ((120, 0.3), (120, 0.3), (120, 0.2), (60, 1.0))  # (number of events, factor of the gaps between them)
GAPS_S = (0.0, 0.005, 0.05, 0.15, 0.4, 0.9)
GAP_S = 1.0  # longest gap that events leave behind which are left out
WALKED = 100
AGENTS, RANKS = (1, 2, 2, 3), (1, 2, 3, 4, 4, 5)
AGENTS_WITH_GPUS, RANKS_WITH_GPUS = (
    (1, 1, 1, 2),
    (2, 3, 4, 4, 5),
)  # one agent's windows; of two ranks each has all
SETTLED_WITHIN_S, POLL_S = 20.0, 0.5
QUIESCENT_WITHIN_S = FAILED_REST_S + 20.0  # a rebalance that failed last thing rests before it is tried again
CONVERGED_WITHIN_S = 10.0  # promised where nothing but links had failed
REQUEST_EVERY_S = 0.35
STAGED = 40  # views staged without faults: that is no progress
LATE_S = 15.0  # within which an operation must end after its deadline and after the faults
PAIRED_EVERY = 3
LINKS_ALONE = 0.4  # of the other episodes over hosts
WEIGHTS = {
    "unable": 0.4, "skew": 0.4, "lag": 0.4, "outage": 0.3, "kill-agent": 0.4, "kill-two": 0.3, "kill-gateway": 0.3,
    "change": 2.5,
}  # fmt: skip

OnStep = Callable[["Step"], None]


class Scheduled(msgspec.Struct, frozen=True):
    """One event to come: when, its kind, and the seed of its details."""

    at: float  # seconds after the beginning
    kind: str
    seed: int


class Step(msgspec.Struct, frozen=True):
    """An event that was executed. `outcome`: what it did, "" if there was nothing to do."""

    index: int
    at: float
    kind: str
    outcome: str = msgspec.field(name="told")


class Episode(msgspec.Struct, frozen=True, kw_only=True):
    """The result of one seed. `violation`: the invariant that broke, "" if none did."""

    seed: int
    hosts: int = 0
    gpus: bool = False
    faults: int
    kinds: tuple[str, ...]
    steps: tuple[Step, ...] = ()
    epochs: int = 0
    requests: int = 0
    tokens: int = 0
    refused: int = 0
    seconds: float = 0.0  # of virtual time
    points: tuple[str, ...] = ()  # failpoints that were triggered
    digest: str = ""
    violation: str = ""


class Setup(msgspec.Struct, frozen=True, kw_only=True):
    """What an episode begins with, and its events."""

    seed: int
    nodes: tuple[str, ...]
    desired: int
    fresh: bool  # the first events occur while the cluster is still starting
    schedule: tuple[Scheduled, ...]
    hosts: int = 0  # with a network between them; 0: all is on one
    gpus: bool = False  # ranks run steps together over windows of slots


def setup(seed: int, hosts: int = 0, *, gpus: bool = False) -> Setup:
    """What the seed determines, on one host or several, or on one with GPUs."""
    random = Random(f"{seed} on {hosts} hosts" if hosts else f"{seed} on GPUs" if gpus else seed)
    nodes = ("a", "b", "c")[: hosts or random.choice(AGENTS_WITH_GPUS if gpus else AGENTS)]
    desired, fresh = random.choice(RANKS_WITH_GPUS if gpus else RANKS), random.random() < 0.15
    events, pace = random.choice(PACES)
    faults = sorted(every_fault(hosts, gpus=gpus))
    kinds = sorted({*faults, *ACTIONS})
    if seed % PAIRED_EVERY == 0:
        walked = walk(faults, seed // PAIRED_EVERY, WALKED)
        order = [kind for i, each in enumerate(walked) for kind in ([each, "change"] if i % 5 == 4 else [each])]
    else:
        if hosts and random.random() < LINKS_ALONE:
            kinds = [*sorted(HOST_FAULTS.keys() - ENDS), "change", "halt", "hang-up"]
        some = random.sample(kinds, random.choice([n for n in (2, 4, 6, 8, 12, len(kinds)) if n <= len(kinds)]))
        weights = [random.choice([1, 1, 3]) * WEIGHTS.get(kind, 1.0) for kind in some]
        order = random.choices(some, weights, k=events)
    at, schedule = 0.0, list[Scheduled]()
    for kind in order:
        at += pace * random.choice(GAPS_S) * random.uniform(0.5, 1.0)
        schedule.append(Scheduled(round(at, 4), kind, random.getrandbits(48)))
    return Setup(seed=seed, nodes=nodes, desired=desired, fresh=fresh, schedule=tuple(schedule), hosts=hosts, gpus=gpus)


def every_fault(hosts: int = 0, *, gpus: bool = False) -> dict[str, Action]:
    """What may go wrong on one host, on several, or on one with GPUs."""
    return FAULTS | (HOST_FAULTS if hosts else {}) | (GPU_FAULTS if gpus else {})


class _Run:
    """A cluster, and what has happened in it."""

    def __init__(self, plan: Setup, on_step: OnStep, timing: int) -> None:
        self.plan, self.on_step = plan, on_step
        seed = f"{plan.seed}.{timing}" if timing else str(plan.seed)
        config = WITH_GPUS if plan.gpus else SERVED
        self.cluster = Cluster(seed, plan.nodes, plan.desired, config, hosts=plan.hosts > 0)
        self.random = Random(f"{seed} clients")
        self.trace: list[str] = []
        self.steps: list[Step] = []
        self.load = True
        self.requested = 0

    def run(self, keep: Collection[int] | None) -> None:
        """Execute all events, or those in `keep`; then quiescence."""
        cluster = self.cluster
        failpoints._armed = cluster.failpoints  # type: ignore[assignment]
        if not self.plan.fresh:
            self._until(SETTLED_WITHIN_S, "the cluster does not come up")
        began = cluster.clock.now
        cluster.clock.after(0.01, self._request)
        now = before = 0.0
        for index, event in enumerate(self.plan.schedule):
            if keep is None or index in keep:
                now, before = now + min(event.at - before, GAP_S), event.at
                self._run(began + now)
                self._execute(index, event, began)
        self._run(cluster.clock.now + 0.5)
        self._quiesce()

    def _execute(self, index: int, event: Scheduled, began: float) -> None:
        cluster = self.cluster
        action = every_fault(self.plan.hosts, gpus=self.plan.gpus).get(event.kind) or ACTIONS[event.kind]
        outcome = action(cluster, Random(event.seed))
        step = Step(index, round(cluster.clock.now - began, 3), event.kind, outcome)
        self.steps.append(step)
        self.trace.append(f"{_traced(step)} {cluster.store.state.revision} {cluster.tokens} {cluster.clock.calls}")
        self.on_step(step)
        self._check()

    def _run(self, until: float) -> None:
        self.cluster.clock.run(until)
        self._check()

    def _check(self) -> None:
        if self.cluster.violation is not None:
            raise self.cluster.violation

    def _request(self) -> None:
        if self.load:
            self.request()
            self.cluster.clock.after(self.random.uniform(0.2, 2.0) * REQUEST_EVERY_S, self._request)

    def request(self) -> str:
        """A client sends a request; its name."""
        self.requested += 1
        prompt = [self.random.randrange(50) for _ in range(self.random.randint(1, 25))]
        common = min(self.requested * 5 % 21, len(prompt))  # most begin like others
        prompt[:common] = range(4, 4 + common)
        tokens, gateway = self.random.randint(1, 20), self.cluster.gateway
        if gateway.alive and not gateway.stopped:
            gateway.submit(f"r{self.requested}", prompt, tokens)
        return f"r{self.requested}"

    def _quiesce(self) -> None:
        """The faults cease. Then everything must settle, requests included."""
        self.load = False
        self.cluster.heal()
        with suppress(ElasticError):
            resume(self.cluster.gateway.client, self.cluster.keys.cluster)
        failed = {step.kind for step in self.steps if step.outcome} - ACTIONS.keys()
        of_links = bool(failed) and failed <= HOST_FAULTS.keys() - ENDS
        limit_s = CONVERGED_WITHIN_S if of_links else QUIESCENT_WITHIN_S
        self._until(limit_s, "the faults are over, and it does not settle")
        last = self.request()
        self._until(QUIESCENT_WITHIN_S, "it has settled, and does not serve")
        require(
            self.cluster.requests[last].ended in ("stop", "length"),
            f"{last} ended as {self.cluster.requests[last].ended}",
        )
        epochs = self.cluster.invariants.epochs
        require(epochs == list(range(1, len(epochs) + 1)), f"epochs {epochs}")

    def _until(self, limit_s: float, what: str) -> None:
        cluster = self.cluster
        deadline, before = cluster.clock.now + limit_s, cluster.events.counts["epoch_staged"]
        while (trouble := cluster.trouble()) and cluster.clock.now < deadline:
            cluster.supervise()
            for slot, last in cluster.store.state.exits.items():
                if last.quarantined and not self.load:
                    with suppress(ElasticError):
                        unquarantine(cluster.gateway.client, cluster.keys.cluster, slot, clock=cluster.gateway.wall)
            self._run(cluster.clock.now + POLL_S)
            staged = cluster.events.counts["epoch_staged"] - before
            require(staged < STAGED, f"{what}: views are staged again and again")
            active = cluster.store.state.active
            if active is not None and not self.load:
                due = max(active.deadline - WALL_S, deadline - limit_s) + LATE_S
                require(cluster.clock.now < due, f"operation {active.id} outlives its deadline: {active.phase}")
        require(not trouble, f"{what}: {trouble}")

    def result(self, violation: str) -> Episode:
        cluster, steps = self.cluster, tuple(self.steps)
        effective = [s for s in steps if s.kind not in ACTIONS and s.outcome and not s.outcome.startswith("armed")]
        requests = [f"{name} {ask.tokens} {ask.ended}" for name, ask in cluster.requests.items()]
        counted = [f"{cluster.events.counts} {cluster.clock.now} {cluster.clock.calls} {cluster.invariants.epochs}"]
        digest = hashlib.blake2b("\n".join([*self.trace, *requests, *counted, violation]).encode(), digest_size=8)
        return Episode(
            seed=self.plan.seed,
            hosts=self.plan.hosts,
            gpus=self.plan.gpus,
            faults=len(effective) + len(cluster.failpoints.triggered),
            kinds=tuple(sorted({step.kind for step in steps if step.outcome})),
            steps=steps,
            epochs=len(cluster.invariants.epochs),
            requests=len(cluster.requests),
            tokens=cluster.tokens,
            refused=sum(each.ended == "refused" for each in cluster.requests.values()),
            seconds=round(cluster.clock.now, 3),
            points=tuple(cluster.failpoints.triggered),
            digest=digest.hexdigest(),
            violation=violation,
        )


def _traced(step: Step) -> str:
    """Part of the digest, which must stay the same over versions."""
    return f"Step(index={step.index!r}, at={step.at!r}, kind={step.kind!r}, told={step.outcome!r})"


def run_episode(
    seed: int,
    keep: Collection[int] | None = None,
    on_step: OnStep = lambda step: None,
    timing: int = 0,
    hosts: int = 0,
    *,
    gpus: bool = False,
) -> Episode:
    """Run the seed's episode, or only the events `keep` of it. `on_step` gets each event that was executed.

    Another `timing` gives the same events at the same moments, with other delays of messages and turns between them.
    """
    with _quiet_logs():
        run, violation = _Run(setup(seed, hosts, gpus=gpus), on_step, timing), ""
        try:
            run.run(keep)
        except ElasticError as broken:
            violation = f"{type(broken).__name__}: {broken}"
        return run.result(violation)


@contextmanager
def _quiet_logs() -> Iterator[None]:
    """The product's logs are of no interest here and take time. Failpoints are restored afterwards."""
    before, armed = structlog.get_config(), failpoints._armed
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
    try:
        yield
    finally:
        structlog.configure(**before)
        failpoints._armed = armed
