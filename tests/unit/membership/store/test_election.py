"""An election under a virtual clock: one holder, whose token is higher than all before and fences each write."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from membership.base.errors import Fenced, LeaseLost, StoreCompacted, StoreUnavailable, WaitTimeout
from membership.store.election import Election
from membership.store.in_memory import MemoryStore, MemoryWatch
from membership.store.interface import Compare, Op, Put, TxnResult, WatchBatch
from membership.store.lease import LeaseKeeper

pytestmark = pytest.mark.unit

KEY = "/leader"
TTL_S = 3.0


class Scene(MemoryStore):
    """A store in which something happens just when somebody begins to watch, or whose next answer is lost."""

    def __init__(self) -> None:
        self.now = 0.0
        self.when_watched: Callable[[], None] = lambda: None
        self.make_watch: Callable[[MemoryWatch], Any] = lambda watch: watch
        self.lose_answers = 0
        self.paced_s = 0.0
        super().__init__(lambda: self.now)

    @property
    def pace_s(self) -> float:
        return self.paced_s

    def watch(self, prefix: str, start_revision: int) -> MemoryWatch:
        watch = super().watch(prefix, start_revision)
        self.when_watched()
        return self.make_watch(watch)  # type: ignore[no-any-return]

    def txn(self, compares: Sequence[Compare], success: Sequence[Op], failure: Sequence[Op] = ()) -> TxnResult:
        done = super().txn(compares, success, failure)
        if self.lose_answers:
            self.lose_answers -= 1
            raise StoreUnavailable("no answer")
        return done

    def candidate(self, value: bytes = b"") -> tuple[Election, LeaseKeeper]:
        keeper = LeaseKeeper(self, TTL_S, lambda: self.now, background=False)
        return Election(self, KEY, value, keeper), keeper


class _Stepwise:
    """A watch that first has nothing to tell; then each look at it comes after the next step."""

    def __init__(self, watch: MemoryWatch, steps: list[Callable[[], None]]) -> None:
        self.watch, self.steps, self.looked = watch, steps, False

    def next(self, timeout_s: float) -> WatchBatch | None:
        """Nothing, or what the step changed."""
        if not self.looked:
            self.looked = True
            return None
        self.steps.pop(0)()
        return self.watch.next(timeout_s)

    def close(self) -> None:
        """Nobody looks any more."""
        self.watch.close()


@pytest.fixture
def store() -> Scene:
    return Scene()


def test_the_holder_writes_with_its_token_and_its_predecessor_no_more(store: Scene) -> None:
    first, _ = store.candidate(b"first")
    second, _ = store.candidate(b"second")
    assert not first.held
    with pytest.raises(Fenced, match=f"{KEY} is not held"):
        first.fence()
    token = first.campaign(0.0)
    kept = store.get(KEY)
    assert kept is not None
    assert (first.token, kept.create_revision, kept.value, first.held) == (token, token, b"first", True)
    old = first.fence()
    assert store.txn([old], [Put("/x", b"1")]).succeeded
    with pytest.raises(WaitTimeout, match=f"waited 0 s for {KEY}: held by lease"):
        second.campaign(0.0)
    assert not second.held
    first.resign()
    assert (first.token, first.held, store.get(KEY)) == (0, False, None)
    assert second.campaign(0.0) > token
    assert not store.txn([old], [Put("/x", b"2")]).succeeded
    first.resign()  # it is another's by now
    assert store.txn([second.fence()], [Put("/x", b"3")]).succeeded


def test_it_is_not_believed_past_the_lease_nor_won_without_one(store: Scene) -> None:
    first, _ = store.candidate()
    second, late = store.candidate()
    first.campaign(0.0)
    store.now += TTL_S
    assert not first.held
    with pytest.raises(LeaseLost, match=f"lease {late.lease:x} ended while campaigning for {KEY}"):
        second.campaign(0.0)
    third, keeper = store.candidate()
    third.campaign(0.0)
    kept = store.get(KEY)
    assert kept is not None
    assert kept.lease == keeper.lease
    keeper.close()
    assert store.get(KEY) is None


def test_a_lost_answer_is_read_back(store: Scene) -> None:
    """The key was written under our lease: it is ours, with the token of that write."""
    first, keeper = store.candidate()
    store.lose_answers = 1
    token = first.campaign(30.0)
    kept = store.get(KEY)
    assert kept is not None
    assert (kept.lease, kept.create_revision) == (keeper.lease, token)
    assert store.txn([first.fence()], [Put("/x", b"")]).succeeded


def test_a_store_that_never_answers_is_named(store: Scene) -> None:
    first, _ = store.candidate()
    store.outage = True
    with pytest.raises(WaitTimeout, match="outage"):
        first.campaign(0.0)


@pytest.mark.parametrize("compacted", [False, True])
def test_it_waits_until_the_holder_goes_and_then_takes_the_key(store: Scene, compacted: bool) -> None:
    first, _ = store.candidate()
    second, _ = store.candidate()
    token = first.campaign(0.0)
    watched: list[int] = []

    def resign() -> None:
        watched.append(first.token)
        first.resign()
        if compacted:
            raise StoreCompacted("gone")

    store.when_watched = resign
    assert second.campaign(30.0) > token
    assert watched == [token]  # once: it did not ask again and again
    assert second.held


def test_neither_silence_nor_another_keys_end_is_the_holders(store: Scene) -> None:
    first, _ = store.candidate()
    second, _ = store.candidate()
    token = first.campaign(0.0)

    def end_another() -> None:
        store.put(f"{KEY}/another", b"")
        store.delete(f"{KEY}/another")

    watches: list[_Stepwise] = []
    store.make_watch = lambda watch: watches.append(_Stepwise(watch, [end_another, first.resign])) or watches[-1]
    assert second.campaign(30.0) > token
    assert [watch.steps for watch in watches] == [[]], "it looked again although the holder was there"


def test_a_watch_whose_history_is_gone_is_begun_anew(store: Scene) -> None:
    first, _ = store.candidate()
    second, _ = store.candidate()
    token = first.campaign(0.0)

    def compacted() -> None:
        first.resign()
        raise StoreCompacted("gone")

    store.make_watch = lambda watch: _Stepwise(watch, [compacted])
    assert second.campaign(30.0) > token


def test_a_holder_that_stays_is_not_waited_for_beyond_the_deadline(store: Scene) -> None:
    first, _ = store.candidate()
    second, _ = store.candidate()
    first.campaign(0.0)
    with pytest.raises(WaitTimeout, match=f"waited 0.05 s for {KEY}: held by lease"):
        second.campaign(0.05)


def test_an_office_that_goes_over_to_another_lease_keeps_its_token(store: Scene) -> None:
    election, keeper = store.candidate(b"mine")
    token, before = election.campaign(0.0), keeper.lease
    store.paced_s = 1.0
    assert keeper.turn() == 2.0
    assert keeper.lease != before
    held = store.get(KEY)
    assert held is not None
    assert (held.create_revision, held.lease, held.value) == (token, keeper.lease, b"mine")
    store.revoke(before)
    assert store.txn([election.fence()], [Put("/work", b"")]).succeeded
    assert election.held


def test_an_office_that_another_holds_does_not_go_over_to_ours(store: Scene) -> None:
    """We were stopped past our lease. What we believe gives us nothing: neither the key nor a lease."""
    first, keeper = store.candidate(b"first")
    second, _ = store.candidate(b"second")
    first.campaign(0.0)
    store.delete(KEY)
    token = second.campaign(0.0)
    store.paced_s = 1.0
    assert keeper.turn() is None
    assert not first.held
    held = store.get(KEY)
    assert held is not None
    assert (held.create_revision, held.value) == (token, b"second")
