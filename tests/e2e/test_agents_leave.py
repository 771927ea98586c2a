"""A second agent joins and leaves by SIGTERM while clients stream; the size follows the agents, if it is to."""

from __future__ import annotations

import signal
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from chaos.target.cluster import ServedCluster
from tests.e2e.conftest import Serve
from tests.support.helpers import eventually
from tests.support.served import another, elastic, under_load

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

T = 60.0


def where(cluster: ServedCluster) -> dict[int, str]:
    return {rank["rank"]: rank["node"] for rank in elastic(cluster, "status")["ranks"] if rank["state"] == "serving"}


def of(cluster: ServedCluster, node: str) -> Callable[[], int]:
    return lambda: list(where(cluster).values()).count(node)


def test_sigterm_hands_an_agents_work_over(serve: Serve, demo_model: Path) -> None:
    cluster = serve(demo_model, 2)
    cluster.wait_serving(2)
    with another(cluster, "agent", "--node", "other") as other:
        eventually(lambda: "other" in cluster.client().state().agents, T, "the second agent to register")
        assert elastic(cluster, "scale", "4")["phase"] == "done"
        assert of(cluster, "other")() == 2
        with under_load(cluster, busy=6):
            other.send_signal(signal.SIGTERM)
            assert other.wait(timeout=T) == 0
    leaving = [event for event in cluster.events() if event.kind == "agent_leaving"]
    assert len(leaving[0].fields["ranks"]) == 2
    died = [event for event in cluster.events() if event.kind == "rank_died"]
    assert not died, "they were retired, none was lost"
    status = cluster.wait_serving(4)
    assert {rank["node"] for rank in status["ranks"]} == {node["node"] for node in status["nodes"]}
    assert status["desired"] == 4


def test_the_size_follows_the_agents(serve: Serve, demo_model: Path) -> None:
    cluster = serve(demo_model, 2, flags=("--follow-agents", "2"))
    cluster.wait_serving(2)
    assert elastic(cluster, "status")["owner"] == "agents"
    with ExitStack() as stack:
        other = stack.enter_context(another(cluster, "agent", "--node", "other"))
        cluster.wait_serving(4, timeout_s=T)
        assert of(cluster, "other")() == 2
        other.send_signal(signal.SIGTERM)
        assert other.wait(timeout=T) == 0
        status = cluster.wait_serving(2, timeout_s=T)
        assert status["desired"] == 2
