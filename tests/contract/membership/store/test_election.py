"""Lease keepers and elections on both stores: one holder, a rising token, and a fence that keeps zombies out."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from membership.base.errors import Fenced, LeaseLost, WaitTimeout
from membership.store.election import Election
from membership.store.interface import Compare, Put, Store
from membership.store.lease import LeaseKeeper
from tests.support.helpers import eventually

pytestmark = pytest.mark.contract

T = 30.0


@contextmanager
def campaigning(election: Election, timeout_s: float = T) -> Iterator[list[int]]:
    """Campaign in a thread; the list gets the token."""
    tokens: list[int] = []
    thread = threading.Thread(target=lambda: tokens.append(election.campaign(timeout_s)))
    thread.start()
    yield tokens
    thread.join(timeout_s)
    assert not thread.is_alive()


def test_a_keeper_keeps_its_lease_and_close_ends_it(store: Store, prefix: str) -> None:
    lost: list[str] = []
    with LeaseKeeper(store, 3.0, on_lost=lambda: lost.append("lost")) as keeper:
        written = store.put(prefix + "a", b"", keeper.lease)
        watch = store.watch(prefix, written + 1)
        assert watch.next(4.5) is None  # not deleted, though it would have expired by now
        watch.close()
        assert keeper.alive
        assert 0 < keeper.remaining_s <= 3.0
    assert store.get(prefix + "a") is None
    assert not keeper.alive
    assert not lost


def test_a_keeper_may_leave_its_lease_behind(store: Store, prefix: str) -> None:
    keeper = LeaseKeeper(store, 60.0)
    store.put(prefix + "a", b"", keeper.lease)
    keeper.close(revoke=False)
    assert store.get(prefix + "a") is not None
    store.revoke(keeper.lease)  # its end is a revision, which would come into the middle of another test


def test_a_revoked_lease_is_noticed_and_stays_lost(store: Store) -> None:
    lost = threading.Event()
    keeper = LeaseKeeper(store, 3.0, on_lost=lost.set)
    store.revoke(keeper.lease)
    assert lost.wait(T)
    assert not keeper.alive
    assert keeper.remaining_s == 0.0
    keeper.close()


def test_one_wins_and_its_token_is_the_keys_create_revision(store: Store, prefix: str) -> None:
    key = prefix + "leader"
    with LeaseKeeper(store, 30.0) as mine, LeaseKeeper(store, 30.0) as theirs:
        winner, loser = Election(store, key, b"me", mine), Election(store, key, lambda: b"them", theirs)
        assert winner.campaign(T) == winner.token == winner.campaign(T)
        kv = store.get(key)
        assert kv is not None
        assert (kv.create_revision, kv.value, kv.lease) == (winner.token, b"me", mine.lease)
        with pytest.raises(WaitTimeout, match=r"leader: held by lease"):
            loser.campaign(0.2)
        assert (winner.held, loser.held, loser.token) == (True, False, 0)
        with pytest.raises(Fenced):
            loser.fence()


@pytest.mark.parametrize("how", ["resign", "revoke", "close"])
def test_the_next_takes_over_at_once_with_a_higher_token(store: Store, prefix: str, how: str) -> None:
    key = prefix + "leader"
    first, second = LeaseKeeper(store, 30.0), LeaseKeeper(store, 30.0)
    old, new = Election(store, key, b"1", first), Election(store, key, b"2", second)
    token = old.campaign(T)
    with campaigning(new) as tokens:
        store.put(key + "-status", b"")  # a neighbour that shares the prefix must not matter
        store.delete(key + "-status")
        {"resign": old.resign, "revoke": lambda: store.revoke(first.lease), "close": first.close}[how]()
        eventually(lambda: tokens, T, "the second to win")
    assert tokens[0] > token
    kv = store.get(key)
    assert kv is not None
    assert kv.value == b"2"
    first.close()
    second.close()


def test_the_fence_stops_a_zombie(store: Store, prefix: str) -> None:
    key = prefix + "leader"
    first, second = LeaseKeeper(store, 30.0), LeaseKeeper(store, 30.0)
    zombie, holder = Election(store, key, b"", first), Election(store, key, b"", second)
    zombie.campaign(T)
    assert store.txn([zombie.fence()], [Put(prefix + "view", b"1")]).succeeded
    store.revoke(first.lease)  # as when it was stopped past its lease; it has not noticed yet
    assert not store.txn([zombie.fence()], [Put(prefix + "view", b"2")]).succeeded
    holder.campaign(T)
    assert not store.txn([zombie.fence()], [Put(prefix + "view", b"2")]).succeeded
    zombie.resign()  # must not delete the other's key
    assert store.txn([holder.fence()], [Put(prefix + "view", b"3")]).succeeded
    kv = store.get(prefix + "view")
    assert kv is not None
    assert kv.value == b"3"
    first.close()
    second.close()


def test_a_candidate_whose_lease_ends_stops(store: Store, prefix: str) -> None:
    with LeaseKeeper(store, 30.0) as holder:
        Election(store, prefix + "leader", b"", holder).campaign(T)
        keeper = LeaseKeeper(store, 2.0)
        store.revoke(keeper.lease)
        with pytest.raises(LeaseLost):
            Election(store, prefix + "leader", b"", keeper).campaign(T)
        keeper.close()


def test_an_unanswered_attempt_that_took_effect_is_recognised(store: Store, prefix: str) -> None:
    """The put was made, the answer lost: campaigning again finds the key under our own lease."""
    key = prefix + "leader"
    with LeaseKeeper(store, 30.0) as keeper:
        written = store.txn([Compare(key, "create", "=", 0)], [Put(key, b"", keeper.lease)]).revision
        assert Election(store, key, b"", keeper).campaign(0.0) == written
