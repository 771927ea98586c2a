"""What only a real etcd can do wrong: die, come back, stop answering, be unreachable, speak TLS."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from chaos.faults.proxy import Faults, TcpProxy, Way
from elastic.serve.etcd_server import EtcdServer, find_binary, free_ports
from membership.base.errors import ConfigError, ElasticError, StoreUnavailable
from membership.store.codec import encode
from membership.store.credentials import Credentials
from membership.store.election import Election
from membership.store.etcd import connect
from membership.store.interface import Compare, Put
from membership.store.keys import Keys
from membership.store.lease import LeaseKeeper
from membership.store.mirror import Mirror
from membership.store.records import Desired
from tests.support.helpers import eventually, stopped

pytestmark = pytest.mark.contract

T = 30.0
KEYS = Keys("faults")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EtcdServer]:
    with EtcdServer(tmp_path / "etcd") as found:
        yield found


def kill(server: EtcdServer) -> None:
    os.kill(server.pid, signal.SIGKILL)
    eventually(lambda: not server.alive, T, "etcd to be dead")


def test_a_watch_ends_with_its_server_and_resumes_on_the_next(server: EtcdServer) -> None:
    with closing(connect([server.url])) as store:
        seen = store.put("/a", b"1")
        watch = store.watch("/a", 0)
        kill(server)
        with pytest.raises(StoreUnavailable):
            watch.next(T)
        watch.close()
        server.restart()
        written = [store.put("/a", b"2"), store.put("/a", b"3")]
        with closing(store.watch("/a", seen + 1)) as resumed:
            first = resumed.next(T)
            assert first is not None
            assert [e.kv.mod_revision for e in first.events] == written[: len(first.events)]


def test_roles_outlive_a_crash_of_etcd(server: EtcdServer) -> None:
    """Mirror, lease and leadership are all there when etcd is back, without any call."""
    with (
        closing(connect([server.url])) as store,
        Mirror(store, KEYS.cluster) as mirror,
        LeaseKeeper(store, 60) as keeper,
    ):
        leader = Election(store, KEYS.leader, b"", keeper)
        token = leader.campaign(T)
        mirror.wait(lambda s: s.leader_revision == token, T)
        kill(server)
        eventually(lambda: not mirror.synced, T, "the mirror to notice")
        assert mirror.state().leader_revision == token
        server.restart()
        with closing(connect([server.url])) as other:
            other.put(KEYS.desired, encode(Desired(ranks=3)))
        state = mirror.wait(lambda s: s.desired == Desired(ranks=3), T, "the write made after the crash")
        assert state.leader_revision == token
        assert mirror.synced
        assert leader.held
        assert store.txn([leader.fence()], []).succeeded


def test_an_office_outlasts_a_store_whose_answers_take_longer_than_a_third_of_its_lease(server: EtcdServer) -> None:
    """Renewals that were given up after that time would all come too late. Later the lease is short again."""
    ttl_s, far = 1.0, Faults(up=Way(delay_s=0.4))
    with TcpProxy("127.0.0.1", urlsplit(server.url).port or 0) as proxy, closing(connect([server.url])) as near:
        proxy.set(far)
        with closing(connect([proxy.url], connect_timeout_s=T)) as store, LeaseKeeper(store, ttl_s) as keeper:
            office = Election(store, KEYS.leader, b"", keeper)
            token = office.campaign(T)
            assert near.lifetime_s(keeper.lease) > ttl_s
            changed = near.watch(KEYS.leader, token + 1).next(3.5)  # on a busy machine it may move to a longer one yet
            assert changed is None or {event.kind for event in changed.events} == {"put"}, "it was lost"
            assert office.held
            proxy.set(Faults())
            eventually(lambda: near.lifetime_s(keeper.lease) == ttl_s, T, "a lease as it is configured")
            found = near.get(KEYS.leader)
            assert found is not None
            assert (found.create_revision, found.lease) == (token, keeper.lease)
            assert office.held


def test_a_campaign_waits_an_outage_out(server: EtcdServer) -> None:
    with closing(connect([server.url])) as store, LeaseKeeper(store, 60) as keeper:
        kill(server)
        tokens: list[int] = []
        election = Election(store, "/leader", b"", keeper)
        thread = threading.Thread(target=lambda: tokens.append(election.campaign(T)))
        thread.start()
        server.restart()
        thread.join(T)
        assert tokens


def test_a_stopped_server_is_noticed_by_every_call(server: EtcdServer) -> None:
    with closing(connect([server.url])) as patient, closing(connect([server.url], timeout_s=0.5)) as store:
        patient.put("/a", b"1")
        lease = patient.grant(60)
        with stopped(server.pid):
            for call in (
                lambda: store.get("/a"),
                lambda: store.range("/"),
                lambda: store.put("/a", b"2"),
                lambda: store.delete("/b"),
                lambda: store.grant(1),
                lambda: store.keepalive(lease),
                lambda: store.revoke(lease + 1),
                lambda: store.watch("/a", 0),
                lambda: store.txn([Compare("/a", "version", "=", 1)], [Put("/a", b"3")]),
            ):
                with pytest.raises(StoreUnavailable, match=server.url) as caught:
                    call()
                assert not caught.value.definite
        kv = patient.get("/a")  # a write that timed out is unknown: read back, it is one of these
        assert kv is not None
        assert kv.value in (b"1", b"2", b"3")


def test_a_stopped_server_is_noticed_by_a_silent_watch(server: EtcdServer) -> None:
    """By the channel's own keepalive: nothing else is being sent."""
    with (
        closing(connect([server.url])) as store,
        closing(store.watch("/a", 0)) as watch,
        stopped(server.pid),
        pytest.raises(StoreUnavailable),
    ):
        watch.next(T)


