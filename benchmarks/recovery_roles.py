"""The roles of a cluster as `recovery.py` runs them: `python -m benchmarks.recovery_roles serve` is `elastic serve`.

A hundred kills in a row are each treated as a slot's (or role's) first death, without the backoff and quarantine that
follow in production. By environment, all inherited: RECOVERY_BALLAST_MB (touched memory in each rank), RECOVERY_TTL_S
(of leases), RECOVERY_SWITCH (file of a page that turns detection and masking off and on while they run) and
RECOVERY_WORKER (a worker's class).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import msgspec

import workers.agent.preload as preload
from benchmarks import recovery_switch
from elastic.cli import main as cli
from elastic.serve import role_process
from workers.agent import exits, restart_policy, spares

BALLAST_MB = "RECOVERY_BALLAST_MB"
TTL_S = "RECOVERY_TTL_S"
WORKER = "RECOVERY_WORKER"
BALLAST_WORKER = "benchmarks.recovery_worker:BenchWorker"


def every_death_is_the_first() -> None:
    """No backoff beyond the first one's, no quarantine, no delay of roles."""
    role_process.ENTRY = "benchmarks.recovery_roles"
    role_process.STABLE_S = 0.0
    for module in (restart_policy, exits, spares):  # each knows the function by a name of its own
        module.recent_deaths = lambda policy, deaths, now: ()  # type: ignore[attr-defined]


def with_ttl(ttl_s: float) -> None:
    """Have the supervisor write this lease TTL into the cluster's configuration."""
    from elastic.serve import supervisor

    made: Callable[..., Any] = supervisor.cluster_config
    supervisor.cluster_config = lambda options: msgspec.structs.replace(made(options), lease_ttl_s=ttl_s)


def with_worker(worker: str) -> None:
    """Ranks run this subclass of the worker, forked from a forkserver that has imported all that the product's has."""
    usual = preload.preload_for
    ours = worker.partition(":")[0]
    preload.preload_for = lambda worker, *rest: (*usual("workers.rank.worker:EPWorker", *rest), ours)
    sys.argv += ["--worker-class", worker]


def main() -> None:
    """Change what the environment says, then be the `elastic` command."""
    every_death_is_the_first()
    if sys.argv[1:2] == ["serve"] and os.environ.get(TTL_S):
        with_ttl(float(os.environ[TTL_S]))
    recovery_switch.install()
    special = os.environ.get(BALLAST_MB) or os.environ.get(recovery_switch.SWITCH)
    if sys.argv[1:2] == ["agent"] and (worker := os.environ.get(WORKER) or (BALLAST_WORKER if special else "")):
        with_worker(worker)
    cli.main()


if __name__ == "__main__":
    main()
