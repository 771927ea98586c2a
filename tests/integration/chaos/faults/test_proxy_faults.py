"""The proxy injects what it is asked for, proves it, and takes it back; and roles behind it do as promised."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from chaos.faults.base import NotInjected
from chaos.faults.members import ProxiedEtcd
from chaos.faults.proxied import FAULTS, ProxyFault
from chaos.faults.proxy import Faults, TcpProxy, Way
from membership.base.errors import StoreUnavailable
from membership.store.codec import decode, encode
from membership.store.election import Election
from membership.store.etcd import EtcdStore, connect
from membership.store.keys import Keys
from membership.store.lease import LeaseKeeper
from membership.store.mirror import Mirror
from membership.store.records import ClusterConfig, Desired, LeaderRecord
from tests.support.helpers import eventually

pytestmark = pytest.mark.integration

T = 30.0
KEYS = Keys("proxied")
CONFIG = ClusterConfig(cluster=KEYS.cluster, model="m", served_model_name="m", moe_layers=1, experts=2)


@pytest.fixture(scope="module")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProxiedEtcd]:
    with ProxiedEtcd(tmp_path_factory.mktemp("etcd")) as found:
        yield found


@contextmanager
def in_force(proxy: TcpProxy, fault: str) -> Iterator[str]:
    """The fault during the block; its proof."""
    injector = ProxyFault(proxy, fault, "etcd")
    proof = injector.inject().proof
    try:
        yield proof
    finally:
        injector.heal()


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_proven_and_healed(etcd: ProxiedEtcd, fault: str) -> None:
    with in_force(etcd.proxy, fault) as proof:
        assert proof.startswith("a round trip through the proxy: ")
    with closing(connect([etcd.url], connect_timeout_s=T)) as store:
        assert store.put(f"/{fault}", b"") > 0


def test_a_fault_that_cannot_be_felt_is_not_injected(etcd: ProxiedEtcd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chaos.faults.proxied.PROOF_TIMEOUT_S", 0.2)
    with pytest.raises(NotInjected, match="not felt"):
        ProxyFault(etcd.proxy, "net-none", "etcd", Faults(up=Way(delay_s=0.0))).inject()
    with TcpProxy("127.0.0.1", 1) as unused, pytest.raises(NotInjected, match="as it is"):
        ProxyFault(unused, "net-reset", "nothing").inject()


def test_bytes_pass_unharmed_and_in_order_through_a_bad_network() -> None:
    """A megabyte both ways at once, late, lossy and in small pieces: the very bytes, then both ends' ends."""
    sent = os.urandom(1 << 20)
    bad = Way(delay_s=0.001, jitter_s=0.01, loss=0.2, stall_s=0.02, bytes_per_s=4 << 20)
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def echo() -> None:
            peer, _ = listener.accept()
            with peer:
                while piece := peer.recv(65536):
                    peer.sendall(piece)

        server = threading.Thread(target=echo)
        server.start()
        with (
            TcpProxy("127.0.0.1", listener.getsockname()[1], seed=7) as proxy,
            socket.create_connection(("127.0.0.1", proxy.port), T) as client,
        ):
            proxy.set(Faults(up=bad, down=bad))

            def send() -> None:
                client.sendall(sent)
                client.shutdown(socket.SHUT_WR)

            sender = threading.Thread(target=send)
            sender.start()
            got = b"".join(iter(lambda: client.recv(65536), b""))
            sender.join(T)
            server.join(T)
            counters = proxy.counters()
    assert got == sent
    assert (counters.up, counters.down) == (len(sent), len(sent))
    assert counters.stalled


def test_a_cut_lets_through_exactly_so_many_bytes() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, TcpProxy(*listener.getsockname()) as proxy:
        proxy.set(Faults(down=Way(cut_after=1000)))
        with socket.create_connection(("127.0.0.1", proxy.port), T) as client:
            peer, _ = listener.accept()
            with peer:
                peer.sendall(b"x" * 5000)
                assert len(b"".join(iter(lambda: client.recv(65536), b""))) == 1000


