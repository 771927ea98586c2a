"""Drain, undrain, cancel and pause by the command line, under streaming load: any rank, and no client notices."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from chaos.faults import kill
from chaos.target.cluster import ServedCluster
from chaos.target.warm_start import WarmStart
from membership.base.failpoints import ENV
from membership.operations.change import scale
from membership.store.records import Phase
from tests.e2e.conftest import Serve
from tests.support.helpers import eventually
from tests.support.served import command, elastic, elastic_text, refused, under_load

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]


def serving(cluster: ServedCluster) -> list[int]:
    return [rank["rank"] for rank in elastic(cluster, "status")["ranks"] if rank["state"] == "serving"]


def planned(cluster: ServedCluster, *arguments: str) -> tuple[int, dict[str, Any]]:
    outcome = command(cluster, *arguments, "--plan", "-o", "json")
    return outcome.returncode, json.loads(outcome.stdout)


def test_rank_0_is_drained_and_comes_back_while_requests_stream(serve: Serve, demo_model: Path) -> None:
    cluster = serve(demo_model, 4)
    cluster.wait_serving(4)
    status, plan = planned(cluster, "drain", "0")
    assert (status, plan["remove"], plan["target"]) == (2, [0], 3)
    with under_load(cluster, busy=6) as workload:
        drained = elastic(cluster, "drain", "0", "--op-id", "out")
        assert (drained["phase"], drained["kind"], drained["ranks"]) == ("done", "drain", [0])
        ended = len(workload.records())
        eventually(lambda: len(workload.records()) > ended + 8, 60.0, "requests ending without rank 0")
    assert serving(cluster) == [1, 2, 3]
    assert elastic(cluster, "status")["drained"] == [0]
    assert "rank 0 is drained already" in refused(cluster, "drain", "0")
    assert "elastic undrain 0" in elastic_text(cluster, "explain", "0")
    assert "drain of rank 0" in elastic_text(cluster, "ops", "ls")
    assert f"epoch {drained['epoch']};" in elastic_text(cluster, "ops", "show", "out")
    with under_load(cluster, busy=6):
        assert elastic(cluster, "undrain", "0")["phase"] == "done"
    assert serving(cluster) == [0, 1, 2, 3]
    assert "is done, and stands" in refused(cluster, "ops", "cancel", "out")


def test_a_scale_is_cancelled_while_its_ranks_start(demo_model: Path, tmp_path: Path, warm: WarmStart) -> None:
    """The agent waits before it starts one, for as long as the answer takes; its lease is renewed meanwhile."""
    gate = tmp_path / "gate"
    gate.touch()
    faults = {ENV: f"agent.before.spawn=wait:{gate}"}
    with ServedCluster(demo_model, 2, state_dir=tmp_path / "state", environ=faults, warm=warm) as cluster:
        before = cluster.wait_serving(2)
        client = cluster.client()
        gate.unlink()
        client.propose(scale(4), op_id="up", if_epoch=None, timeout_s=120.0)
        eventually(lambda: client.operation("up").phase is Phase.SPAWNING, 60.0, "the controller to send ranks")
        client.cancel("up", "a test")
        gate.touch()
        eventually(lambda: client.operation("up").phase is Phase.ABORTED, 60.0, "the operation to be rolled back")
        assert client.operation("up").error == "cancelled by a test"
        after = cluster.wait_serving(2)
        assert (after["epoch"], after["desired"]) == (before["epoch"], 2)
        assert [rank["incarnation"] for rank in after["ranks"]] == [rank["incarnation"] for rank in before["ranks"]]
        assert elastic(cluster, "ops", "cancel", "up")["phase"] == "aborted"
        assert elastic(cluster, "scale", "3")["phase"] == "done"


def test_a_pause_refuses_changes_and_mends_losses(serve: Serve, demo_model: Path) -> None:
    cluster = serve(demo_model, 2)
    cluster.wait_serving(2)
    elastic(cluster, "pause", "--ttl", "10m", "--reason", "new switches")
    assert "new switches" in refused(cluster, "scale", "3")
    assert "new switches" in elastic_text(cluster, "status")
    assert "new switches" in elastic_text(cluster, "explain")
    victim = elastic(cluster, "status")["ranks"][1]
    kill(victim["pid"])
    eventually(lambda: _reborn(cluster, victim["incarnation"]), 60.0, "rank 1 serving again")
    assert elastic(cluster, "resume") == {"resumed": True}
    assert elastic(cluster, "resume") == {"resumed": False}
    assert elastic(cluster, "scale", "3")["phase"] == "done"


def _reborn(cluster: ServedCluster, before: int) -> bool:
    ranks = {rank["rank"]: rank for rank in elastic(cluster, "status")["ranks"]}
    return ranks[1]["state"] == "serving" and ranks[1]["incarnation"] > before
