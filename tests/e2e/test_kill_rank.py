"""Kill any rank while requests stream: nothing is lost, duplicated or altered, and a replacement rejoins."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import pytest

from chaos.cluster import ServedCluster
from chaos.history import compare
from chaos.inject import kill
from chaos.workload import Workload
from tests.e2e.conftest import Serve
from tests.e2e.fault_free import fault_free
from tests.helpers import eventually

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]

RANKS = 4


def streaming(workload: Workload) -> bool:
    return sum(count > 2 for count in workload.open_streams().values()) >= 4


def back_as_new(cluster: ServedCluster, rank: int, incarnation: int) -> bool:
    status = cluster.status()
    states = {r["rank"]: r for r in status["ranks"]}
    return (
        status["state"] == "serving"
        and len(states) == RANKS
        and all(r["state"] == "serving" for r in states.values())
        and states[rank]["incarnation"] > incarnation
    )


def test_each_rank_in_turn(serve: Serve, demo_model: Path) -> None:
    """Every request is exact; and with a rank dead, before its replacement serves, tokens keep coming."""
    cluster = serve(demo_model, RANKS)
    cluster.wait_serving(RANKS)
    model = cluster.model_name()
    oracle = fault_free(cluster)
    epochs, away = [cluster.status()["epoch"]], list[tuple[float, float]]()
    workload = Workload(cluster.url, model)
    workload.start()
    try:
        for rank in range(RANKS):
            eventually(lambda: streaming(workload), 30.0, "four streams under way")
            victim = next(r for r in cluster.status()["ranks"] if r["rank"] == rank)
            killed = kill(victim["pid"])
            assert killed.gone_at >= killed.sent_at
            eventually(
                lambda r=rank, v=victim: back_as_new(cluster, r, v["incarnation"]), 60.0, f"rank {rank} serving again"
            )
            epochs.append(cluster.status()["epoch"])
            away.append((killed.gone_at, time.time()))
    finally:
        history = workload.stop()
    verdict = compare(history, oracle)
    assert verdict.ok, verdict.differences
    assert verdict.requests > RANKS
    assert all(later >= earlier + 2 for earlier, later in itertools.pairwise(epochs)), epochs
    masked = [e for e in cluster.events() if e.kind == "rank_masked"]
    assert {e.rank for e in masked} >= set(range(RANKS))
    offset = time.time() - time.monotonic()
    times = [at + offset for record in history for at in record.token_times]
    assert all(any(gone < at < back for at in times) for gone, back in away), "no token while a rank was away"