@pytest.mark.parametrize("fault", ["net-black-hole", "net-deaf", "net-reset"])
def test_the_mirror_the_lease_and_the_office_under_each_cut(etcd: ProxiedEtcd, fault: str) -> None:
    """The last state stays, the office is left by the leader's own clock, and all goes on when the network is back."""
    keys = Keys(f"proxied-{fault}")
    with (
        closing(connect([etcd.url], timeout_s=2.0, connect_timeout_s=T)) as store,
        closing(connect([etcd.server.url])) as other,
        Mirror(store, keys.cluster, probe_every_s=0.1) as mirror,
    ):
        keeper, next_keeper = LeaseKeeper(store, 3.0), LeaseKeeper(other, 60.0)
        old, new = Election(store, keys.leader, b"", keeper), Election(other, keys.leader, b"", next_keeper)
        token = old.campaign(T)
        mirror.wait(lambda s: s.leader_revision == token, T)
        with in_force(etcd.proxy, fault):
            assert new.campaign(T) > token
            assert not old.held
            other.put(keys.desired, encode(Desired(ranks=3)))
            eventually(lambda: not mirror.synced, T, "the mirror to notice")
            assert mirror.state().leader_revision == token
            with pytest.raises(StoreUnavailable):
                store.put("/a", b"1")
        mirror.wait(lambda s: s.desired == Desired(ranks=3), T, "what was written meanwhile")
        fence = old.fence()
        eventually(lambda: mirror.synced, T, "the mirror to be back")
        assert not store.txn([fence], []).succeeded
        keeper.close()
        next_keeper.close()


def test_an_endpoint_that_does_not_answer_costs_one_call(etcd: ProxiedEtcd, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not every second one: it is reached, so only its silence shows. Watches leave it too."""
    monkeypatch.setattr("random.randrange", lambda _: 0)  # it is the one that is used
    keys = Keys("proxied-endpoint")
    with closing(connect([etcd.url, etcd.server.url], timeout_s=3.0, connect_timeout_s=T)) as store:
        watch = store.watch(keys.prefix, 0)
        with in_force(etcd.proxy, "net-deaf"):
            unanswered = 0
            for ranks in range(20):
                try:
                    store.put(keys.desired, encode(Desired(ranks=ranks)))
                except StoreUnavailable:
                    unanswered += 1
            assert unanswered == 1
            with pytest.raises(StoreUnavailable):
                watch.next(T)
            with Mirror(store, keys.cluster) as mirror:
                assert mirror.state().desired == Desired(ranks=19)
        watch.close()


@contextmanager
def controller(url: str, folder: Path) -> Iterator[int]:
    """`elastic controller` with its own way to etcd; its process id."""
    command = [sys.executable, "-m", "elastic.cli", "controller", "--etcd", url, "--cluster", KEYS.cluster]
    process = subprocess.Popen([*command, "--state-dir", str(folder)], stderr=subprocess.DEVNULL)
    try:
        yield process.pid
    finally:
        process.terminate()
        process.wait(T)


def leader(store: EtcdStore) -> int:
    """Process id of the controller that leads; 0: none."""
    held = store.get(KEYS.leader)
    return decode(held.value, LeaderRecord).pid if held is not None else 0


def test_one_role_is_cut_off_while_the_others_keep_the_store(etcd: ProxiedEtcd, tmp_path: Path) -> None:
    """The leading controller gets no answers: the other one leads, and the first stands by when it is reached again."""
    with closing(connect([etcd.server.url])) as store, controller(etcd.url, tmp_path / "first") as first:
        store.put(KEYS.config, encode(CONFIG))
        eventually(lambda: leader(store) == first, T, "the first to lead")
        with controller(etcd.server.url, tmp_path / "second") as second, in_force(etcd.proxy, "net-deaf"):
            eventually(lambda: leader(store) == second, T, "the second to lead")
        eventually(lambda: leader(store) == first, T, "the first to lead again")
