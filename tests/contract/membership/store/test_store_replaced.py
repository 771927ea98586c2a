"""A store that lost its data, wiped or set back to an older copy: refused for good, and nothing is written to it."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Protocol

import pytest

from elastic.serve.etcd_server import EtcdServer
from membership.base.errors import ConfigError, StoreError, StoreReplaced, StoreUnavailable
from membership.base.events import EventLog
from membership.planning.controller import run_controller, transaction
from membership.planning.planner import Effect
from membership.store.codec import decode, encode
from membership.store.election import Election
from membership.store.etcd import connect
from membership.store.in_memory import Backup, MemoryStore
from membership.store.interface import Compare, Put, Store
from membership.store.keys import Keys, state_from
from membership.store.lease import LeaseKeeper
from membership.store.mirror import Mirror
from membership.store.provenance import Provenance
from membership.store.records import AgentRecord, Counter, Desired, View
from tests.support.helpers import eventually

pytestmark = pytest.mark.contract

T = 30.0
SOON_S = 30.0
KEYS = Keys("replaced")


class Ground(Protocol):
    """A store and what an operator may do to its data."""

    store: Store

    def keep(self) -> None:
        """Copy the data."""
        ...

    def replace(self, how: str) -> None:
        """Put the copy (`older`) or nothing (`wiped`) in the data's place, behind the store's back."""
        ...


class MemoryGround:
    def __init__(self) -> None:
        self.memory = MemoryStore()
        self.store: Store = self.memory
        self.kept: Backup | None = None

    def keep(self) -> None:
        self.kept = self.memory.backup()

    def replace(self, how: str) -> None:
        if how == "wiped":
            self.memory.wipe()
        else:
            assert self.kept is not None
            self.memory.restore(self.kept)


class EtcdGround:
    def __init__(self, server: EtcdServer, folder: Path) -> None:
        self.server, self.data, self.copy = server, folder / "data", folder / "copy"
        self.store: Store = connect([server.url])

    def kill(self) -> None:
        os.kill(self.server.pid, signal.SIGKILL)
        eventually(lambda: not self.server.alive, T, "etcd to be dead")

    def keep(self) -> None:
        self.kill()
        shutil.copytree(self.data, self.copy)
        self.server.restart()
        eventually(lambda: answers(self.store), T, "the store to answer")

    def replace(self, how: str) -> None:
        self.kill()
        shutil.rmtree(self.data)
        if how == "older":
            shutil.copytree(self.copy, self.data)
        self.server.restart()


def answers(store: Store) -> bool:
    try:
        store.get("/any")
    except StoreUnavailable:
        return False
    return True


@pytest.fixture
def etcd_ground(tmp_path: Path) -> Iterator[EtcdGround]:
    with EtcdServer(tmp_path) as server:
        ground = EtcdGround(server, tmp_path)
        with closing(ground.store):
            yield ground


@pytest.fixture(params=["memory", "etcd"])
def ground(request: pytest.FixtureRequest) -> Ground:
    found: Ground = MemoryGround() if request.param == "memory" else request.getfixturevalue("etcd_ground")
    return found


@pytest.mark.parametrize("how", ["wiped", "older"])
def test_every_call_refuses_a_store_that_lost_what_was_seen(ground: Ground, how: str) -> None:
    store = ground.store
    ground.keep()
    lease = store.grant(60)
    seen = store.put("/a", b"1", lease)
    watch = store.watch("/a", 0)
    ground.replace(how)
    with pytest.raises(StoreError):  # the stream breaks, or says what it found
        watch.next(T)
    watch.close()
    refused: list[Callable[[], object]] = [
        lambda: store.put("/a", b"2"),
        lambda: store.get("/a"),
        lambda: store.range("/"),
        lambda: store.delete("/a"),
        lambda: store.txn([Compare("/a", "version", "=", 0)], [Put("/a", b"3")]),
        lambda: store.grant(1),
        lambda: store.keepalive(lease),
        lambda: store.revoke(lease),
        lambda: store.watch("/a", seen + 1),
    ]
    for call in refused:
        with pytest.raises(StoreReplaced) as caught:
            call()
        assert caught.value.definite
        assert "elastic serve" in caught.value.hint


@pytest.mark.parametrize("how", ["wiped", "older"])
def test_the_mirror_keeps_the_last_state_and_says_why(ground: Ground, how: str) -> None:
    ground.keep()
    ground.store.put(KEYS.desired, encode(Desired(ranks=4)))
    with Mirror(ground.store, KEYS.cluster, probe_every_s=0.1) as mirror:
        known = mirror.state()
        ground.replace(how)
        eventually(lambda: "membership is frozen" in mirror.trouble, T, "the mirror to say what happened")
        assert "the store " in mirror.trouble
        assert not mirror.synced
        assert mirror.state() == known


@pytest.mark.parametrize("how", ["wiped", "older"])
def test_a_controller_in_office_writes_nothing_to_it(etcd_ground: EtcdGround, tmp_path: Path, how: str) -> None:
    """In the older copy it is still the leader, by its own token, and there is something to be done."""
    from tests.support.world import CONFIG

    store, keys, stop = etcd_ground.store, Keys(CONFIG.cluster), threading.Event()
    store.put(keys.config, encode(CONFIG))
    events = tmp_path / "events.jsonl"
    args = (store, CONFIG.cluster, "n", stop, EventLog(events, "controller"))
    thread = threading.Thread(target=run_controller, args=args)
    thread.start()
    try:
        eventually(lambda: "leader_elected" in kinds(events), T, "a leader")
        etcd_ground.keep()
        for _ in range(50):
            store.put("/elsewhere", b"")
        etcd_ground.replace(how)
        with closing(connect([etcd_ground.server.url])) as unaware:  # what would make a leader assign ranks
            unaware.put(keys.desired, encode(Desired(ranks=1)))
            unaware.put(keys.agent("n"), encode(AgentRecord(node="n", pid=1, started=1.0)))
        eventually(lambda: "store_replaced" in kinds(events), T, "the controller to notice")
        assert "older copy" in words(events) if how == "older" else "wiped" in words(events)
        with closing(connect([etcd_ground.server.url])) as fresh:
            held = {kv.key for kv in fresh.range(keys.prefix)[1]}
            ours = {keys.desired, keys.agent("n")}
            assert held <= ours | ({keys.config, keys.leader} if how == "older" else set())
    finally:
        stop.set()
        thread.join(T)
    assert not thread.is_alive()


def kinds(events: Path) -> list[str]:
    return [event.kind for event in EventLog.read(events)] if events.exists() else []


def words(events: Path) -> str:
    return next(str(e.fields["error"]) for e in EventLog.read(events) if e.kind == "store_replaced")


def test_an_older_store_itself_refuses_a_commit_made_for_a_newer_one(etcd_ground: EtcdGround) -> None:
    """Even if no client had noticed: the leader's token is the same, the incarnations are not."""
    store = etcd_ground.store
    with LeaseKeeper(store, 60) as keeper:
        leader = Election(store, KEYS.leader, b"", keeper)
        leader.campaign(T)
        store.put(KEYS.incarnation, encode(Counter(value=1)))
        etcd_ground.keep()
        store.put(KEYS.incarnation, encode(Counter(value=2)))
        revision, items = store.range(KEYS.prefix)
        compares, ops = transaction(Effect(reason="test", commit=View(epoch=1)), state_from(items, revision), KEYS)
        etcd_ground.replace("older")
        with closing(connect([etcd_ground.server.url])) as unaware:
            assert not unaware.txn([leader.fence(), *compares], ops).succeeded
            held = unaware.get(KEYS.incarnation)
            assert held is not None
            assert decode(held.value, Counter).value == 1


