"""Scale up and down while clients stream, with a kill between: all equal the fault-free run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import openai
import pytest

from chaos.faults import kill
from chaos.target.cluster import ServedCluster
from tests.e2e.conftest import Serve
from tests.support.helpers import eventually
from tests.support.served import command, elastic, refused, under_load

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]


def test_scale_under_load_with_a_kill(serve: Serve, demo_model: Path) -> None:
    cluster = serve(demo_model, 4)
    cluster.wait_serving(4)
    with under_load(cluster, busy=6):
        up, down = up_and_down_with_a_kill(cluster)
    cluster.wait_serving(3)
    assert [r["rank"] for r in elastic(cluster, "status")["ranks"]] == [0, 1, 2]
    assert down["epoch"] > up["epoch"]


def up_and_down_with_a_kill(cluster: ServedCluster) -> tuple[Any, Any]:
    up = elastic(cluster, "scale", "6", "--wait")
    assert up["phase"] == "done"
    status = cluster.wait_serving(6)
    victim = status["ranks"][2]
    kill(victim["pid"])
    eventually(
        lambda: all(
            r["state"] == "serving" and (r["rank"] != 2 or r["incarnation"] > victim["incarnation"])
            for r in cluster.wait_serving(6)["ranks"]
        ),
        60.0,
        "rank 2 serving again",
    )
    down = elastic(cluster, "scale", "3", "--wait")
    assert down["phase"] == "done"
    return up, down


def test_steps_go_on_while_new_ranks_load(serve: Serve, demo_model: Path) -> None:
    cluster = serve(demo_model, 2)
    cluster.wait_serving(2)
    client = openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0)
    before = cluster.client().state().engine_status
    stream = client.completions.create(
        model=cluster.model_name(), prompt="The", max_tokens=1000, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    operation = cluster.scale(4)
    assert operation.phase_times["committed"] > operation.phase_times["loading"]
    after = cluster.client().state().engine_status
    assert before is not None
    assert after is not None
    assert after.step > before.step
    stream.close()
    client.close()


def test_scale_is_idempotent_and_refuses_what_cannot_be(serve: Serve, demo_model: Path) -> None:
    cluster = serve(demo_model, 2)
    cluster.wait_serving(2)
    first = elastic(cluster, "scale", "3", "--op-id", "grow")
    again = elastic(cluster, "scale", "3", "--op-id", "grow")
    assert first["id"] == again["id"] == "grow"
    assert first["epoch"] == again["epoch"]

    assert "0" in refused(cluster, "scale", "0")
    assert "1000" in refused(cluster, "scale", "1000", "--plan")
    assert "epoch" in refused(cluster, "scale", "4", "--if-epoch", "1")
    planned = command(cluster, "scale", "4", "--plan")
    assert planned.returncode == 2, planned
    assert cluster.status()["desired"] == 3
