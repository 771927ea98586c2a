"""A rank that is stopped for longer than its lease is given up, and is harmless when it wakes up again."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import psutil
import pytest

from chaos.target.cluster import ServedCluster
from tests.e2e.conftest import Serve
from tests.e2e.test_kill_rank import RANKS, back_as_new
from tests.support.helpers import eventually, hang, running
from tests.support.served import CALM, shows, under_load

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]


def masked(cluster: ServedCluster, incarnation: int) -> str:
    """By what sign this incarnation was masked; "" if it was not."""
    found = (e for e in cluster.events() if e.kind == "rank_masked" and e.fields["incarnation"] == incarnation)
    return next((str(e.fields["source"]) for e in found), "")


def fenced(metrics: str) -> float:
    for line in metrics.splitlines():
        if line.startswith("elastic_ep_fenced_total") and 'what="rank"' in line:
            return float(line.split()[-1])
    return 0.0


def test_stopped_past_its_lease_then_continued(serve: Serve, demo_model: Path) -> None:
    cluster = serve(demo_model, RANKS)
    cluster.wait_serving(RANKS)
    with under_load(cluster, CALM):
        # One wakes as soon as it is masked, and finds itself evicted; one stays stopped beyond its lease.
        for rank, wakes in ((1, True), (2, False)):
            victim = next(r for r in cluster.status()["ranks"] if r["rank"] == rank)
            process = psutil.Process(victim["pid"])
            hang(victim["pid"])
            sign = eventually(lambda i=victim["incarnation"]: masked(cluster, i), 60.0, f"mask of rank {rank}")
            assert sign in ("stopped", "robust futex", "pidfd", "queue"), sign
            if wakes:
                os.kill(victim["pid"], signal.SIGCONT)
            eventually(lambda p=process: not running(p), 60.0, f"the evicted process of rank {rank} to be ended")
            eventually(
                lambda r=rank, v=victim: back_as_new(cluster, r, v["incarnation"]), 60.0, f"rank {rank} serving again"
            )
        shows(cluster, lambda text: fenced(text) >= 1, "a fenced rank")
