"""What takes over when a role dies, and what is left of it. (Each role and each fault: test_role_matrix.py.)"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import httpx
import psutil
import pytest

from chaos.faults import kill
from chaos.target.cluster import ServedCluster
from chaos.workload.history import compare
from chaos.workload.streams import Workload
from elastic.serve.etcd_server import free_ports
from membership.base.process_stats import command_words
from membership.base.run_dir import remove_run_dir, run_dir
from tests.e2e.conftest import Serve
from tests.support.helpers import eventually, running
from tests.support.served import CALM, another, completion, fault_free, role_pid, streaming, under_load

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]

RANKS = 2
FORKSERVER, ZYGOTE = "elastic-ep::forkserver", "elastic-ep::zygote"


def test_a_standby_engine_takes_over_and_ranks_stay(serve: Serve, demo_model: Path) -> None:
    """The successor is a process that ran before the kill; the ranks are the same processes; requests are exact."""
    cluster = serve(demo_model, RANKS)
    cluster.wait_serving(RANKS)
    with under_load(cluster, CALM) as workload:
        first = role_pid(cluster, "engine")
        standby = eventually(lambda: set(engine_pids(cluster)) - {first}, 60.0, "a standby engine process")
        ranks = {r["pid"] for r in cluster.status()["ranks"]}
        eventually(lambda: len(workload.records()) > 4, 60.0, "requests that have filled blocks")
        kill(first)
        eventually(lambda: role_pid_or_zero(cluster, "engine") in standby, 60.0, "the standby in office")
        cluster.wait_serving(RANKS)
        ended = len(workload.records())
        eventually(lambda: len(workload.records()) > ended + 4, 60.0, "requests ending again")
        assert {r["pid"] for r in cluster.status()["ranks"]} == ranks
        joined = [e for e in cluster.events() if e.kind == "rank_joined"]
        assert sum(e.fields["held_blocks"] for e in joined[-RANKS:]) > 0, "what they had computed is known"
        eventually(lambda: len(set(engine_pids(cluster)) - {first}) == 2, 60.0, "a new standby")


def engine_pids(cluster: ServedCluster) -> list[int]:
    """Engines the supervisor has started, in office or standing by."""
    return [
        e.fields["pid"]
        for e in cluster.events()
        if e.kind == "role_started"
        and str(e.fields["name"]).startswith("engine")
        and psutil.pid_exists(e.fields["pid"])
    ]


def role_pid_or_zero(cluster: ServedCluster, role: str) -> int:
    try:
        return role_pid(cluster, role)
    except AssertionError:
        return 0


def test_a_gateway_dies_and_its_neighbour_serves_on(serve: Serve, demo_model: Path) -> None:
    cluster = serve(demo_model, RANKS)
    cluster.wait_serving(RANKS)
    port, admin_port = free_ports(2)
    ports = ["--port", str(port), "--admin-port", str(admin_port)]
    with another(cluster, "gateway", *ports, environ={"ELASTIC_ADMIN_TOKEN": "t"}) as neighbour:
        other = f"http://127.0.0.1:{port}"
        eventually(lambda: reachable(other), 60.0, "the second gateway to be ready")
        model = cluster.model_name()
        oracle = fault_free(cluster)
        workload = Workload(other, model)
        workload.start()
        try:
            eventually(lambda: streaming(workload), 60.0, "two streams under way")
            first = role_pid(cluster, "gateway")
            cut = Cut(cluster.url, workload.body(0))
            kill(first)
            cut.ended_unfinished()
            eventually(lambda: role_pid_or_zero(cluster, "gateway") not in (0, first), 60.0, "a new first gateway")
            eventually(lambda: reachable(cluster.url), 60.0, "the first gateway to answer again")
        finally:
            history = workload.stop()
        verdict = compare(history, oracle)
        assert verdict.ok, verdict.differences
        neighbour.send_signal(signal.SIGTERM)
        assert neighbour.wait(timeout=60.0) == 0


class Cut:
    """A stream through a gateway that dies. Its client must be able to see that it is not the whole answer."""

    def __init__(self, url: str, body: dict[str, object]) -> None:
        self._context = httpx.stream(
            "POST", f"{url}/v1/completions", json={**body, "max_tokens": 2000, "ignore_eos": True}, timeout=60.0
        )
        self._answer = self._context.__enter__()
        assert self._answer.status_code == 200
        self._lines = self._answer.iter_lines()
        assert next(self._lines).startswith("data: ")

    def ended_unfinished(self) -> None:
        """The body breaks off: no end of the chunked encoding, no last event."""
        seen: list[str] = []
        try:
            with pytest.raises(httpx.TransportError):
                seen.extend(self._lines)
        finally:
            self._context.__exit__(None, None, None)
        assert not any("[DONE]" in line or '"finish_reason":"' in line for line in seen)


def reachable(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz", timeout=2.0).status_code == 200
    except httpx.HTTPError:
        return False


def titled(cluster: ServedCluster, title: str) -> psutil.Process:
    """The cluster's only process with this title, once it is the only one: a fork has it until it has its own."""

    def found() -> list[psutil.Process] | None:
        family = psutil.Process(cluster.pid).children(recursive=True)
        these = [child for child in family if "".join(command_words(child.pid)[:1]).startswith(title)]
        return these if len(these) == 1 else None

    (only,) = eventually(found, 60.0, f"one {title}") or ()
    return only


def test_an_agent_dies_without_a_zygote_and_a_supervisors_death_leaves_nothing(serve: Serve, demo_model: Path) -> None:
    """Its forkserver is a fork of the zygote, whose own death is not noticed: the next agent waits for another one."""
    cluster = serve(demo_model, RANKS, own_zygote=True)
    cluster.wait_serving(RANKS)
    zygote, forkserver = titled(cluster, ZYGOTE), titled(cluster, FORKSERVER)
    assert forkserver.ppid() == zygote.pid
    ranks = {r["pid"] for r in cluster.status()["ranks"]}
    kill(zygote.pid)
    assert completion(cluster), "requests are answered"
    assert forkserver.is_running()
    assert {r["pid"] for r in cluster.status()["ranks"] if r["state"] == "serving"} == ranks
    kill(role_pid(cluster, "agent"))
    eventually(lambda: not any(psutil.pid_exists(pid) for pid in ranks), 60.0, "the agent's ranks to end")
    cluster.wait_serving(RANKS)
    eventually(lambda: not running(forkserver), 60.0, "the agent's forkserver to end")
    assert titled(cluster, FORKSERVER).ppid() == titled(cluster, ZYGOTE).pid != zygote.pid
    family = psutil.Process(cluster.pid).children(recursive=True)
    ranks = [psutil.Process(r["pid"]) for r in cluster.status()["ranks"]]
    assert len(family) >= 5
    os.kill(cluster.pid, signal.SIGKILL)
    _, alive = psutil.wait_procs([*family, *ranks], timeout=60)
    assert not alive, [p.cmdline() for p in alive]
    run = run_dir(cluster.state.path)
    assert list(run.iterdir()), "the files of its sockets stay until the next start"
    remove_run_dir(run)
    assert not run.exists(), "a process still has a socket"
