"""The lease's local deadline, under a virtual clock: it counts from before the renewal was sent."""

from __future__ import annotations

import threading
from collections.abc import Callable
from random import Random

import pytest

from membership.base.errors import LeaseLost, StoreUnavailable, WaitTimeout
from membership.store import lease as lease_module
from membership.store.in_memory import MemoryStore
from membership.store.interface import Compare, Put
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
        self.paced_s = 0.0
        self.granted: list[float] = []
        super().__init__(lambda: self.now)

    @property
    def pace_s(self) -> float:
        return self.paced_s

    def grant(self, ttl_s: float) -> int:
        self.now += self.request_s
        self.granted.append(ttl_s)
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


Carry = Callable[[int], None]


def carrying(store: Slow) -> tuple[LeaseKeeper, Carry]:
    """One whose holder has a key, and can put it under another lease."""
    kept = keeper(store)
    store.put("/held", b"", kept.lease)

    def carry(lease: int) -> None:
        if not store.txn([Compare("/held", "version", ">", 0)], [Put("/held", b"", lease)]).succeeded:
            raise LeaseLost("it is gone")

    kept.carry = carry
    return kept, carry


def unanswered(carry: Carry) -> Carry:
    """It is done, and its answer is lost."""

    def done(lease: int) -> None:
        carry(lease)
        raise StoreUnavailable("no answer")

    return done


def test_a_lease_lasts_longer_where_the_store_is_slow(store: Slow) -> None:
    """Its renewals are waited for as much longer: each takes that time."""
    store.paced_s = 1.0
    kept = keeper(store)
    assert (store.granted, kept.remaining_s) == ([6.0], 6.0)
    assert kept.turn() == 2.0
    assert store.timeouts == [2.0]
    store.now += 5.9
    assert kept.alive


def test_a_lease_that_is_held_follows_the_pace_and_its_key_stays(store: Slow) -> None:
    (kept, _), first = carrying(store), store.get("/held")
    store.paced_s = 0.8
    store.now += 1.0
    assert kept.turn() == 2.0
    assert (store.granted, kept.remaining_s) == ([3.0, 6.0], 6.0)
    store.now += 5.0  # the first one has ended
    assert kept.turn() == 2.0
    store.paced_s = 0.01
    assert kept.turn() == 1.0
    assert (store.granted, kept.remaining_s) == ([3.0, 6.0, 3.0], 3.0)
    found = store.get("/held")
    assert first is not None
    assert found is not None
    assert (found.create_revision, found.lease) == (first.create_revision, kept.lease)
    store.now += 3.0
    assert store.get("/held") is None, "it ends with the lease that is said to hold it"
    assert not kept.alive


def test_what_else_is_under_a_lease_is_told_of_the_next_one(store: Slow) -> None:
    kept, _ = carrying(store)
    first, told = kept.lease, list[int]()
    kept.on_carried = lambda: told.append(kept.lease)
    assert kept.turn() == 1.0
    assert not told
    store.paced_s = 0.8
    assert kept.turn() == 2.0
    assert told == [kept.lease] != [first]


def test_a_keeper_that_is_to_stop_begins_no_other_lease(store: Slow) -> None:
    """Each of these calls may take as long as a call may, and `close` waits for two."""
    kept, _ = carrying(store)
    store.paced_s = 0.8
    kept.close(revoke=False)
    kept.turn()
    assert store.granted == [3.0]


def test_a_lease_whose_holder_cannot_carry_its_keys_stays_as_it_was_granted(store: Slow) -> None:
    kept = keeper(store)
    store.paced_s = 2.0
    kept.turn()
    assert store.granted == [3.0]


def test_a_keeper_that_ends_takes_its_keys_along_also_where_it_does_not_know_which_lease_they_are_under(
    store: Slow,
) -> None:
    store.paced_s = 1.0
    kept, carry = carrying(store)

    store.paced_s, kept.carry = 0.0, unanswered(carry)
    kept.turn()
    kept.turn()
    kept.close()
    assert store.get("/held") is None


def test_while_it_is_not_known_where_the_keys_are_the_shorter_lease_counts(store: Slow) -> None:
    """The answer to the carry is lost: the old lease may be renewed in vain."""
    store.paced_s = 1.0
    kept, carry = carrying(store)

    store.paced_s, kept.carry = 0.0, unanswered(carry)
    assert kept.turn() == lease_module.RETRY_S
    assert kept.remaining_s == 3.0
    store.now += 2.0
    store.paced_s = 1.0  # the long one would fit again, and the key may be under the short one
    kept.carry = carry
    assert kept.turn() == 2.0
    assert kept.remaining_s == 6.0
    store.now += 5.0
    assert store.get("/held") is not None


def test_a_holder_whose_keys_are_not_its_own_any_more_has_lost_its_lease(store: Slow) -> None:
    kept, _ = carrying(store)

    def gone(lease: int) -> None:
        raise LeaseLost("not ours any more")

    store.paced_s, kept.carry = 1.0, gone
    assert kept.turn() is None
    assert not kept.alive


def test_while_a_holder_believes_in_its_lease_its_key_is_there_whatever_the_pace_does() -> None:
    """Answers take their time or are lost, the pace changes, and the lease with it."""
    random = Random(2)
    fitted = 0
    for _ in range(300):
        store = Slow()
        kept, carry = carrying(store)

        def sometimes(lease: int, store: Slow = store, carry: Carry = carry, draw: Random = random) -> None:
            done = draw.random() < 0.7
            if done:
                carry(lease)
            store.now += draw.choice([0.0, 0.5, 2.0])
            if not done or draw.random() < 0.4:
                raise StoreUnavailable("no answer")

        kept.carry = sometimes
        for _ in range(8):
            store.request_s, store.delay_s = random.uniform(0, 0.3), random.choice([0.0, 0.3, 1.0])
            store.paced_s = random.choice([0.0, 0.0, 0.6, 1.1, 3.0])
            if kept.turn() is None:
                break
            for _ in range(4):
                if kept.alive:
                    assert store.get("/held") is not None
                store.now += random.uniform(0, 1.0)
        fitted += len(store.granted) - 1
    assert fitted > 300
