"""Executors with small workers, and ranks started through them."""

from __future__ import annotations

import threading
from collections.abc import Collection
from typing import Any

from membership.base.errors import ElasticError
from membership.base.rank_id import ProcessId
from membership.store.records import ClusterConfig
from workers.agent.executor import MultiprocExecutor
from workers.agent.handles import WorkerProcHandle

WORKER = "tests.support.small_worker:SmallWorker"
STOP_TIMEOUT_S = 10.0


def config(faults: str = "") -> ClusterConfig:
    return ClusterConfig(cluster="c", model=faults, served_model_name="m", moe_layers=1, experts=2)


def executor(faults: str = "", **more: Any) -> MultiprocExecutor:
    return MultiprocExecutor(config(faults), "n", worker_class=WORKER, **more)


def launch(executor: MultiprocExecutor, keys: Collection[ProcessId], timeout_s: float) -> list[WorkerProcHandle]:
    """Start ranks and wait until all are ready; the first failure is raised."""
    outcomes: dict[ProcessId, WorkerProcHandle | ElasticError] = {}
    started = threading.Condition()

    def on_started(key: ProcessId, outcome: WorkerProcHandle | ElasticError) -> None:
        with started:
            outcomes[key] = outcome
            started.notify_all()

    executor.start(keys, timeout_s, on_started)
    with started:
        assert started.wait_for(lambda: len(outcomes) == len(keys), timeout_s + STOP_TIMEOUT_S), f"only {outcomes}"
    for outcome in outcomes.values():
        if isinstance(outcome, ElasticError):
            raise outcome
    return [executor.workers[key] for key in keys]
