"""The checkpoint is replaced under a running cluster: never are answers mixed from two models, and it serves on."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest

from chaos.faults import kill
from chaos.target.cluster import ServedCluster
from elastic.explain import explain
from tests.e2e.conftest import Serve
from tests.support.helpers import eventually
from tests.support.replaced_files import put_back, replace_weights
from tests.support.served import stream_all

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]

RANKS, TOKENS = 3, 24


@pytest.fixture
def checkpoint(demo_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(demo_model, tmp_path / "demo-moe"))


def answers(cluster: ServedCluster) -> list[str]:
    return [future.result(timeout=180) for future in stream_all(cluster, cluster.model_name(), TOKENS)]


def pid_of(cluster: ServedCluster, rank: int) -> int:
    return next((int(each["pid"]) for each in cluster.status()["ranks"] if each["rank"] == rank), 0)


def states(cluster: ServedCluster) -> list[str]:
    return [str(each["state"]) for each in cluster.status()["ranks"]]


def test_a_new_rank_serves_the_old_model_and_no_other_can_join(serve: Serve, checkpoint: Path) -> None:
    cluster = serve(checkpoint, RANKS, own_zygote=True)
    cluster.wait_serving(RANKS)
    before, served = answers(cluster), cluster.status().get("model")
    old = replace_weights(checkpoint)
    kill(killed := pid_of(cluster, 1))
    eventually(lambda: pid_of(cluster, 1) not in (0, killed), 60.0, "another process in the slot")
    cluster.wait_serving(RANKS)
    assert answers(cluster) == before, "the new rank maps what the host's store holds"
    noticed = cluster.wait_event(lambda event: event.kind == "checkpoint_replaced", "the replacement noticed")
    assert noticed.fields["files"] == ["model.safetensors"]
    assert cluster.status()["model"] == served != ""

    (agent,) = cluster.client().state().agents.values()
    kill(agent.pid)  # and with it the weights in memory: what is left is another model's file
    eventually(lambda: states(cluster) == ["quarantined"] * RANKS, 90.0, "every new rank refused")
    refused = cluster.wait_event(lambda event: event.kind == "rank_refused", "a refusal")
    assert "weights" in refused.fields["reason"]
    for rank in cluster.status()["ranks"]:
        assert rank["restarts"] == 2 - (rank["rank"] != 1), "refused at its first start"
        assert "another model" in rank["reason"]
    (explained,) = explain(cluster.client().state(), time.time(), "0")
    assert "put the files back" in explained.do

    put_back(old, as_copy=True)
    for rank in range(RANKS):
        cluster.client().unquarantine(rank)
    cluster.wait_serving(RANKS)
    assert answers(cluster) == before
