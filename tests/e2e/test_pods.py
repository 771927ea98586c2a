"""The chart's `mode: many` as processes in the shape of its pods, each with a network of its own: it serves, and
while streams run `helm test` kills a rank, and every pod is replaced, as an upgrade with other values does it, by what
the probes say, and again as the rollback does it. Its etcd is the chart's: three pods, of which one is killed first.

What Kubernetes itself does is not tried here (docs/KUBERNETES.md).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.helpers import eventually
from tests.support.pod import NEEDS_NAMESPACES
from tests.support.pods import ELSEWHERE, MEMBERS, POLL_S, READY_S, Pods, made_pods
from tests.support.streams import Streams

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1800), NEEDS_NAMESPACES]

SETTINGS = (
    "agents.ranksPerPod=1", "terminationGracePeriodSeconds=100", "preStopSeconds=0", "tests.kill=true",
    "tests.deletePod=true", "admin.existingSecret=admin", "service.adminHost=0.0.0.0",
)  # fmt: skip


@pytest.fixture
def pods(demo_model: Path) -> Iterator[Pods]:
    with made_pods(demo_model, *SETTINGS) as made:
        yield made


def helm_test_kills_a_rank_and_each_role_says_what_it_knows_of_it(pods: Pods) -> None:
    """No gateway knows it: their histories are their own."""

    def said() -> tuple[float, float]:
        engine, controller = pods.metrics("engine-0"), pods.metrics("controller-0")
        found = (n for (name, _), n in engine.items() if name == "elastic_ep_detection_seconds_count")
        return sum(found), controller["elastic_ep_reconfigurations_total", "committed"]

    before = said()
    answer, receipt = pods.helm_test()
    assert answer.startswith("demo-moe answers: ")
    found = json.loads(receipt)
    assert (found["lost"], found["altered"], found["kept"], found["exactness"]) == (0, 0, True, "invariant"), found
    assert found["answers"] >= 8, "four clients, before the death and after it"
    assert found["deleted"] == "moe-agents-0"
    assert found["ready_after_s"] > 0
    both = "the engine to say how it found the death, and the controller what it did"
    eventually(lambda: all(now > then for now, then in zip(said(), before, strict=True)), READY_S, both, POLL_S)
    history = [json.loads(line) for line in pods.history()]
    times = [each["ts"] for each in history]
    assert times == sorted(times), "lines begin with their time"
    assert {each["role"].split("-")[0] for each in history} >= {"agent", "controller", "engine", "gateway"}
    held = "elastic_ep_weight_store_bytes", "moe-agents-0"
    eventually(lambda: pods.metrics("agents-0").get(held, 0) > 0, READY_S, "its agent to say what it holds", POLL_S)


def test_a_member_that_lost_its_volume_is_replaced_as_the_page_says(pods: Pods) -> None:
    """docs/KUBERNETES.md, with the very restart that leaves a removed member's data behind."""

    def etcdctl(*arguments: str, host: str = "etcd-0") -> str:
        said = pods.running[host].exec("etcdctl", *arguments)
        assert said.returncode == 0, said.stderr
        return said.stdout

    for host in MEMBERS:
        pods.start(host)
    pods.until_ready(*MEMBERS)
    etcdctl("put", "settings", "kept")
    pods.running["etcd-2"].close()
    shutil.rmtree(pods.claim("etcd-2"))
    assert pods.start("etcd-2").wait(READY_S) != 0
    assert "has already been bootstrapped" in "\n".join(pods.running["etcd-2"].lines()), (
        "it does not come back by itself"
    )
    [lost] = [line.split(",")[0] for line in etcdctl("member", "list").splitlines() if "moe-etcd-2" in line]
    etcdctl("member", "remove", lost)
    removed = pods.start("etcd-2")
    eventually((pods.claim("etcd-2") / "data" / "member" / "wal").exists, READY_S, "data of a removed member", POLL_S)
    removed.close()
    pods.render("etcd.extraArgs={--initial-cluster-state=existing}")
    add = "etcdctl", "member", "add", "moe-etcd-2", "--peer-urls=http://moe-etcd-2.moe-etcd:2380"
    both = "the other two to have been connected for the 5 s that etcd asks for"
    eventually(lambda: pods.running["etcd-0"].exec(*add).returncode == 0, READY_S, both, POLL_S)
    shutil.rmtree(pods.claim("etcd-2"))
    pods.start("etcd-2")
    pods.until_ready("etcd-2")
    pods.render()
    pods.replace("etcd-2")
    assert etcdctl("get", "settings", "--print-value-only", "--consistency=s", host="etcd-2") == "kept\n"
    members = etcdctl("member", "list")
    assert members.count("started") == 3
    assert lost not in members


def a_node_is_lost_and_comes_back_with_a_pod_that_has_a_successor(pods: Pods) -> None:
    """Requests go on meanwhile. Two agents of one name would take each other's ranks away: the older one ends."""
    lost = pods.lose_node("agents-1")
    eventually(lambda: pods.serving() == {"moe-agents-0": 1}, READY_S, "the loss to be noticed", POLL_S)
    pods.start("agents-1", ELSEWHERE)
    pods.until_ready("agents-1")
    pods.return_node("agents-1")
    assert lost.wait(READY_S) == 1
    assert "runs as node moe-agents-1 by now" in lost.lines()[-1]
    assert pods.serving() == {"moe-agents-0": 1, "moe-agents-1": 1}


def test_pods_of_each_role_serve_and_each_may_be_replaced_under_load(pods: Pods) -> None:
    for host in ("agents-0", "agents-1", "controller-0", "engine-0", "gateway-0", *MEMBERS):
        pods.start(host)
    pods.until_ready("gateway-0", "agents-0", "agents-1", "controller-0", "engine-0")
    assert pods.serving() == {"moe-agents-0": 1, "moe-agents-1": 1}
    domains = [(each["node"], each["machine"], each["zone"]) for each in pods.status()["nodes"]]
    assert domains == [(f"moe-agents-{n}", f"node-of-moe-agents-{n}", f"zone-{n}") for n in range(2)]
    with Streams(pods.url, clients=2) as streams:
        streams.go_on()
        first_member = pods.running["etcd-0"]  # whose endpoint all roles begin with
        first_member.close()
        helm_test_kills_a_rank_and_each_role_says_what_it_knows_of_it(pods)
        first_member.start()
        pods.until_ready("etcd-0")
        eventually(lambda: sum(pods.serving().values()) == 2, READY_S, "its successor to serve", POLL_S)
        first, before = pods.running.copy(), pods.arguments("gateway")
        pods.upgrade("engine.extraArgs={--log-keep=1}", "gateway.extraArgs={--access-log}", "podAnnotations.now=other")
        upgraded = pods.running.copy()
        assert not {*first.values()} & {*upgraded.values()}, "every pod is another one"
        assert pods.arguments("gateway") == [*before, "--access-log"]
        assert pods.serving() == {"moe-agents-0": 1, "moe-agents-1": 1}, "as soon as they say that they are ready"
        pods.roll_back()
        assert not {*upgraded.values()} & {*pods.running.values()}, "and another one again"
        assert pods.arguments("gateway") == before
        assert pods.serving() == {"moe-agents-0": 1, "moe-agents-1": 1}
        a_node_is_lost_and_comes_back_with_a_pod_that_has_a_successor(pods)
        streams.go_on()
    assert streams.failed == []
