"""The mirror on both stores: it starts synced, follows, lists again when it must, and says when it cannot."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import msgspec
import pytest

from membership.base.errors import SchemaError, StoreCompacted, StoreUnavailable, WaitTimeout
from membership.store.codec import encode
from membership.store.in_memory import MemoryStore, MemoryWatch
from membership.store.interface import Delete, Put, Store
from membership.store.keys import Keys
from membership.store.mirror import Mirror
from membership.store.records import (
    AgentRecord,
    ClusterState,
    Counter,
    Desired,
    Heartbeats,
    Member,
    RankRecord,
    RankState,
    View,
)
from tests.support.helpers import eventually

pytestmark = pytest.mark.contract

T = 30.0
SOON_S = 30.0


@pytest.fixture
def keys() -> Keys:
    return Keys(uuid.uuid4().hex)


@pytest.fixture
def mirror(store: Store, keys: Keys) -> Iterator[Mirror]:
    with Mirror(store, keys.cluster, probe_every_s=0.1) as found:
        yield found


def view(epoch: int) -> View:
    members = (Member(rank=0, node="n", incarnation=1),)
    return View(epoch=epoch, members=members, placement={0: ((0, 1), (2,))})


def rank(rank: int, incarnation: int) -> RankRecord:
    return RankRecord(
        rank=rank, node="n", incarnation=incarnation, pid=1, state=RankState.STANDBY, exchange_handle=b"\0\xff"
    )


def test_it_is_synced_from_the_start(store: Store, keys: Keys) -> None:
    revision = store.put(keys.view, encode(view(1)))
    store.put(Keys(keys.cluster + "2").view, encode(view(7)))
    with Mirror(store, keys.cluster) as mirror:
        state = mirror.state()
        assert (state.view, state.view_revision) == (view(1), revision)
        assert state.revision >= revision


def test_it_follows_puts_deletes_and_transactions(store: Store, keys: Keys, mirror: Mirror) -> None:
    staged = store.txn((), [Put(keys.next, encode(view(1))), Put(keys.rank(0, 1), encode(rank(0, 1)))]).revision
    state = mirror.wait(lambda s: s.next is not None, T)
    assert (state.next, state.next_revision, state.revision) == (view(1), staged, staged)
    assert state.ranks == {(0, 1): rank(0, 1)}
    done = store.txn((), [Put(keys.view, encode(view(1))), Delete(keys.next), Delete(keys.rank(0, 1))]).revision
    state = mirror.wait(staged, T)
    assert (state.view, state.next, state.next_revision, state.ranks) == (view(1), None, 0, {})
    assert (state.view_revision, state.revision) == (done, done)


def test_it_carries_tokens_and_the_counter(store: Store, keys: Keys, mirror: Mirror) -> None:
    token = store.put(keys.leader, b"whatever the leader writes")
    store.put(keys.leader, b"again")
    store.put(keys.incarnation, encode(Counter(value=41)))
    state = mirror.wait(lambda s: s.incarnation == 41, T)
    assert state.leader_revision == token


def test_wait_names_what_was_waited_for(mirror: Mirror) -> None:
    with pytest.raises(WaitTimeout, match=r"0\.1 s for rank 3 to register"):
        mirror.wait(lambda state: (3, 1) in state.ranks, 0.1, "rank 3 to register")


def test_poll_returns_the_old_state_in_time(mirror: Mirror) -> None:
    state = mirror.state()
    assert mirror.poll(state.revision, 0.05) == state


def test_heartbeats_are_in_the_state_and_wake_no_subscriber(store: Store, keys: Keys, mirror: Mirror) -> None:
    seen: list[ClusterState] = []
    mirror.subscribe(seen.append)
    beats = Heartbeats(node="n", at=2.0, beats={1: 1.5})
    revision = store.put(keys.heartbeats("n"), encode(beats))
    eventually(lambda: mirror.state().heartbeats == {"n": beats}, T, "the heartbeats in the state")
    assert mirror.state().revision == revision
    store.put(keys.desired, encode(Desired(ranks=4)))
    mirror.wait(lambda s: s.desired is not None, T)
    eventually(lambda: seen, T, "the change of something else")
    assert [state.desired for state in seen] == [Desired(ranks=4)]
    both = store.txn((), [Put(keys.heartbeats("n"), encode(beats)), Put(keys.view, encode(view(1)))])
    assert mirror.wait(both.revision - 1, T, "a batch with more than heartbeats").view == view(1)


def test_heartbeats_of_a_newer_schema_are_got_over(store: Store, keys: Keys, mirror: Mirror) -> None:
    store.put(keys.heartbeats("n"), b'{"schema": 99}')
    eventually(lambda: _unreadable(mirror), T, "the failure to read them")
    store.put(keys.heartbeats("n"), encode(Heartbeats(node="n", at=2.0)))
    eventually(lambda: not _unreadable(mirror), T, "the state again")


def _unreadable(mirror: Mirror) -> bool:
    try:
        mirror.state()
    except SchemaError:
        return True
    return False


def test_an_unchanged_record_is_not_decoded_again(store: Store, keys: Keys, mirror: Mirror) -> None:
    store.put(keys.view, encode(view(1)))
    before = mirror.wait(lambda s: s.view is not None, T)
    store.put(keys.desired, encode(Desired(ranks=4)))
    after = mirror.wait(before.revision, T)
    assert after.view is before.view


def test_subscribers_see_each_state_until_they_leave(store: Store, keys: Keys, mirror: Mirror) -> None:
    seen: list[ClusterState] = []
    unsubscribe = mirror.subscribe(seen.append)
    revision = store.put(keys.desired, encode(Desired(ranks=4)))
    eventually(lambda: seen, T, "the subscriber to be notified")
    assert [state.revision for state in seen] == [revision]
    unsubscribe()
    store.put(keys.desired, encode(Desired(ranks=5)))
    mirror.wait(revision, T)
    assert len(seen) == 1


def test_a_failing_subscriber_is_not_lost_silently(store: Store, keys: Keys, mirror: Mirror) -> None:
    def broken(state: ClusterState) -> None:
        raise ZeroDivisionError("a bug in a role")

    mirror.subscribe(broken)
    store.put(keys.desired, encode(Desired(ranks=4)))
    with pytest.raises(ZeroDivisionError):
        mirror.wait(lambda s: False, T)
    with pytest.raises(ZeroDivisionError):
        mirror.state()


def test_a_record_of_a_newer_schema_is_reported_and_got_over(store: Store, keys: Keys, mirror: Mirror) -> None:
    newer = msgspec.json.encode({"v": 99, "kind": "View", "data": {"epoch": 1}})
    revision = store.put(keys.view, newer)
    with pytest.raises(SchemaError, match=r"view: View record has schema version 99"):
        mirror.wait(lambda s: False, T)
    with pytest.raises(SchemaError):
        Mirror(store, keys.cluster)
    store.put(keys.view, encode(view(2)))
    eventually(lambda: _readable(mirror), T, "the mirror to read on")
    assert mirror.wait(revision, T).view == view(2)


def _readable(mirror: Mirror) -> bool:
    try:
        mirror.state()
    except SchemaError:
        return False
    return True


def test_keys_of_a_newer_version_are_left_alone(store: Store, keys: Keys, mirror: Mirror) -> None:
    store.put(keys.prefix + "hologram", b"\0")
    store.put(keys.prefix + "holograms/1", b"\0")
    revision = store.put(keys.desired, encode(Desired(ranks=4)))
    assert mirror.wait(revision - 1, T).desired == Desired(ranks=4)


class Flaky:
    """A store whose watches can be broken at will, and whose changes meanwhile can be compacted away."""

    def __init__(self, store: Store) -> None:
        self.watches: list[Watched] = []
        self.lists = 0
        self.away = False
        self._store = store

    def __getattr__(self, name: str) -> object:
        return getattr(self._store, name)

    def range(self, prefix: str) -> object:
        self.lists += 1
        return self._store.range(prefix)

    def watch(self, prefix: str, start_revision: int) -> object:
        if self.away:
            raise StoreUnavailable("away")
        self.watches.append(Watched(self, self._store.watch(prefix, start_revision)))
        return self.watches[-1]


class Watched:
    def __init__(self, owner: Flaky, watch: object) -> None:
        self._owner = owner
        self._watch = watch

    def next(self, timeout_s: float) -> object:
        if self._owner.away:
            raise StoreUnavailable("away")
        return self._watch.next(min(timeout_s, 0.05))  # type: ignore[attr-defined]

    def close(self) -> None:
        self._watch.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize("compacted", ["", "a later change", "a delete"])
def test_it_catches_up_after_an_outage(store: Store, keys: Keys, compacted: str) -> None:
    """Resumed where it stopped, without listing; listed again where the store has forgotten that point.

    The last case is the hard one: etcd before 3.4.34 / 3.5.16 does not report a delete at the compacted revision.
    """
    flaky = Flaky(store)
    store.put(keys.view, encode(view(1)))
    with Mirror(flaky, keys.cluster) as mirror:  # type: ignore[arg-type]
        eventually(lambda: mirror.synced, T, "the first watch")
        flaky.away = True
        eventually(lambda: not mirror.synced, T, "the mirror to lose its watch")
        assert mirror.state().view == view(1)
        if compacted != "a delete":
            store.put(keys.view, encode(view(2)))
        deleted = store.txn((), [Delete(keys.view)]).revision
        if compacted == "a delete":
            store.compact(deleted)
        elif compacted:
            store.compact(store.put(keys.desired, encode(Desired(ranks=1))))
        flaky.away = False
        state = mirror.wait(lambda s: s.view is None, T, "the delete to be seen")
        assert state.revision >= deleted
        eventually(lambda: mirror.synced, T, "the mirror to watch again")
        assert flaky.lists == (2 if compacted else 1)


def test_it_is_stale_while_the_store_is_away() -> None:
    now = 100.0
    store = MemoryStore(lambda: now)
    store.put(Keys("c").view, encode(view(1)))
    with Mirror(store, "c", clock=lambda: now, probe_every_s=0.01) as mirror:
        eventually(lambda: mirror.synced, T, "the first watch")
        store.outage = True
        eventually(lambda: not mirror.synced, T, "the mirror to notice the outage")
        now += 7.0
        assert mirror.staleness_s == 7.0
        assert mirror.state().view == view(1)
        with pytest.raises(WaitTimeout, match=r"silent for 7\.0 s"):
            mirror.wait(lambda s: False, 0.05)
        store.outage = False
        eventually(lambda: mirror.synced and mirror.staleness_s == 0.0, T, "the mirror to be back")


def test_it_does_not_start_without_a_store(keys: Keys) -> None:
    store = MemoryStore()
    store.outage = True
    with pytest.raises(StoreUnavailable):
        Mirror(store, keys.cluster)


class PromptStore(MemoryStore):
    """Refuses a watch at once that begins with a compacted revision; the usual store does so when it is read."""

    def watch(self, prefix: str, start_revision: int) -> MemoryWatch:
        if 0 < start_revision < self._compacted:
            raise StoreCompacted(f"revision {start_revision} was compacted (at {self._compacted})")
        return super().watch(prefix, start_revision)


@pytest.mark.parametrize(
    ("kind", "compacted"),
    [(MemoryStore, False), (MemoryStore, True), (PromptStore, True)],
    ids=lambda value: str(getattr(value, "__name__", value)),
)
def test_a_client_that_was_cut_off_learns_what_it_missed(kind: type[MemoryStore], compacted: bool) -> None:
    store, keys = kind(), Keys("c")
    store.put(keys.agent("gone"), encode(AgentRecord(node="gone", pid=1, started=1.0)))
    store.put(keys.desired, encode(Desired(ranks=1)))
    with Mirror(store, "c", probe_every_s=0.02) as mirror:
        mirror.wait(lambda state: state.desired is not None, SOON_S)
        store.outage = True
        store._outage = False  # only this client is cut off: its watch is broken for good, others still write
        store.delete(keys.agent("gone"))
        revisions = [store.put(keys.desired, encode(Desired(ranks=ranks))) for ranks in (2, 3, 4, 5)]
        if compacted:
            store.compact(revisions[-1])
        store.outage = False
        state = mirror.wait(lambda s: s.desired == Desired(ranks=5), SOON_S, "what it missed")
        assert not state.agents
        store.put(keys.desired, encode(Desired(ranks=6)))
        mirror.wait(lambda s: s.desired == Desired(ranks=6), SOON_S, "what came after")
