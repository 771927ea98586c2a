"""An etcd of three members: losing one is not felt, losing the quorum is said."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest

from membership.codec import encode
from membership.errors import StoreUnavailable
from membership.etcd import EtcdStore, connect
from membership.keys import Keys
from membership.lease import LeaseKeeper
from membership.mirror import Mirror
from membership.types import Desired
from tests.helpers import eventually
from workers.etcd_server import find_binary, free_ports

pytestmark = pytest.mark.contract

T = 30.0
KEYS = Keys("cluster")


@dataclass
class Member:
    url: str
    process: subprocess.Popen[bytes]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(T)


@pytest.fixture
def members(tmp_path: Path) -> Iterator[list[Member]]:
    ports = free_ports(6)
    peers = {f"m{i}": f"http://127.0.0.1:{port}" for i, port in enumerate(ports[3:])}
    started: list[Member] = []
    try:
        for (name, peer), port in zip(peers.items(), ports, strict=False):
            url = f"http://127.0.0.1:{port}"
            flags = [f"--name={name}", f"--data-dir={tmp_path}/{name}", f"--listen-client-urls={url}"]
            flags += [f"--advertise-client-urls={url}", f"--listen-peer-urls={peer}", "--log-level=error"]
            flags += [f"--initial-advertise-peer-urls={peer}", "--heartbeat-interval=100", "--election-timeout=500"]
            flags += ["--initial-cluster=" + ",".join(f"{n}={p}" for n, p in peers.items())]
            started.append(Member(url, subprocess.Popen([find_binary(), *flags])))
        yield started
    finally:
        for member in started:
            member.kill()


def put_desired(store: EtcdStore, ranks: int) -> None:
    """Write, and read back what was not answered: the cluster may be electing a leader."""
    deadline = time.monotonic() + T
    while True:
        try:
            store.put(KEYS.desired, encode(Desired(ranks=ranks)))
            return
        except StoreUnavailable:
            if time.monotonic() > deadline:
                raise


def test_a_member_may_die(members: list[Member]) -> None:
    """Leader or follower, connected to or not: the others are there."""
    with (
        closing(connect([m.url for m in members], timeout_s=2.0, connect_timeout_s=T)) as store,
        Mirror(store, KEYS.cluster, probe_every_s=0.2) as mirror,
        LeaseKeeper(store, 10.0) as keeper,
    ):
        put_desired(store, 1)
        mirror.wait(lambda s: s.desired == Desired(ranks=1), T)
        members[0].kill()
        put_desired(store, 2)
        mirror.wait(lambda s: s.desired == Desired(ranks=2), T, "a write after one member died")
        assert keeper.alive


def test_a_member_without_quorum_says_so(members: list[Member]) -> None:
    with closing(connect([members[2].url], timeout_s=2.0, connect_timeout_s=T)) as store:
        put_desired(store, 1)
        with Mirror(store, KEYS.cluster) as mirror, closing(store.watch("/nothing", 0)) as watch:
            members[0].kill()
            members[1].kill()
            with pytest.raises(StoreUnavailable, match="no leader"):
                watch.next(T)
            with pytest.raises(StoreUnavailable):
                store.put("/a", b"")
            eventually(lambda: not mirror.synced, T, "the mirror to notice")
            assert mirror.state().desired == Desired(ranks=1)
