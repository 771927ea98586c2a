"""Two hosts, one cluster: what README says under "Two hosts", typed in two network namespaces.

The answers are those of one host, and a host's drain computes nothing again. The death of a rank on the other host,
of the engine, of the other host, cut links and a cable that is pulled lose no request.
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

from chaos.faults import kill
from chaos.target.cluster import Cluster
from chaos.target.host_cluster import PYTHON, HostCluster
from chaos.workload.streams import Workload
from elastic.serve.etcd_server import EtcdServer
from membership.base.enums import DetectedBy
from membership.store.codec import decode
from membership.store.keys import Keys
from membership.store.records import LeaderRecord
from tests.support.helpers import eventually
from tests.support.hosts import made_hosts
from tests.support.listeners import (
    asked_as_a_stranger,
    handshake,
    is_greeting,
    known_by_the_store,
    listening,
    role_of,
)
from tests.support.served import fault_free, stream_all, streaming, texts_of, under_load
from workers.protocol.exchange_handle import AutoHandle, TcpHandle
from workers.queue.curve import new_keys

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

OUTLASTS_A_DRAIN = 400  # tokens of an answer: a drain is typed meanwhile


class TwoHosts(HostCluster):
    """`elastic serve` on host a, roles on host b."""

    def serve_on_a(self, model: Path) -> None:
        at = self.hosts.addresses["a"]
        self.start("a", "serve", str(model), "--ranks", "2", "--capacity", "2", "--host", at)

    def start_on_b(self, role: str, *flags: str) -> None:
        """Host b has no checkpoint: what it lacks comes from host a."""
        self.join("b", role, *flags, *(("--model", "/absent") if role in ("agent", "gateway") else ()))

    def type_on(self, host: str, *command: str) -> str:
        outcome = self._typed(host, *command)
        assert outcome.returncode == 0, outcome.stderr
        return outcome.stdout

    def refused_on(self, host: str, *command: str) -> str:
        """What it says on stderr."""
        outcome = self._typed(host, *command)
        assert outcome.returncode == 1, outcome.stderr
        return outcome.stderr

    def _typed(self, host: str, *command: str) -> subprocess.CompletedProcess[str]:
        typed = self.hosts.command(host, *PYTHON, *command)
        return subprocess.run(typed, capture_output=True, text=True, timeout=180)


@pytest.fixture
def two_hosts(tmp_path: Path) -> Iterator[TwoHosts]:
    with ExitStack() as ends:
        hosts = ends.enter_context(made_hosts("a", "b"))
        etcd = ends.enter_context(EtcdServer(tmp_path / "etcd", address=hosts.outside))
        cluster = TwoHosts(hosts, etcd.url, tmp_path, gateway="a")
        ends.callback(cluster.close)
        yield cluster


def nodes_of(cluster: Cluster) -> dict[int, str]:
    return {rank["rank"]: rank["node"] for rank in cluster.status()["ranks"]}


def ranks_of_b(cluster: Cluster) -> set[int]:
    return {rank for rank, node in nodes_of(cluster).items() if node == "b"}


def masked_ranks(cluster: Cluster) -> list[tuple[int | None, str]]:
    """Each with what told of its loss."""
    return [(event.rank, event.fields["source"]) for event in cluster.events() if event.kind == "rank_masked"]


def wait_for_silence(cluster: TwoHosts, before: int, ranks: set[int]) -> None:
    silent = {(rank, DetectedBy.SILENCE) for rank in ranks}
    eventually(lambda: set(masked_ranks(cluster)[before:]) >= silent, 60.0, "its ranks to be masked as silent")


def steps_over_all(cluster: TwoHosts) -> bool:
    """Whether the engine uses a view of four ranks, and none of them is masked."""
    cluster.require_alive()
    state = cluster.client().state()
    view, status = state.view, state.engine_status
    if view is None or status is None or status.token != state.engine_token:
        return False
    return (status.epoch, len(view.members), status.masked) == (view.epoch, 4, ())


def a_rank_dies(cluster: TwoHosts) -> None:
    """Its agent says so."""
    victim = next(rank for rank in cluster.status()["ranks"] if rank["node"] == "b")
    kill(victim["pid"])
    masked = cluster.wait_event(
        lambda e: e.kind == "rank_masked" and e.fields["incarnation"] == victim["incarnation"], "of the loss"
    )
    assert masked.fields["source"] in (DetectedBy.AGENT, DetectedBy.QUEUE)


def the_engine_dies(cluster: TwoHosts) -> None:
    """Ranks of both hosts follow the next one."""
    engine = cluster.client().state().engine
    assert engine is not None
    kill(engine.pid)
    cluster.wait_event(lambda e: e.kind == "engine_elected" and e.fields["pid"] != engine.pid, "of the next engine")


def link_events(cluster: TwoHosts, kind: str) -> set[tuple[int | None, int]]:
    return {(event.rank, event.fields["peer"]) for event in cluster.events() if event.kind == kind}


def links_are_cut(cluster: TwoHosts) -> None:
    """Those between the hosts' ranks, in one direction. Each host has a replica of each expert, and the engine reaches
    all ranks: none is masked.
    """
    before = len(masked_ranks(cluster))
    ranks = cluster.client().state().ranks.values()
    handles = [msgspec.msgpack.decode(rank.exchange_handle, type=AutoHandle) for rank in ranks]
    addresses = [msgspec.msgpack.decode(handle.tcp, type=TcpHandle).address for handle in handles]
    ports = [int(address.rpartition(":")[2]) for address in addresses]
    cluster.hosts.cut_ports("b", ports)
    lost = eventually(lambda: link_events(cluster, "link_lost"), 60.0, "a cut link to be reported")
    cluster.hosts.heal_ports("b", ports)
    eventually(lambda: link_events(cluster, "link_back") >= lost, 120.0, "these links to be back")
    assert masked_ranks(cluster)[before:] == []
    eventually(lambda: sum(link["cuts"] for link in links(cluster).values()) > 0, 60.0, "the cuts to be counted")
    shown = cluster.type_on("a", "status", "--links", "--state-dir", str(cluster.state.path))
    assert "link_back" in shown
    for host, other in (("a", "b"), ("b", "a")):
        seen = cluster.type_on(host, "doctor", "--etcd", cluster.etcd, "--cluster", "moe")
        assert re.search(rf"ok +host {other} +all \d+ listeners are reached from here", seen), seen
        assert re.search(rf"(ok|warn) +host {other} +its clock is [0-9.]+ s (ahead of|behind) this host's", seen), seen
        assert re.search(rf"ok +host {other} +it computes with the same as this host", seen), seen


def links(cluster: TwoHosts) -> dict[tuple[str, str, str], dict[str, Any]]:
    """By role and both hosts, as in `elastic status -o json`."""
    return {(link["role"], link["node"], link["peer_node"]): link for link in cluster.status()["links"]}


def links_are_known(cluster: TwoHosts) -> bool:
    """Each of two ranks with two on the other host, and the engine with those of host b."""
    up = {where: (link["links"], link["up"]) for where, link in links(cluster).items() if link["sent_bytes"]}
    return up == {("ranks", "a", "b"): (4, 4), ("ranks", "b", "a"): (4, 4), ("engine", "a", "b"): (2, 2)}


def listeners_are_as_documented(cluster: TwoHosts) -> None:
    """docs/HOSTS.md, "Ports": so many for each process, at the address that it advertises, and the gateway's two."""
    for host, at in cluster.hosts.addresses.items():
        opened = listening(cluster.hosts, host)
        web = {(each.address, each.port) for each in opened if "gateway" in map(role_of, each.pids)}
        assert web == ({(at, 8000), ("127.0.0.1", 8001)} if host == "a" else set())
        far = [each for each in opened if (each.address, each.port) not in web]
        assert {(each.protocol, each.address, len(each.pids)) for each in far} == {("tcp", at, 1)}
        number = Counter(pid for each in far for pid in each.pids)
        most = {"engine": 3, "agent": 3, "rank": 4}
        assert not {role_of(pid): ports for pid, ports in number.items() if ports > most.get(role_of(pid), 0)}
        assert Counter(map(role_of, number)) == {"agent": 1, "rank": 2} | ({"engine": 2} if host == "a" else {})
        said = asked_as_a_stranger(far)
        assert len(said) == len(far) > 8
        assert {where: each for where, each in said.items() if not is_greeting(each)} == {}


