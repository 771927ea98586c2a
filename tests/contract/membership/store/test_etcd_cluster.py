"""An etcd of three members: losing one is not felt, losing the quorum is said."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from elastic.serve.etcd_server import EtcdServer
from membership.base.errors import StoreUnavailable
from membership.store.codec import encode
from membership.store.endpoints import require_listener
from membership.store.etcd import EtcdStore, connect
from membership.store.keys import Keys
from membership.store.lease import LeaseKeeper
from membership.store.mirror import Mirror
from membership.store.records import Desired
from tests.support.etcd_members import Member, three_members
from tests.support.helpers import eventually
from tests.support.ipv6 import needs_ipv6

pytestmark = pytest.mark.contract

T = 30.0
KEYS = Keys("cluster")


@pytest.fixture
def members(tmp_path: Path) -> Iterator[list[Member]]:
    with three_members(tmp_path) as started:
        yield started


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
        LeaseKeeper(store, 30.0) as keeper,
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


@needs_ipv6
def test_an_etcd_at_an_ipv6_address_is_reached(tmp_path: Path) -> None:
    with EtcdServer(tmp_path, address="[::1]") as server:
        require_listener([server.url])
        with closing(connect([server.url])) as store:
            revision = store.put(KEYS.desired, b"1")
            found = store.get(KEYS.desired)
    assert found is not None
    assert found.mod_revision == revision
