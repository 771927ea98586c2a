"""A slot whose ranks keep dying is set aside, says why, survives its agent's death so, and comes back on request."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from chaos.faults import kill
from chaos.target.cluster import ServedCluster
from tests.e2e.conftest import Serve
from tests.support.helpers import eventually
from tests.support.served import CALM, elastic, under_load

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]

RANKS, VICTIM, INTENSITY = 3, 1, 3


def state_of(cluster: ServedCluster, rank: int = VICTIM) -> str:
    return {each["rank"]: str(each["state"]) for each in cluster.status()["ranks"]}.get(rank, "")


def successor(cluster: ServedCluster, incarnation: int) -> dict[str, Any]:
    """The victim's slot, once a later incarnation serves in it."""
    ranks = [each for each in cluster.status()["ranks"] if each["rank"] == VICTIM and each["state"] == "serving"]
    return next((each for each in ranks if each["incarnation"] > incarnation), {})


def kill_until_set_aside(cluster: ServedCluster) -> None:
    last = -1
    for _ in range(INTENSITY):
        rank = eventually(lambda after=last: successor(cluster, after), 60.0, "the victim's successor serving")
        kill(rank["pid"])
        last = rank["incarnation"]
    eventually(lambda: state_of(cluster) == "quarantined", 60.0, "the slot in quarantine")


def test_a_slot_is_set_aside_and_comes_back(serve: Serve, demo_model: Path) -> None:
    cluster = serve(demo_model, RANKS, flags=("--restart-intensity", str(INTENSITY), "--restart-window", "600s"))
    cluster.wait_serving(RANKS)
    with under_load(cluster, CALM):
        kill_until_set_aside(cluster)
        (explained,) = elastic(cluster, "explain", str(VICTIM))
        assert (explained["state"], explained["do"][-len("elastic unquarantine 1") :]) == (
            "quarantined",
            "elastic unquarantine 1",
        )
        assert f"{INTENSITY} deaths within 600 s" in explained["because"][-1]
        assert "killed by signal 9" in explained["because"][-1]

        (agent,) = cluster.client().state().agents.values()
        kill(agent.pid)
        eventually(lambda: [state_of(cluster, rank) for rank in (0, 2)] == ["serving"] * 2, 60.0, "the others back")
        eventually(lambda: all(a.pid != agent.pid for a in cluster.client().state().agents.values()), 60.0, "an agent")
        assert state_of(cluster) == "quarantined", "also of a new agent"

        assert elastic(cluster, "unquarantine", str(VICTIM))["state"] == "serving"
        cluster.wait_serving(RANKS)
        (rank,) = [each for each in cluster.status()["ranks"] if each["rank"] == VICTIM]
        kill(rank["pid"])
        eventually(lambda: successor(cluster, rank["incarnation"]), 60.0, "the victim's successor serving")
        cluster.wait_serving(RANKS)
        assert elastic(cluster, "explain")[0]["state"] == "serving", "one more death is a first one"