def public_keys_open_nothing(cluster: TwoHosts) -> None:
    """Who reads etcd knows where all of them listen, and these keys, but not the secret."""
    known = known_by_the_store(cluster.client().state())
    assert len(known) >= 2 + 2 * 2 + 4 + 2  # of the engine, two agents, four ranks, and two for an engine elsewhere
    stranger = new_keys()
    ends = {endpoint: handshake(endpoint, key, (stranger.public, stranger.secret)) for endpoint, key in known.items()}
    assert set(ends.values()) == {zmq.EVENT_HANDSHAKE_FAILED_AUTH}, ends


def the_cable_is_loose(cluster: TwoHosts) -> None:
    """Its ranks are suspected, and answer again before their host's lease ends: they are replaced all the same."""
    ranks, before = ranks_of_b(cluster), len(masked_ranks(cluster))
    cluster.hosts.cut("b")
    wait_for_silence(cluster, before, ranks)
    cluster.hosts.heal("b")
    eventually(lambda: len(ranks_of_b(cluster)) == 2, 120.0, "ranks on host b again")


def the_cable_is_pulled(cluster: TwoHosts) -> None:
    """Only silence tells. The host's old ranks are replaced, whatever they still do."""
    ranks, before = ranks_of_b(cluster), len(masked_ranks(cluster))
    cluster.hosts.cut("b")
    wait_for_silence(cluster, before, ranks)
    eventually(lambda: "b" not in cluster.client().state().agents, 60.0, "its lease to end")
    cluster.hosts.heal("b")
    eventually(lambda: len(ranks_of_b(cluster)) == 2, 120.0, "ranks on host b again")


