"""The lease's local deadline, under a virtual clock: it counts from before the renewal was sent."""

from __future__ import annotations

import threading
from random import Random

import pytest

from membership.base.errors import LeaseLost, WaitTimeout
from membership.store import lease as lease_module
from membership.store.in_memory import MemoryStore
from membership.store.lease import LeaseKeeper

pytestmark = pytest.mark.unit

WAIT_S = 30.0


class Slow(MemoryStore):
    """A store that gets lease calls after `request_s` and answers `delay_s` later: only then does the clock move."""

    def __init__(self) -> None:
        self.now = 100.0
        self.request_s = self.delay_s = 0.0
        self.timeouts: list[float | None] = []
        self.revoked: list[int] = []
        super().__init__(lambda: self.now)

    def grant(self, ttl_s: float) -> int:
        self.now += self.request_s
        lease = super().grant(ttl_s)
        self.now += self.delay_s
        return lease

    def keepalive(self, lease: int, timeout_s: float | None = None) -> float:
        self.timeouts.append(timeout_s)
        self.now += self.request_s
        ttl = super().keepalive(lease)
        self.now += self.delay_s
        return ttl

    def end_lease(self, lease: int) -> None:
        """It runs out, and nobody has asked for it."""
        super().revoke(lease)

    def revoke(self, lease: int) -> None:
        self.revoked.append(lease)
        super().revoke(lease)


class Silent(Slow):
    """Once asked for a renewal it says nothing until it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.asked, self.answer = threading.Event(), threading.Event()

    def keepalive(self, lease: int, timeout_s: float | None = None) -> float:
        self.asked.set()
        self.answer.wait(WAIT_S)
        return super().keepalive(lease, timeout_s)


@pytest.fixture
def store() -> Slow:
    return Slow()


def keeper(store: Slow, ttl_s: float = 3.0) -> LeaseKeeper:
    return LeaseKeeper(store, ttl_s, lambda: store.now, background=False)


def test_the_deadline_counts_from_before_the_grant_was_sent(store: Slow) -> None:
    store.delay_s = 1.0
    assert keeper(store).remaining_s == 2.0


def test_the_deadline_counts_from_before_the_renewal_was_sent(store: Slow) -> None:
    kept = keeper(store)
    store.now += 1.0
    store.delay_s = 2.5
    assert kept.renew()
    assert kept.remaining_s == 0.5
    store.now += 0.5
    assert not kept.alive  # by the store's clock too: expiry comes 3 s after it received the renewal


def test_a_store_that_grants_more_does_not_extend_what_was_asked(store: Slow) -> None:
    """etcd rounds up and raises short times to live; nothing local may rest on that."""
    kept = keeper(store, ttl_s=1.2)
    assert store.keepalive(kept.lease) == 2.0
    assert kept.renew()
    assert kept.remaining_s == pytest.approx(1.2)


def test_an_unanswered_renewal_changes_nothing(store: Slow) -> None:
    kept = keeper(store)
    store.now += 1.0
    store.outage = True
    assert not kept.renew()
    assert kept.remaining_s == 2.0
    store.outage = False
    assert kept.renew()
    assert kept.remaining_s == 3.0


def test_it_gives_up_at_its_deadline_without_asking(store: Slow) -> None:
    kept = keeper(store)
    store.outage = True
    store.now += 3.0
    assert not kept.alive
    with pytest.raises(LeaseLost, match="not renewed within its 3 s"):
        kept.renew()


def test_a_renewal_never_waits_beyond_the_deadline(store: Slow) -> None:
    kept = keeper(store)
    store.now += 2.75
    kept.renew()
    kept.renew()
    assert store.timeouts == [0.25, 1.0]
    kept.close()


def test_a_lease_that_the_store_ended_is_lost(store: Slow) -> None:
    kept = keeper(store)
    store.revoke(kept.lease)
    with pytest.raises(LeaseLost):
        kept.renew()


def test_closing_during_an_outage_leaves_the_lease_to_expire(store: Slow) -> None:
    kept = keeper(store)
    store.put("/a", b"", kept.lease)
    store.outage = True
    kept.close()
    store.outage = False
    assert store.get("/a") is not None
    store.now += 3.0
    assert store.get("/a") is None


def test_while_a_holder_believes_in_its_lease_the_store_has_it() -> None:
    """However slow the store's answers are, on the way there or back."""
    random = Random(1)
    for _ in range(200):
        store = Slow()
        kept = keeper(store)
        for _ in range(6):
            store.request_s, store.delay_s = random.uniform(0, 0.5), random.choice([0.0, 0.3, 1.5, 2.8])
            try:
                if random.random() < 0.5:
                    kept.renew()
                if kept.alive:
                    store.put("held", b"", kept.lease)
                store.now += random.uniform(0, 2.0)
                believed = kept.alive
                store.put("held", b"", kept.lease)
            except LeaseLost:
                assert not kept.alive
                break
            assert kept.alive or not believed


def test_what_is_lost_is_told_once_lasts_no_longer_and_is_not_revoked(store: Slow) -> None:
    told: list[float] = []
    kept = LeaseKeeper(store, 3.0, lambda: store.now, background=False, on_lost=lambda: told.append(kept.remaining_s))
    store.end_lease(kept.lease)
    assert kept.turn() is None
    assert (told, kept.alive) == ([0.0], False)
    kept.close()
    assert store.revoked == []


def test_a_lease_is_revoked_once_with_its_block_and_not_held_after(store: Slow) -> None:
    with keeper(store) as kept:
        store.put("/a", b"", kept.lease)
    assert store.get("/a") is None
    assert not kept.alive
    kept.close()
    assert store.revoked == [kept.lease]


def test_a_loss_during_closing_is_not_told(store: Slow) -> None:
    told: list[None] = []
    kept = LeaseKeeper(store, 3.0, lambda: store.now, background=False, on_lost=lambda: told.append(None))
    kept.close()
    assert kept.turn() is None
    assert told == []


def test_the_next_turn_comes_three_times_per_life_and_never_after_the_end(store: Slow) -> None:
    kept = keeper(store)
    assert kept.turn() == 1.0
    store.outage = True
    assert kept.turn() == lease_module.RETRY_S
    store.now += 3.0 - lease_module.RETRY_S / 4
    assert kept.turn() == pytest.approx(lease_module.RETRY_S / 4)
    kept = LeaseKeeper(persisting := Slow(), 3.0, lambda: persisting.now, background=False, persistent=True)
    persisting.outage = True
    persisting.now += 10.0
    assert kept.turn() == lease_module.RETRY_S  # past its deadline, and it does not spin
    assert not kept.alive


def test_the_keeper_may_be_closed_by_what_hears_of_the_loss(store: Slow) -> None:
    closed = threading.Event()

    def close() -> None:
        kept.close()
        closed.set()

    kept = LeaseKeeper(store, 0.3, lambda: store.now, on_lost=close)
    store.end_lease(kept.lease)
    assert closed.wait(WAIT_S)
    kept.close()


def test_a_keeper_that_does_not_stop_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    store = Silent()
    kept = LeaseKeeper(store, 0.3, lambda: store.now)
    assert store.asked.wait(WAIT_S)
    with monkeypatch.context() as patched:
        patched.setattr(lease_module, "CLOSE_TIMEOUT_S", 0.05)
        with pytest.raises(WaitTimeout, match=f"{kept.lease:x} did not stop"):
            kept.close()
    store.answer.set()
    kept.close()
    assert store.revoked == [kept.lease]
