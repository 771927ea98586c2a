"""What the death of one rank costs the store, by ranks and hosts: a whole simulated cluster, all roles as shipped.

    python -m benchmarks.death_writes [--sizes 8x1,64x8,256x32,256x4] [--seed 1]

Each write (a revision) is sent to every process that mirrors the cluster: agents, engines, controllers, gateways.
Counted from the death until the slot serves again; without heartbeats and loads, which no process acts on.
"""

from __future__ import annotations

import argparse
import logging
from collections import Counter
from dataclasses import dataclass
from random import Random

import structlog
from msgspec.structs import replace

from benchmarks.recovery_report import say
from chaos.simulation.cluster import SERVED, Cluster

STEP_S = 0.2
LIMIT_S = 60.0
EXPERTS = 256


@dataclass(frozen=True)
class Cost:
    """Of one death: revisions, keys changed in them by kind, bytes of the values put."""

    revisions: int
    keys: Counter[str]
    value_bytes: int
    renewals: int  # exchanges with the store, per second, of a quiet cluster


def cost_of_death(ranks: int, hosts: int, seed: str) -> Cost:
    """Boot, kill one rank, wait until the cluster is whole again."""
    config = replace(SERVED, experts=EXPERTS, redundancy=max(2.0, ranks / EXPERTS), max_ranks=ranks, rebalance_bytes=0)
    nodes = tuple(f"node-{at:03d}" for at in range(hosts))
    cluster = Cluster(seed, nodes, ranks, config)
    _settle(cluster)
    renewals = _renewals(cluster, 2.0)
    history = cluster.store._history
    start = len(history)
    victim = Random(seed).choice(sorted(cluster.ranks))
    cluster.ranks[victim].die()
    cluster.clock.run(cluster.clock.now + STEP_S)
    _settle(cluster)
    revisions, keys, size = 0, Counter[str](), 0
    for batch in history[start:]:
        events = [event for event in batch.events if not event.kv.key.startswith(cluster.keys.quiet)]
        revisions += bool(events)
        keys.update(event.kv.key.removeprefix(cluster.keys.prefix).partition("/")[0] for event in events)
        size += sum(len(event.kv.value) for event in events if event.kind == "put")
    return Cost(revisions, keys, size, renewals)


def _settle(cluster: Cluster) -> None:
    deadline = cluster.clock.now + LIMIT_S
    while trouble := cluster.trouble():
        if cluster.clock.now >= deadline:
            raise TimeoutError(f"not whole within {LIMIT_S:g} simulated seconds: {trouble}")
        cluster.clock.run(cluster.clock.now + STEP_S)


def _renewals(cluster: Cluster, seconds: float) -> int:
    store, calls, before = cluster.store, [0], cluster.store.keepalives

    def counted(*args: object, **kwargs: object) -> object:
        calls[0] += 1
        return before(*args, **kwargs)

    store.keepalives = counted
    cluster.clock.run(cluster.clock.now + seconds)
    store.keepalives = before
    return round(calls[0] / seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="8x1,8x2,64x8,256x4,256x32", help="ranks x hosts, ...")
    parser.add_argument("--seed", default="1")
    options = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    for size in options.sizes.split(","):
        ranks, hosts = map(int, size.split("x"))
        cost = cost_of_death(ranks, hosts, options.seed)
        kinds = ", ".join(f"{kind} {number}" for kind, number in cost.keys.most_common())
        say(
            f"{ranks} ranks on {hosts} hosts: {cost.revisions} writes to {hosts + 5} mirrors, "
            f"{cost.value_bytes / 1e3:.0f} kB of values; keys: {kinds}; renewals {cost.renewals} /s"
        )


if __name__ == "__main__":
    main()
