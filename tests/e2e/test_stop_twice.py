"""`elastic serve` is asked to stop a second time, or its machine lacks something: nothing is left, nothing is lost."""

from __future__ import annotations

import os
import resource
import shutil
import signal
from pathlib import Path

import httpx
import psutil
import pytest

from chaos.target.cluster import ServedCluster
from membership.base.errors import ConfigError
from tests.e2e.conftest import Serve
from tests.support.helpers import eventually, hang, running
from tests.support.served import completion, role_pid

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]

RANKS = 2


def family(cluster: ServedCluster) -> list[psutil.Process]:
    return psutil.Process(cluster.pid).children(recursive=True)


@pytest.mark.parametrize("stopped", [False, True], ids=["all react", "agent and gateway stopped"])
def test_a_second_signal_hastens_the_stop_and_leaves_nothing(serve: Serve, demo_model: Path, stopped: bool) -> None:
    """A stream is open, which the first signal waits for; or roles do not react at all."""
    cluster = serve(demo_model, RANKS, own_zygote=True)
    cluster.wait_serving(RANKS)
    body = {"model": cluster.model_name(), "prompt": "The", "max_tokens": 400, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"{cluster.url}/v1/completions", json=body, timeout=60.0) as answer:
        lines = answer.iter_lines()
        next(lines)
        processes = family(cluster)
        assert {r["pid"] for r in cluster.status()["ranks"]} < {process.pid for process in processes}
        if stopped:
            for role in ("agent", "gateway"):
                hang(role_pid(cluster, role))
        serving = psutil.Process(cluster.pid)
        serving.send_signal(signal.SIGTERM)
        eventually(lambda: stopped or _draining(cluster), 60.0, "the stop to begin")
        serving.send_signal(signal.SIGINT)
        assert cluster._process is not None
        assert cluster._process.wait(timeout=60) in (128 + signal.SIGINT, 128 + signal.SIGTERM)
    assert [process for process in processes if running(process)] == [], "when it is gone all are"
    with pytest.raises(ConfigError, match="no cluster is being served"):
        cluster.state.address()


def _draining(cluster: ServedCluster) -> bool:
    try:
        return "shutting down" in httpx.get(f"{cluster.url}/readyz", timeout=2.0).text
    except httpx.HTTPError:
        return True


@pytest.mark.parametrize("limit", [8, 3])  # too few to start a process; too few even to poll those that there are
def test_a_supervisor_without_descriptors_or_logs_takes_nothing_along(
    serve: Serve, demo_model: Path, limit: int
) -> None:
    """Its limit is below what it has open, and its logs are gone, when a role dies. The role comes back after it."""
    cluster = serve(demo_model, RANKS)
    cluster.wait_serving(RANKS)
    text, ranks = completion(cluster), {r["pid"] for r in cluster.status()["ranks"]}
    shutil.rmtree(cluster.state.path / "logs")
    before = resource.prlimit(cluster.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(cluster.pid, resource.RLIMIT_NOFILE, (limit, before[1]))
    controller = role_pid(cluster, "controller")
    os.kill(controller, signal.SIGKILL)
    words = cluster.state.path / "serve.log"
    eventually(lambda: "step_failed" in words.read_text(), 60.0, "a start that fails")
    assert completion(cluster) == text
    resource.prlimit(cluster.pid, resource.RLIMIT_NOFILE, before)
    eventually(lambda: role_pid_or_zero(cluster, "controller") not in (0, controller), 60.0, "another controller")
    assert completion(cluster) == text
    assert {r["pid"] for r in cluster.status()["ranks"]} == ranks
    assert (cluster.state.path / "logs" / "controller.log").exists()


def role_pid_or_zero(cluster: ServedCluster, role: str) -> int:
    try:
        return role_pid(cluster, role)
    except AssertionError:
        return 0
