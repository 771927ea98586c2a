"""Watches: order, whole revisions, resumption, compaction. The same from the fake and from etcd."""

from __future__ import annotations

import threading
import time

import pytest

from membership.base.errors import StoreCompacted, StoreUnavailable
from membership.store.interface import Delete, Put, Store, Watch, WatchEvent
from tests.support.helpers import eventually

pytestmark = pytest.mark.contract

T = 30.0


def gather(watch: Watch, count: int) -> list[WatchEvent]:
    """The next `count` events, from however many batches."""
    events: list[WatchEvent] = []
    deadline = time.monotonic() + T
    while len(events) < count:
        batch = watch.next(deadline - time.monotonic())
        assert batch is not None, f"{len(events)} of {count} events within {T} s"
        assert batch.revision == batch.events[-1].kv.mod_revision
        events += batch.events
    return events


def test_changes_come_in_order_and_only_of_the_prefix(store: Store, prefix: str) -> None:
    watch = store.watch(prefix, 0)
    first = store.put(prefix + "a", b"1")
    store.put("/test/other" + prefix, b"")
    store.put(prefix + "a", b"2")
    store.delete(prefix + "a")
    put, again, delete = gather(watch, 3)
    assert (put.kind, put.kv.value, put.kv.mod_revision, put.kv.version) == ("put", b"1", first, 1)
    assert (again.kind, again.kv.value, again.kv.create_revision, again.kv.version) == ("put", b"2", first, 2)
    assert (delete.kind, delete.kv.key, delete.kv.mod_revision) == ("delete", prefix + "a", first + 3)
    assert watch.next(0.0) is None
    watch.close()


def test_a_transaction_arrives_whole(store: Store, prefix: str) -> None:
    store.put(prefix + "c", b"")
    watch = store.watch(prefix, 0)
    done = store.txn((), [Put(prefix + "b", b""), Delete(prefix + "c"), Put(prefix + "a", b"")])
    batch = watch.next(T)
    watch.close()
    assert batch is not None
    assert batch.revision == done.revision
    assert sorted((e.kind, e.kv.key[-1]) for e in batch.events) == [("delete", "c"), ("put", "a"), ("put", "b")]


def test_a_watch_resumes_without_gap_or_repetition(store: Store, prefix: str) -> None:
    watch = store.watch(prefix, 0)
    written = [store.put(prefix + "a", str(n).encode()) for n in range(5)]
    (seen,) = {gather(watch, 5)[-1].kv.mod_revision}
    watch.close()
    written += [store.put(prefix + "a", str(n).encode()) for n in range(5, 10)]
    resumed = store.watch(prefix, seen + 1)
    assert [e.kv.mod_revision for e in gather(resumed, 5)] == written[5:]
    resumed.close()


def test_a_watch_of_the_past_yields_the_history(store: Store, prefix: str) -> None:
    first = store.put(prefix + "a", b"1")
    store.delete(prefix + "a")
    watch = store.watch(prefix, first)
    assert [(e.kind, e.kv.value) for e in gather(watch, 2)] == [("put", b"1"), ("delete", b"")]
    watch.close()


def test_a_lease_that_ends_is_seen(store: Store, prefix: str) -> None:
    lease = store.grant(2)
    watch = store.watch(prefix, store.put(prefix + "a", b"", lease) + 1)  # it may end before we watch
    assert [e.kind for e in gather(watch, 1)] == ["delete"]
    watch.close()


def test_a_compacted_revision_cannot_be_watched(store: Store, prefix: str) -> None:
    old = store.put(prefix + "a", b"1")
    store.put(prefix + "a", b"2")
    store.compact(store.put(prefix + "a", b"3"))
    with pytest.raises(StoreCompacted):
        store.watch(prefix, old).next(T)


def test_a_revision_beyond_history_cannot_be_watched(store: Store, prefix: str) -> None:
    """A store that lost its data must not look like one in which nothing happens."""
    with pytest.raises(StoreCompacted):
        store.watch(prefix, store.put(prefix + "a", b"") + 1000)


def test_next_returns_in_time(store: Store, prefix: str) -> None:
    watch = store.watch(prefix, 0)
    assert watch.next(0.05) is None
    watch.close()


@pytest.mark.parametrize("end", ["watch", "store"])
def test_close_ends_a_waiting_next(store: Store, prefix: str, end: str) -> None:
    watch = store.watch(prefix, 0)
    caught: list[Exception] = []

    def wait() -> None:
        try:
            watch.next(60.0)
        except StoreUnavailable as error:
            caught.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    watch.close() if end == "watch" else store.close()
    eventually(lambda: caught, T, "next to return")
    thread.join(T)
    with pytest.raises(StoreUnavailable):
        watch.next(0.0)
    watch.close()
