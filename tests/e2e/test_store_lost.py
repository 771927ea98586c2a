"""etcd's data are lost under a served cluster: requests go on, a rank's death is masked, nothing else changes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from chaos.faults import kill
from chaos.target.cluster import ServedCluster
from elastic.cli.client import AdminClient
from membership.base.errors import StoreReplaced
from membership.operations.change import scale
from tests.e2e.conftest import Serve
from tests.support.helpers import eventually, stopped
from tests.support.served import CALM, role_pid, streaming, under_load

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]

RANKS = 2


def wipe(cluster: ServedCluster) -> None:
    """Kill etcd and delete its data before the supervisor starts it again."""
    etcd = role_pid(cluster, "etcd")
    with stopped(cluster.pid):
        kill(etcd)
        shutil.rmtree(cluster.state.etcd_data / "data")


def said(cluster: ServedCluster, command: str) -> str:
    """What a command says of the cluster served last."""
    environment = {**os.environ, "XDG_STATE_HOME": str(cluster.state.path / "home"), "COLUMNS": "1000"}
    words = [sys.executable, "-m", "elastic.cli", command]
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=60, check=False).stdout


def test_wiped_data_are_refused_while_serving_goes_on(serve: Serve, demo_model: Path) -> None:
    cluster = serve(demo_model, RANKS)
    before = cluster.wait_serving(RANKS)
    with under_load(cluster, CALM) as workload:
        wipe(cluster)
        eventually(lambda: cluster.state.address().trouble, 60.0, "the supervisor to notice")
        address = cluster.state.address()
        client = AdminClient(address.admin_url, address.admin_token)
        eventually(lambda: "replaced" in client.status()["store"], 60.0, "the gateway to say so")
        ready = httpx.get(f"{cluster.url}/readyz", timeout=60.0)
        assert ready.status_code == 200
        assert "membership is frozen" in ready.json()["store"]
        for command in ("status", "doctor"):
            assert "membership is frozen" in said(cluster, command)
        with pytest.raises(StoreReplaced, match="replaced"):
            client.propose(scale(RANKS + 1), op_id=None, if_epoch=None, timeout_s=10.0)
        eventually(lambda: streaming(workload), 60.0, "two streams under way")
        kill(before["ranks"][1]["pid"])
        cluster.wait_event(lambda e: e.kind == "rank_masked" and e.rank == 1, "rank 1 masked")
        ended = len(workload.records())
        eventually(lambda: len(workload.records()) > ended + 4, 60.0, "requests ending")
        assert client.status()["epoch"] == before["epoch"]
        client.close()
    cluster.__exit__()
    again = serve(demo_model, RANKS, state_dir=cluster.state.path)
    assert again.wait_serving(RANKS)["store"] == ""
    assert not again.state.address().trouble
