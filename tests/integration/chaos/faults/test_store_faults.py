"""etcd itself fails: each injector proves its fault, and the store's clients do as promised."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from chaos.faults.base import Injected, NotInjected
from chaos.faults.members import EtcdMembers
from chaos.faults.store import FAULTS
from elastic.serve.etcd_server import EtcdServer
from elastic.serve.state_dir import ClusterAddress, StateDir
from membership.base.errors import StoreError, StoreReplaced, StoreUnavailable
from membership.base.events import Event
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
KEYS = Keys("store-faults")
CONFIG = ClusterConfig(cluster=KEYS.cluster, model="m", served_model_name="m", moe_layers=1, experts=2)


class OwnSite:
    """An etcd, and at most one role; no cluster around them."""

    def __init__(self, etcd: EtcdServer, folder: Path) -> None:
        self.etcd, self.folder, self.pids = etcd, folder, {"etcd": etcd.pid if etcd.started else 0}

    def pid(self, victim: str) -> int:
        return self.pids[victim]

    def arm(self, failpoints: str) -> None:
        raise NotInjected("there is no process to arm")

    def events(self) -> list[Event]:
        return []

    def state_dir(self) -> Path:
        return self.folder

    def url(self) -> str:
        return ""


class MembersSite(OwnSite):
    """An etcd of several members."""

    def __init__(self, members: EtcdMembers, folder: Path) -> None:
        self.members = members
        super().__init__(members.members[0].server, folder)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[OwnSite]:
    with EtcdServer(tmp_path / "etcd", flags={"quota-backend-bytes": str(4 << 20)}) as server:
        yield OwnSite(server, tmp_path)


@contextmanager
def in_force(site: OwnSite, fault: str, victim: str = "etcd", **params: object) -> Iterator[Injected]:
    """The fault during the block; what proves it."""
    injector = FAULTS[fault].injector(site, victim, params)
    try:
        yield injector.inject()
    finally:
        injector.heal()
        injector.heal()  # once more changes nothing


def test_a_full_etcd_freezes_membership_and_nothing_else(site: OwnSite) -> None:
    """Leases are renewed and offices held; writes and new leases wait for room, as in an outage."""
    with (
        closing(connect([site.etcd.url])) as store,
        Mirror(store, KEYS.cluster, probe_every_s=0.1) as mirror,
        LeaseKeeper(store, 9.0) as keeper,
    ):
        election = Election(store, KEYS.leader, b"", keeper)
        election.campaign(T)
        with in_force(site, "etcd-full") as injected:
            assert "NOSPACE" in injected.proof
            for write in (lambda: store.put(KEYS.desired, b""), lambda: store.grant(1.0)):
                with pytest.raises(StoreUnavailable) as caught:
                    write()
                assert caught.value.definite
                assert "alarm" in caught.value.hint
            deadline = keeper._deadline
            eventually(lambda: keeper._deadline > deadline, T, "the lease to be renewed")
            assert election.held
            assert mirror.synced
        store.put(KEYS.desired, encode(Desired(ranks=3)))
        mirror.wait(lambda s: s.desired == Desired(ranks=3), T)
        assert election.held


def test_a_forgotten_history_is_listed_anew(site: OwnSite) -> None:
    """Also by a watcher that was away meanwhile: it cannot follow from where it was."""
    with closing(connect([site.etcd.url], timeout_s=2.0)) as store, Mirror(store, KEYS.cluster) as mirror:
        with in_force(site, "etcd-down"):
            eventually(lambda: not mirror.synced, T, "the mirror to notice")
        with closing(connect([site.etcd.url])) as other:
            other.put(KEYS.desired, encode(Desired(ranks=3)))
        with in_force(site, "etcd-compacted") as injected:
            assert "compacted" in injected.proof
        mirror.wait(lambda s: s.desired == Desired(ranks=3), T, "what was written meanwhile")


@pytest.mark.skipif(shutil.which("strace") is None or os.geteuid() != 0, reason="needs strace and root")
def test_a_slow_disk_slows_writes_and_no_lease_is_lost(site: OwnSite) -> None:
    with closing(connect([site.etcd.url])) as store, LeaseKeeper(store, 9.0) as keeper:
        with in_force(site, "etcd-slow-disk", delay_s=0.15) as injected:
            assert float(injected.proof.split()[1]) >= 120.0
            with Mirror(store, KEYS.cluster) as mirror:
                store.put(KEYS.desired, encode(Desired(ranks=3)))
                mirror.wait(lambda s: s.desired == Desired(ranks=3), T)
            deadline = keeper._deadline
            eventually(lambda: keeper._deadline > deadline, T, "the lease to be renewed")
        assert keeper.alive


def test_wiped_data_are_refused_by_who_knew_the_others(site: OwnSite) -> None:
    with closing(connect([site.etcd.url])) as store:
        store.put("/a", b"1")
        with in_force(site, "etcd-wiped") as injected:
            assert " and is " in injected.proof

        def refused() -> bool:
            try:
                store.put("/a", b"2")
            except StoreReplaced:
                return True
            except StoreError:
                return False
            raise AssertionError("another store was written to")

        eventually(refused, T, "the other store to be refused")


@pytest.mark.parametrize("kill", [False, True])
def test_another_member_leads(tmp_path: Path, kill: bool) -> None:
    """Writes go on within the time that an election takes, and no lease is lost."""
    with (
        EtcdMembers(tmp_path) as members,
        closing(connect(members.urls, timeout_s=2.0, connect_timeout_s=T)) as store,
        Mirror(store, KEYS.cluster) as mirror,
        LeaseKeeper(store, 15.0) as keeper,
    ):
        with in_force(MembersSite(members, tmp_path), "etcd-leader", kill=kill):
            eventually(lambda: wrote(store, 3), T, "a write under the next leader")
            mirror.wait(lambda s: s.desired == Desired(ranks=3), T)
        assert keeper.alive
        eventually(lambda: all(member.status().leader for member in members.members), T, "all to follow it")


def wrote(store: EtcdStore, ranks: int) -> bool:
    try:
        store.put(KEYS.desired, encode(Desired(ranks=ranks)))
    except StoreUnavailable:
        return False
    return True


@contextmanager
def controller(site: OwnSite, store: EtcdStore) -> Iterator[None]:
    """`elastic controller`, in office."""
    store.put(KEYS.config, encode(CONFIG))
    state = StateDir(site.folder)
    state.claim()
    state.publish(ClusterAddress(cluster=KEYS.cluster, etcd=(site.etcd.url,)))
    command = [sys.executable, "-m", "elastic.cli", "controller", "--state-dir", str(site.folder)]
    with (site.folder / "controller.log").open("wb") as log:
        process = subprocess.Popen(command, stderr=log)
    site.pids["controller"] = process.pid
    try:
        eventually(lambda: token(store, process.pid), T, "the controller to lead")
        yield
        assert process.poll() is None
    finally:
        process.terminate()
        process.wait(T)
        state.release()


def token(store: EtcdStore, pid: int) -> int:
    held = store.get(KEYS.leader)
    return held.create_revision if held is not None and decode(held.value, LeaderRecord).pid == pid else 0


def test_a_controller_outlives_a_revoked_lease_and_a_full_store(site: OwnSite) -> None:
    """It leaves the office, and takes it again under a higher token: at once, or when there is room."""
    with closing(connect([site.etcd.url])) as store, controller(site, store):
        pid = site.pids["controller"]
        first = token(store, pid)
        with in_force(site, "lease-revoked", "controller") as injected:
            assert f"process {pid}" in injected.proof
        eventually(lambda: token(store, pid) > first, T, "the controller to lead again")
        second = token(store, pid)
        with in_force(site, "etcd-full"), in_force(site, "lease-revoked", "controller"):
            log = site.folder / "controller.log"
            eventually(lambda: "store_unavailable" in log.read_text(), T, "the controller to ask for room")
            assert not token(store, pid)
        eventually(lambda: token(store, pid) > second, T, "the controller to lead after the store had room")


@pytest.mark.parametrize("fault", ["etcd-down", "etcd-wiped"])
def test_what_was_not_ended_is_not_started(tmp_path: Path, fault: str) -> None:
    site = OwnSite(EtcdServer(tmp_path / "etcd", ports=(1, 2)), tmp_path)
    with pytest.raises(StoreUnavailable):
        FAULTS[fault].injector(site, "etcd").inject()
    assert not site.etcd.started


@pytest.mark.parametrize("fault", FAULTS)
def test_healing_what_was_never_injected_touches_nothing(tmp_path: Path, fault: str) -> None:
    """There is no etcd here, and none is asked for."""
    site = OwnSite(EtcdServer(tmp_path / "etcd", ports=(1, 2)), tmp_path)
    FAULTS[fault].injector(site, FAULTS[fault].victims[0]).heal()
    assert not site.etcd.started
