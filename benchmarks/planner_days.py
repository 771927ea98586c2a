"""The controller's looks on the planner's bad days, at the size of the largest open models. No process, no network.

    python -m benchmarks.planner_days [--ranks 256] [--layers 58] [--experts 256] [--redundancy 1.25] [--only boot,loss]
    python -m benchmarks.planner_days --ranks 1024 --redundancy 4 --only growth,loss

A look is what the controller computes between reading a state and writing an effect: `reconcile`, or `reconcile` and
`due` if there is nothing to do. Agents answer at once. Figures are processor time of one look, in milliseconds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from msgspec.structs import replace

from benchmarks.recovery_report import Report, say
from membership.placement.balance import imbalance
from membership.placement.plan import moves
from membership.planning import cluster_facts
from membership.planning.planner import Effect, due, reconcile
from membership.store.records import (
    MAX_RANKS,
    AgentRecord,
    ClusterConfig,
    ClusterState,
    Desired,
    ExpertLoad,
    RankExit,
    RankRecord,
    RankState,
)

SPREAD = 0.5  # sigma of the lognormal loads: the busiest of 256 experts has some 4 times the mean
EXPERT_BYTES = 44 << 20  # 3 matrices of 7168 x 2048 in fp8
GOAL_MS = 100.0
LIMIT = "MAX_RANKS"
MOST_LOOKS = 120  # of one day: the background goes on for hours


@dataclass
class Cluster:
    """A cluster whose agents, ranks and engine do at once what the controller waits for."""

    config: ClusterConfig
    state: ClusterState = field(init=False)
    now: float = 1000.0
    looks: list[tuple[float, str]] = field(default_factory=list)
    moved: int = 0

    def __post_init__(self) -> None:
        self.state = ClusterState(revision=1, config=self.config, desired=Desired(ranks=1))

    def agents(self, number: int, capacity: int) -> None:
        """Register this number of agents."""
        found = {
            name: AgentRecord(node=name, pid=1, started=1.0, capacity=capacity)
            for name in (f"host-{at:04d}" for at in range(number))
        }
        self.state = replace(self.state, agents=found)

    def want(self, ranks: int) -> None:
        """Set the desired size."""
        self.state = replace(self.state, desired=Desired(ranks=ranks))

    def measured(self, seed: int) -> None:
        """Publish loads, as the engine does: in 16ths of the layer's mean."""
        raw = np.random.default_rng(seed).lognormal(0.0, SPREAD, (self.config.moe_layers, self.config.experts))
        loads = np.rint(16 * raw / raw.mean(axis=1, keepdims=True)).astype(int)
        self.state = replace(self.state, expert_load=ExpertLoad(at=0.0, loads=tuple(map(tuple, loads.tolist()))))

    def kill(self, ranks: Iterable[int]) -> None:
        """These ranks exit. They may be started again a second later."""
        dead = set(ranks)
        view = self.state.view
        exits = {
            m.rank: RankExit(
                rank=m.rank, incarnation=m.incarnation, reason="killed", at=self.now, not_before=self.now + 1.0
            )
            for m in (view.members if view else ())
            if m.rank in dead
        }
        left = {key: record for key, record in self.state.ranks.items() if key[0] not in dead}
        self.state = replace(self.state, ranks=left, exits={**self.state.exits, **exits})

    def settle(self) -> None:
        """Let controller and agents act until nothing is left to do, or it is enough."""
        for _ in range(MOST_LOOKS):
            began = time.process_time()
            effects = reconcile(self.state, self.now)
            at = due(self.state, self.now) if not effects else None
            self.looks.append((1e3 * (time.process_time() - began), effects[0].reason if effects else "nothing to do"))
            if effects:
                self._apply(effects[0])
            elif not self._act():
                if at is None:
                    return
                self.now = at

    def _apply(self, effect: Effect) -> None:
        before = self.state
        revision = before.revision + 1
        state = replace(before, revision=revision)
        if effect.commit is not None:
            held = before.view.placement if before.view else {}
            self.moved += len(moves(held, effect.commit.placement))
            state = replace(state, view=effect.commit, view_revision=revision, next=None, next_revision=0)
        if effect.unstage:
            state = replace(state, next=None, next_revision=0)
        if effect.stage is not None:
            state = replace(state, next=effect.stage, next_revision=revision)
        self.state = replace(
            state,
            assignments={**state.assignments, **{a.node: a for a in effect.assignments}},
            incarnation=effect.incarnation or state.incarnation,
            desired=effect.desired or state.desired,
        )

    def _act(self) -> bool:
        """Assigned ranks register and prepare what is staged; others end. Return whether anything changed."""
        state, ranks = self.state, dict[object, RankRecord]()
        for node, assignment in state.assignments.items():
            for spec in assignment.ranks:
                last = state.exits.get(spec.rank)
                if last is None or last.incarnation < spec.incarnation:
                    ranks[spec.id] = RankRecord(
                        rank=spec.rank, incarnation=spec.incarnation, node=node, pid=1, state=RankState.STANDBY,
                        prepared_revision=state.next_revision,
                    )  # fmt: skip
        changed = ranks != state.ranks
        self.state = replace(state, revision=state.revision + 1, ranks=ranks)
        return changed