def test_a_role_that_starts_later_knows_what_its_supervisor_has_seen(etcd_ground: EtcdGround) -> None:
    etcd_ground.store.put("/a", b"1")
    seen, url = etcd_ground.store.seen, etcd_ground.server.url
    connect([url], seen=seen).close()
    etcd_ground.replace("wiped")
    with pytest.raises(StoreReplaced):
        connect([url], seen=seen)
    with closing(connect([url])) as fresh:  # a deliberate new start
        assert fresh.put("/a", b"2") > 1
    with pytest.raises(ConfigError):
        connect([url], seen="nonsense")


def test_answers_that_overtake_each_other_or_come_from_a_member_behind_are_no_loss() -> None:
    provenance = Provenance()
    early = provenance.floor()
    provenance.observed(7, 12)
    provenance.observed(7, 11, early)  # asked before 12 was seen, answered after
    provenance.observed(7, 5)  # a lease's or a watch's answer, whose revision is its member's
    assert provenance.seen == "7:c"
    with pytest.raises(StoreReplaced, match="from revision 12 to 11"):
        provenance.observed(7, 11, provenance.floor())
    with pytest.raises(StoreReplaced):  # it stays refused, however far it has got meanwhile
        provenance.observed(7, 99)


def test_another_store_is_refused_however_far_it_has_got() -> None:
    """Its revisions look right: it has been written to more often than the store that was known."""
    store, other = MemoryStore(), MemoryStore()
    for ranks in range(20):
        other.put(KEYS.desired, encode(Desired(ranks=9 + ranks)))
    store.put(KEYS.desired, encode(Desired(ranks=2)))
    with Mirror(store, KEYS.cluster, probe_every_s=0.02) as mirror:
        store.restore(other.backup())
        eventually(lambda: "replaced" in mirror.trouble, SOON_S, "the mirror to refuse the other store")
        assert mirror.state().desired == Desired(ranks=2)