def the_host_is_drained(cluster: TwoHosts) -> None:
    """Its requests go on at host a, to which their KV blocks are sent."""
    model, state = cluster.model_name(), ("--state-dir", str(cluster.state.path))
    expected = texts_of(cluster, model, OUTLASTS_A_DRAIN)
    ranks, before = ranks_of_b(cluster), len(cluster.events())
    streams = stream_all(cluster, model, OUTLASTS_A_DRAIN)
    eventually(lambda: cluster.status()["requests"]["running"] > 12, 60.0, "streams under way")
    cluster.type_on("a", "drain", "--node", "b", *state)
    assert not ranks_of_b(cluster)
    assert [each.result(timeout=180) for each in streams] == expected
    moved = [event for event in cluster.events()[before:] if event.kind == "request_moved"]
    assert moved, "no request has taken its KV blocks along"
    assert {event.fields["source"] for event in moved} <= ranks
    assert not {event.rank for event in moved} & ranks
    cluster.type_on("a", "undrain", *map(str, sorted(ranks)), *state)
    eventually(lambda: len(ranks_of_b(cluster)) == 2, 120.0, "ranks on host b again")


def the_host_dies(cluster: TwoHosts) -> None:
    """Its agent goes, and its ranks with it: no agent is left to record their exits, and nothing listens there."""
    ranks, before = ranks_of_b(cluster), len(masked_ranks(cluster))
    kill(cluster.client().state().agents["b"].pid)
    eventually(lambda: {rank for rank, _ in masked_ranks(cluster)[before:]} >= ranks, 60.0, "its ranks to be masked")


def offices(cluster: TwoHosts) -> tuple[str, str]:
    """On which hosts the controller and the engine are that are in charge."""
    state = cluster.client().state()
    with closing(cluster.address.connect()) as store:
        leader = store.get(Keys("moe").leader)
    return decode(leader.value, LeaderRecord).node if leader else "", state.engine.node if state.engine else ""


def roles_on_b(cluster: TwoHosts) -> None:
    """Each by itself; streams go through its gateway from now on."""
    for role in ("agent", "controller", "engine"):
        cluster.start_on_b(role, *(["--capacity", "2"] if role == "agent" else []))
    cluster.start_on_b("gateway", "--host", cluster.hosts.addresses["b"])
    cluster.gateway = "b"
    cluster.wait_serving(4)


def host_a_dies(cluster: TwoHosts, workload: Workload) -> None:
    """With all that `elastic serve` has started, in the middle of streams."""
    eventually(lambda: steps_over_all(cluster), 120.0, "steps over four ranks")
    eventually(lambda: streaming(workload, 3), 60.0, "three streams under way")
    assert offices(cluster) == ("a", "a")
    cluster.kill("a")
    eventually(lambda: offices(cluster) == ("b", "b"), 120.0, "host b to be in charge")
    eventually(lambda: set(nodes_of(cluster).values()) == {"b"}, 120.0, "a view without host a")
    ended = len(workload.records())
    eventually(lambda: len(workload.records()) > ended + 4, 120.0, "requests that end without host a")


