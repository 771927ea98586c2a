"""Ending a slot's quarantine, against both stores."""

from __future__ import annotations

import pytest

from membership.base.errors import ConfigError
from membership.operations.quarantine import unquarantine
from membership.store.codec import decode, encode
from membership.store.interface import Put, Store
from membership.store.keys import Keys
from membership.store.records import RankExit
from workers.agent.restart_policy import counted

pytestmark = pytest.mark.contract


def died(quarantined: bool) -> RankExit:
    return RankExit(
        rank=2, incarnation=9, reason="SIGSEGV", at=50.0, restarts=6, not_before=80.0, quarantined=quarantined,
        refused=quarantined,
    )  # fmt: skip


def test_the_slot_may_be_filled_again_and_its_deaths_are_forgiven(store: Store, prefix: str) -> None:
    cluster = prefix.split("/")[2]
    key = Keys(cluster).exit(2)
    store.txn([], [Put(key, encode(died(quarantined=True)))])
    pardoned = unquarantine(store, cluster, 2, clock=lambda: 100.0)
    assert (pardoned.quarantined, pardoned.refused) == (False, False)
    assert (pardoned.not_before, pardoned.forgiven) == (0.0, 100.0)
    assert (pardoned.incarnation, pardoned.restarts) == (9, 6), "it is dead as before"
    found = store.get(key)
    assert found is not None
    assert decode(found.value, RankExit) == pardoned
    assert unquarantine(store, cluster, 2, clock=lambda: 200.0) == pardoned, "once more changes nothing"


def test_its_deaths_are_forgiven_though_our_clock_is_behind_the_agents(store: Store, prefix: str) -> None:
    cluster = prefix.split("/")[2]
    last = died(quarantined=True)
    store.txn([], [Put(Keys(cluster).exit(2), encode(last))])
    assert counted((last.at,), unquarantine(store, cluster, 2, clock=lambda: last.at - 60)) == ()


def test_a_rank_that_never_died_is_not_in_quarantine(store: Store, prefix: str) -> None:
    with pytest.raises(ConfigError, match="rank 7 is not in quarantine"):
        unquarantine(store, prefix.split("/")[2], 7)


def test_a_death_that_comes_between_is_not_overwritten(store: Store, prefix: str) -> None:
    cluster = prefix.split("/")[2]
    key = Keys(cluster).exit(2)
    store.txn([], [Put(key, encode(died(quarantined=True)))])
    later = RankExit(rank=2, incarnation=10, reason="SIGSEGV", at=99.0, restarts=7)

    def clock() -> float:
        store.txn([], [Put(key, encode(later))])
        return 100.0

    assert unquarantine(store, cluster, 2, clock) == later
    found = store.get(key)
    assert found is not None
    assert decode(found.value, RankExit) == later
