"""`elastic serve --spares 1`: a killed rank's place is taken by the process that waited, and every stream is exact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from chaos.faults import kill
from chaos.target.cluster import ServedCluster
from tests.e2e.conftest import Serve
from tests.support.helpers import eventually
from tests.support.served import streaming, under_load

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]

RANKS = 3


def spare(cluster: ServedCluster) -> int:
    """The spare's pid, once one waits: an agent's record may still name one that serves by now."""

    def waits() -> int:
        state = cluster.client().state()
        used = {record.pid for record in state.ranks.values()}
        return next((pid for agent in state.agents.values() for pid in agent.spares if pid not in used), 0)

    return eventually(waits, 90.0, "a spare")


def rank_of(cluster: ServedCluster, rank: int) -> dict[str, Any]:
    return next((each for each in cluster.status()["ranks"] if each["rank"] == rank), {})


def test_a_spare_takes_over(serve: Serve, demo_model: Path) -> None:
    cluster = serve(demo_model, RANKS, flags=("--spares", "1"))
    cluster.wait_serving(RANKS)
    with under_load(cluster) as workload:
        for victim in (1, 0):
            waiting = spare(cluster)
            assert cluster.status()["spares"] == {"wanted": 1, "ready": 1}
            eventually(lambda: streaming(workload, 4), 60.0, "four streams")
            kill(rank_of(cluster, victim)["pid"])

            def taken(victim: int = victim, pid: int = waiting) -> bool:
                rank = rank_of(cluster, victim)
                return (rank.get("pid"), rank.get("state")) == (pid, "serving")

            eventually(taken, 60.0, "the spare serving in the victim's slot")
    assert not [event for event in cluster.events() if event.kind == "spare_lost"]
