"""What is not ours is sent no prompt and is not believed, and the operator reads at once whose it is."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from membership.base.run_dir import default_run_dir, make_run_dir, new_socket
from tests.support import ROOT
from tests.support.gateway_cluster import MODEL, QUICK, GatewayCluster, RunningGateway, wait_ready
from tests.support.helpers import eventually

pytestmark = pytest.mark.integration
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")

TEXT = "the quick brown fox"
STRANGER = 4321


@pytest.fixture
def gateway(cluster: GatewayCluster) -> Iterator[RunningGateway]:
    with cluster.gateway(link=QUICK) as running:
        yield running


@contextmanager
def impostor(path: Path, token: int) -> Iterator[subprocess.Popen[str]]:
    """An engine of another user that listens there, until the block ends."""
    command = [sys.executable, "-m", "tests.support.impostor", str(path), str(STRANGER), str(token)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "listening\n"
            yield process
        finally:
            process.kill()
            path.unlink()


def no_engine(gateway: RunningGateway) -> str:
    """Why it is not ready, once that is for want of an engine that it may talk to."""

    def why() -> str:
        reasons = httpx.get(f"{gateway.url}/readyz").json().get("reasons", [])
        return next((reason for reason in reasons if reason.startswith("no engine answers: ")), "")

    return eventually(why, 30.0, "a reason why no engine answers")


@needs_root
def test_an_engine_of_another_user_gets_no_prompt(cluster: GatewayCluster, gateway: RunningGateway) -> None:
    path = make_run_dir(default_run_dir()) / new_socket("engine")
    body = {"model": MODEL, "prompt": "x", "max_tokens": 60}
    token = cluster.publish_engine(f"ipc://{path}")
    with impostor(path, token) as process, ThreadPoolExecutor(1) as client:
        answer = client.submit(httpx.post, f"{gateway.url}/v1/completions", json=body, timeout=20)
        assert f"belongs to user {STRANGER}, we are user 0" in no_engine(gateway)
        assert answer.result(timeout=30).status_code == 503
        process.kill()
        assert process.stdout is not None
        assert process.stdout.read() == ""
    with cluster.engine(cluster.says(TEXT)):
        wait_ready(gateway)
        answered = httpx.post(f"{gateway.url}/v1/completions", json=body, timeout=20)
        assert answered.json()["choices"][0]["text"] == TEXT


@needs_root
def test_nor_is_one_in_another_users_directory_connected_to(
    cluster: GatewayCluster, gateway: RunningGateway, tmp_path: Path
) -> None:
    foreign = make_run_dir(tmp_path / "run")
    os.chown(foreign, STRANGER, -1)
    cluster.publish_engine(f"ipc://{foreign}/engine.sock")
    assert f"{foreign} belongs to user {STRANGER}, we are user 0" in no_engine(gateway)


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:4321", "ipc://@elastic-ep", "ipc://engine.sock", ""])
def test_nor_is_one_whose_socket_anybody_could_have(
    cluster: GatewayCluster, gateway: RunningGateway, address: str
) -> None:
    """An abstract name, a port, a path that depends on the working directory."""
    cluster.publish_engine(address)
    assert "is no socket of this host" in no_engine(gateway)