def test_a_stopped_server_is_noticed_by_the_mirror_and_forgiven(server: EtcdServer) -> None:
    with (
        closing(connect([server.url], timeout_s=2.0)) as store,
        Mirror(store, KEYS.cluster, probe_every_s=0.1) as mirror,
    ):
        eventually(lambda: mirror.synced, T, "the first watch")
        with stopped(server.pid):
            eventually(lambda: not mirror.synced, T, "the mirror to notice")
            eventually(lambda: mirror.staleness_s > 1.0, T, "the state to be called stale")
        eventually(lambda: mirror.synced and mirror.staleness_s < 1.0, T, "the mirror to be back")
        with closing(connect([server.url])) as other:
            other.put(KEYS.desired, encode(Desired(ranks=3)))
        mirror.wait(lambda s: s.desired is not None, T)


def test_a_lease_is_given_up_by_the_local_clock_while_the_server_is_stopped(server: EtcdServer) -> None:
    with closing(connect([server.url])) as store:
        lost = threading.Event()
        keeper = LeaseKeeper(store, 1.0, on_lost=lost.set)
        with stopped(server.pid):
            assert lost.wait(T)
            assert not keeper.alive
        keeper.close()


@pytest.mark.parametrize("path", ["missing", "file/below"])
def test_a_socket_that_is_not_there_is_a_clear_error(tmp_path: Path, path: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreUnavailable, match=f"{tmp_path}/{path}"):
        connect([f"unix://{tmp_path}/{path}"], connect_timeout_s=0.5)


@pytest.mark.parametrize("kind", ["refused", "silent"])
def test_an_unreachable_etcd_is_a_clear_error(kind: str) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if kind == "silent":
            listener.listen(1)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        begun = time.monotonic()
        with pytest.raises(StoreUnavailable, match=url) as caught:
            connect([url], connect_timeout_s=0.5)
        assert time.monotonic() - begun < T
        assert "etcd" in caught.value.hint


def test_a_name_that_does_not_resolve_is_a_clear_error() -> None:
    for urls in (["http://no-such-host.invalid:2379"], ["http://no-such-host.invalid:1", "http://no-such.invalid:2"]):
        with pytest.raises(StoreUnavailable, match="no-such-host"):
            connect(urls, connect_timeout_s=0.5)


def test_one_live_endpoint_of_several_is_enough(server: EtcdServer) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # and never listens, nor does another process in its place
        dead = f"http://127.0.0.1:{unused.getsockname()[1]}"
        with closing(connect([dead, server.url])) as store:
            for _ in range(5):
                store.put("/a", b"")
                assert store.get("/a") is not None


@pytest.mark.parametrize(
    "endpoints",
    [
        [],
        ["http://"],
        ["http://h"],
        ["http://h:0"],
        ["http://h:99999"],
        ["ftp://h:1"],
        ["http://h:1", "https://h:2"],
        ["unix://h/a"],
        ["unix:///a%2Cb"],
        ["unix:///a", "http://h:1"],
    ],
)
def test_bad_endpoints_are_refused(endpoints: list[str]) -> None:
    with pytest.raises(ConfigError):
        connect(endpoints)


@pytest.mark.parametrize(
    ("endpoint", "files"),
    [
        ("https://h:1", {}),
        ("http://h:1", {"ca": "/ca.pem"}),
        ("https://h:1", {"ca": "/ca.pem", "cert": "/cert.pem"}),
        ("https://h:1", {"ca": "/no/such/ca.pem"}),
    ],
)
def test_bad_certificates_are_refused(endpoint: str, files: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="certificate"):
        connect([endpoint], Credentials(**files))


def test_tls(tmp_path: Path) -> None:
    """etcd makes itself a certificate (--auto-tls), which serves as its own authority here."""
    client, peer = (
        f"{scheme}://127.0.0.1:{port}" for scheme, port in zip(("https", "http"), free_ports(2), strict=True)
    )
    flags = ["--auto-tls", f"--data-dir={tmp_path}/data", f"--listen-client-urls={client}"]
    flags += [f"--advertise-client-urls={client}", f"--listen-peer-urls={peer}", "--log-level=error"]
    flags += [f"--initial-advertise-peer-urls={peer}", f"--initial-cluster=default={peer}"]
    process = subprocess.Popen([find_binary(), *flags])
    try:
        ca = tmp_path / "data" / "fixtures" / "client" / "cert.pem"
        eventually(lambda: ca.exists() and "END" in ca.read_text(), T, "etcd to write its certificate")
        with closing(connect([client], Credentials(ca=str(ca)), connect_timeout_s=T)) as store:
            assert store.put("/a", b"") == 2
        with pytest.raises(ElasticError):
            connect([client.replace("https", "http")], connect_timeout_s=1.0)
    finally:
        process.kill()
        process.wait(T)