def boot(config: ClusterConfig, ranks: int, hosts: int, seed: int | None = 1) -> Cluster:
    """Return a cluster that serves with this many ranks, spread evenly over the hosts."""
    cluster = Cluster(config)
    cluster.agents(hosts, -(-ranks // hosts))
    if seed is not None:
        cluster.measured(seed)
    cluster.want(ranks)
    cluster.settle()
    return cluster


def first_on_second_host(config: ClusterConfig, ranks: int) -> Cluster:
    """8 ranks on one host, and one more that has only a second host to go to."""
    cluster = boot(config, 8, 1)
    cluster.agents(2, 8)
    cluster.want(9)
    cluster.settle()
    return cluster


def losses(config: ClusterConfig, ranks: int, hosts: int, dead: int) -> Cluster:
    """This many neighbouring ranks die at once and are replaced; then the background evens the load out."""
    cluster = boot(config, ranks, hosts)
    cluster.kill(range(ranks // 2, ranks // 2 + dead))
    cluster.settle()
    return cluster


def growth(config: ClusterConfig, before: int, ranks: int, hosts: int) -> Cluster:
    """From `before` ranks to `ranks` in one change, on new hosts. And back again."""
    cluster = boot(config, before, max(1, hosts * before // ranks))
    cluster.agents(hosts, ranks // hosts)
    cluster.want(ranks)
    cluster.settle()
    cluster.want(before)
    cluster.settle()
    return cluster


def new_loads(config: ClusterConfig, ranks: int, hosts: int) -> Cluster:
    """Other experts become busy."""
    cluster = boot(config, ranks, hosts)
    cluster.measured(2)
    cluster.settle()
    return cluster


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in (("ranks", 256), ("layers", 58), ("experts", 256)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--redundancy", type=float, default=1.25)
    parser.add_argument("--only", default="", help="beginnings of the days' names")
    options = parser.parse_args()
    config = ClusterConfig(
        cluster="bench", model="", served_model_name="", moe_layers=options.layers, experts=options.experts,
        redundancy=options.redundancy, max_ranks=options.ranks, expert_bytes=EXPERT_BYTES,
    )  # fmt: skip
    ranks = options.ranks
    setattr(cluster_facts, LIMIT, max(ranks, MAX_RANKS))  # the live mask has no place for more; the planner may
    days = {
        "second host: 8 + 1 ranks": lambda: first_on_second_host(config, ranks),
        "boot, no loads, 1 host": lambda: boot(config, ranks, 1, None),
        "boot, no loads, 2 hosts": lambda: boot(config, ranks, 2, None),
        "boot, loads, 2 hosts": lambda: boot(config, ranks, 2),
        "boot, loads, 32 hosts": lambda: boot(config, ranks, 32),
        "loss of a rank, 2 hosts": lambda: losses(config, ranks, 2, 1),
        "loss of a rank, 32 hosts": lambda: losses(config, ranks, 32, 1),
        "loss of a host of 32": lambda: losses(config, ranks, 32, ranks // 32),
        "loss of a host of 8": lambda: losses(config, ranks, 8, ranks // 8),
        "growth by a rank, 32 hosts": lambda: growth(config, ranks - 1, ranks, 32),
        "growth by a host of 32": lambda: growth(config, ranks - ranks // 32, ranks, 32),
        "growth to the double, 2 hosts": lambda: growth(config, ranks // 2, ranks, 2),
        "growth to the double, 32 hosts": lambda: growth(config, ranks // 2, ranks, 32),
        "new loads, 32 hosts": lambda: new_loads(config, ranks, 32),
    }
    report = Report(None)
    size = f"{options.layers} x {options.experts} x {ranks}, redundancy {options.redundancy:g}"
    for name, day in days.items():
        if options.only and not name.startswith(tuple(options.only.split(","))):
            continue
        cluster = day()
        report.add(name, size, f"<= {GOAL_MS:g} ms", [ms for ms, _ in cluster.looks])
        worst = max(cluster.looks)
        loads, view = cluster.state.expert_load, cluster.state.view
        even = f", imbalance {imbalance(view.placement, loads.loads):.3f}" if loads and view else ""
        report.note(f"{name}: {cluster.moved} experts moved{even}; worst look {worst[0]:.1f} ms: {worst[1][:40]}")
    say(report.table())


if __name__ == "__main__":
    main()
