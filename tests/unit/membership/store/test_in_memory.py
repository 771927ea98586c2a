"""What the in-memory store adds to the contract: a virtual clock, and outages at will."""

from __future__ import annotations

import pytest

from membership.base.errors import LeaseLost, StoreUnavailable
from membership.store.in_memory import MemoryStore
from membership.store.interface import Put

pytestmark = pytest.mark.unit


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_leases_expire_by_the_clock_it_was_given(clock: Clock) -> None:
    store = MemoryStore(clock)
    lease = store.grant(3)
    store.put("/a", b"", lease)
    watch = store.watch("/", 0)
    clock.now = 2.9
    assert store.keepalive(lease) == 3.0
    clock.now = 5.8
    assert watch.next(0.0) is None
    clock.now = 5.9
    batch = watch.next(0.0)
    assert batch is not None
    assert [(e.kind, e.kv.key) for e in batch.events] == [("delete", "/a")]
    with pytest.raises(LeaseLost):
        store.keepalive(lease)


def test_an_outage_fails_every_call_breaks_watches_and_lets_leases_run_out(clock: Clock) -> None:
    store = MemoryStore(clock)
    lease = store.grant(3)
    store.put("/a", b"", lease)
    watch = store.watch("/", 0)
    store.outage = True
    for call in (
        lambda: store.get("/a"),
        lambda: store.range("/"),
        lambda: store.txn((), [Put("/a", b"")]),
        lambda: store.watch("/", 0),
        lambda: watch.next(0.0),
    ):
        with pytest.raises(StoreUnavailable):
            call()
    clock.now = 3.0
    store.outage = False
    assert store.get("/a") is None
    with pytest.raises(StoreUnavailable):  # a broken watch stays broken
        watch.next(0.0)