def a_second_serve_lacks_the_secret(cluster: TwoHosts, model: Path) -> None:
    """It makes none of its own, but says what it lacks."""
    state = cluster.folder / "without-secret"
    flags = ["--etcd", cluster.etcd, "--cluster", "moe", "--state-dir", str(state)]
    said = cluster.refused_on("b", "serve", str(model), *flags, "--advertise", cluster.hosts.addresses["b"])
    assert "this cluster has a join secret (bring it with --join-secret-file or ELASTIC_JOIN_SECRET" in said
    assert not (state / "join-secret").exists()


def host_a_leaves(cluster: TwoHosts, workload: Workload) -> None:
    """SIGTERM of its `elastic serve`, which has the engine and the controller in charge, in the middle of streams."""
    for role in ("engine", "controller"):
        assert cluster.stop("b", role) == 0
    eventually(lambda: offices(cluster) == ("a", "a"), 120.0, "host a to be in charge")
    for role in ("engine", "controller"):
        cluster.start_on_b(role)
    eventually(lambda: steps_over_all(cluster), 120.0, "steps over four ranks")
    eventually(lambda: streaming(workload, 3), 60.0, "three streams under way")
    before = masked_ranks(cluster)
    assert cluster.stop("a", "serve") == 0
    state = cluster.client().state()
    assert state.view is not None
    assert {member.node for member in state.view.members} == {"b"}, "its ranks had left the view when it ended"
    assert "a" not in state.assignments
    ended = len(workload.records())
    eventually(lambda: len(workload.records()) > ended + 4, 120.0, "requests that end without host a")
    assert offices(cluster) == ("b", "b")
    assert masked_ranks(cluster) == before, "none was lost"


def test_two_hosts_answer_as_one_and_the_deaths_of_either_lose_nothing(two_hosts: TwoHosts, demo_model: Path) -> None:
    two_hosts.serve_on_a(demo_model)
    two_hosts.wait_serving(2)
    fault_free(two_hosts)
    assert two_hosts.secret.stat().st_mode & 0o777 == 0o600
    a_second_serve_lacks_the_secret(two_hosts, demo_model)
    two_hosts.start_on_b("agent", "--capacity", "2")
    eventually(lambda: "b" in two_hosts.client().state().agents, 120.0, "host b to be there")
    two_hosts.type_on("a", "scale", "4", "--state-dir", str(two_hosts.state.path))
    two_hosts.wait_serving(4)
    assert nodes_of(two_hosts) == {0: "a", 1: "a", 2: "b", 3: "b"}
    eventually(lambda: links_are_known(two_hosts), 60.0, "links between the hosts in the status")
    listeners_are_as_documented(two_hosts)
    public_keys_open_nothing(two_hosts)
    with under_load(two_hosts, busy=4) as workload:
        for fault in (
            the_host_is_drained,
            links_are_cut,
            a_rank_dies,
            the_engine_dies,
            the_cable_is_loose,
            the_cable_is_pulled,
            the_host_dies,
        ):
            eventually(lambda: steps_over_all(two_hosts), 120.0, "steps over four ranks")
            eventually(lambda: streaming(workload, 3), 60.0, "three streams under way")
            fault(two_hosts)
        ended = len(workload.records())
        eventually(lambda: len(workload.records()) > ended + 4, 120.0, "requests that end without host b")
    moved = [event.fields["requests"] for event in two_hosts.events() if event.kind == "rank_masked"]
    assert sum(moved) > 0, "requests lived on the ranks that were lost"
    roles_on_b(two_hosts)
    with under_load(two_hosts, busy=4) as workload:
        host_a_dies(two_hosts, workload)
        two_hosts.serve_on_a(demo_model)
        eventually(lambda: steps_over_all(two_hosts), 180.0, "steps over the ranks of both hosts again")
        assert offices(two_hosts) == ("b", "b")
        host_a_leaves(two_hosts, workload)
    desired = two_hosts.client().state().desired
    assert desired is not None
    assert desired.ranks == 4, "as it was scaled, not as it was begun"
