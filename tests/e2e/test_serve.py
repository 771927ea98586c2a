"""`elastic serve` itself: goes on from its last epoch, serves on an external etcd, stops cleanly."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import httpx
import psutil
import pytest

from chaos.faults import kill
from chaos.target.cluster import ServedCluster
from chaos.target.warm_start import WarmStart
from elastic.serve.listening import bind
from elastic.serve.tls import pinned
from membership.base.errors import ConfigError
from membership.base.process_stats import command_words
from membership.base.run_dir import run_dir
from tests.e2e.conftest import Serve
from tests.support.helpers import eventually, running
from tests.support.secured_etcd import PASSWORD, Authority, secured_etcd
from tests.support.served import completion, role_pid

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]


def test_a_restarted_cluster_goes_on_from_its_last_epoch(demo_model: Path, tmp_path: Path, warm: WarmStart) -> None:
    with ServedCluster(demo_model, 2, state_dir=tmp_path / "state") as cluster:
        before = cluster.wait_serving(2)
        text = completion(cluster)
        family = psutil.Process(cluster.pid).children(recursive=True)
        ranks = [psutil.Process(r["pid"]) for r in before["ranks"]]
    assert not [process for process in (*family, *ranks) if running(process)]
    assert not run_dir(tmp_path / "state").exists(), "sockets are left"
    with ServedCluster(demo_model, 3, state_dir=tmp_path / "state", warm=warm) as cluster:
        after = cluster.wait_serving(3)
        assert after["epoch"] > before["epoch"]
        assert min(r["incarnation"] for r in after["ranks"]) > max(r["incarnation"] for r in before["ranks"])
        assert completion(cluster) == text
        epochs = [e.epoch for e in cluster.events() if e.kind == "epoch_committed"]
        assert epochs == list(range(1, len(epochs) + 1))


def processes_of(cluster: ServedCluster) -> list[psutil.Process]:
    supervisor = psutil.Process(cluster.pid)
    ranks = [psutil.Process(rank["pid"]) for rank in cluster.status()["ranks"]]
    return list({each.pid: each for each in (supervisor, *supervisor.children(recursive=True), *ranks)}.values())


def test_an_external_etcd(serve: Serve, demo_model: Path, tmp_path: Path) -> None:
    """One with TLS and users: ours has rights on the keys of this cluster, and on no others."""
    with secured_etcd(tmp_path / "etcd", "/elastic-ep/mine/", token_ttl_s=1) as etcd:
        who = tuple(etcd.credentials.as_flags())
        flags = ("--etcd", etcd.url, "--cluster", "mine", *who)
        cluster = serve(demo_model, 2, flags)
        cluster.wait_serving(2)
        assert completion(cluster)
        second = subprocess.run(
            [sys.executable, "-m", "elastic.cli", "serve", str(demo_model), *flags,
             "--state-dir", str(tmp_path / "two"), "--port", "0", "--admin-port", "0"],
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert second.returncode == 1
        assert "being served by another process" in second.stderr
        assert cluster.wait_serving(2)["state"] == "serving"
        status = subprocess.run(
            [sys.executable, "-m", "elastic.cli", "status", *flags, "-o", "json"],
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert status.returncode == 0, status.stderr
        cluster.scale(3)
        processes = processes_of(cluster)
        assert not [each for each in processes if shows_password(each)]
        assert not [file for file in cluster.state.path.rglob("*") if file.is_file() and holds_password(file)]
        for process in processes:
            with suppress(psutil.NoSuchProcess):  # it has ended with one that it depends on
                process.kill()
        with ServedCluster(demo_model, None, state_dir=tmp_path / "three", flags=flags) as third:
            assert third.wait_serving(3)["epoch"] > 1
            said = (third.state.path / "serve.log").read_text()
            assert "3 ranks, as the cluster was left" in said
        assert etcd.server.alive


def shows_password(process: psutil.Process) -> bool:
    try:
        return PASSWORD in " ".join([*process.cmdline(), *process.environ().values()])
    except psutil.NoSuchProcess:  # it has just ended
        return False


def holds_password(file: Path) -> bool:
    try:
        return PASSWORD.encode() in file.read_bytes()
    except FileNotFoundError:  # it was a draft
        return False


@pytest.mark.parametrize("flags", [("--exactness", "stock"), ("--dtype", "float32"), ("--redundancy", "1.25")])
def test_other_ways_to_serve(serve: Serve, demo_model: Path, flags: tuple[str, ...]) -> None:
    cluster = serve(demo_model, 3, flags)
    cluster.wait_serving(3)
    assert completion(cluster)


def in_office(cluster: ServedCluster) -> int:
    engine = cluster.client().state().engine
    return engine.pid if engine is not None else 0


def test_a_term_signal_lets_requests_end(serve: Serve, demo_model: Path) -> None:
    """Also those of the engine that was started as the standby."""
    cluster = serve(demo_model, 2, ("--stop-grace", "100s"))
    cluster.wait_serving(2)
    children = [child.pid for child in psutil.Process(cluster.pid).children()]
    first = min(pid for pid in children if command_words(pid)[1:4] == ["-m", "elastic.cli", "engine"])
    if in_office(cluster) == first:
        kill(first)
        eventually(lambda: in_office(cluster) not in (0, first), 60.0, "the standby to be in office")
        cluster.wait_serving(2)
    said = cluster.state.log("gateway")
    before = len(said.read_bytes())
    body = {"model": cluster.model_name(), "prompt": "The", "max_tokens": 300, "stream": True, "ignore_eos": True}
    lines: list[str] = []
    with httpx.stream("POST", f"{cluster.url}/v1/completions", json=body, timeout=60.0) as answer:
        for line in answer.iter_lines():
            if not lines:
                psutil.Process(cluster.pid).send_signal(signal.SIGTERM)
            lines.append(line)
    assert "data: [DONE]" in lines
    assert not any('"error"' in line for line in lines)
    lost = [line for line in said.read_bytes()[before:].splitlines() if b"engine_lost" in line]
    assert not [line for line in lost if json.loads(line)["open_requests"]]


def test_ipv6_tls_and_a_gateway_that_returns_under_its_clients(serve: Serve, demo_model: Path, tmp_path: Path) -> None:
    """Its ports are never free: clients that connect meanwhile wait, and no other process can take them."""
    certificate, key = Authority(tmp_path / "authority").issue("server")
    tls = ("--ssl-certfile", certificate, "--ssl-keyfile", key)
    cluster = serve(demo_model, 2, ("--host", "::1", "--admin-host", "::1", *tls))
    eventually(lambda: (cluster.state.path / "cluster.json").exists(), 120.0, "the address to be published")
    address = cluster.state.address()
    assert (address.url, address.admin_url) == (f"https://[::1]:{cluster.port}", f"http://[::1]:{cluster.admin_port}")
    ready = f"ready: OpenAI API at {address.url}/v1"
    eventually(lambda: ready in (cluster.state.path / "serve.log").read_text(), 120.0, "the cluster to be ready")
    token = {"Authorization": f"Bearer {address.admin_token}"}
    gateway = psutil.Process(role_pid(cluster, "gateway"))
    gateway.kill()
    gateway.wait(timeout=30)
    for port in (cluster.port, cluster.admin_port):
        with pytest.raises(ConfigError, match="Address already in use"):
            bind("::1", port, ("--host", "--port"))
    answer = httpx.get(f"{address.url}/livez", timeout=60.0, verify=pinned(address.certificate))
    assert answer.json()["status"] == "alive"
    view = httpx.get(f"{address.admin_url}/admin/v1/view", headers=token, timeout=60.0)
    assert view.json()["epoch"] >= 1
    status = subprocess.run(
        [sys.executable, "-m", "elastic.cli", "status", "--admin", address.admin_url,
         "--admin-token", address.admin_token, "-o", "json"],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert status.returncode == 0, status.stderr
