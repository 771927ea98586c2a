"""Clocks of other hosts, by the heartbeats that their agents write into a store."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import cast

import pytest

from elastic.cli.clocks import Offset, clock_findings, offsets
from membership.base.timing import CLOCK_SKEW_S
from membership.store.codec import encode
from membership.store.interface import Store, Watch
from membership.store.keys import Keys
from membership.store.records import Heartbeats

pytestmark = pytest.mark.contract
AHEAD_S = 3600.0


class Beating:
    """The store, in which an agent's heartbeats arrive once they are watched."""

    def __init__(self, store: Store, beat: Callable[[], None]) -> None:
        self._store, self._beat = store, beat

    def range(self, prefix: str) -> object:
        return self._store.range(prefix)

    def watch(self, prefix: str, start_revision: int) -> Watch:
        watch = self._store.watch(prefix, start_revision)
        self._beat()
        return watch


def test_a_clock_that_is_ahead_is_found_and_one_that_says_nothing_is_not(store: Store, prefix: str) -> None:
    keys = Keys(prefix.strip("/").replace("/", "-"))

    def beat() -> None:
        for _ in range(2):
            for node, ahead_s in (("b", AHEAD_S), ("other", 0.0)):
                store.put(keys.heartbeats(node), encode(Heartbeats(node=node, at=time.time() + ahead_s)))
        store.delete(keys.heartbeats("other"))

    store.put(keys.heartbeats("b"), encode(Heartbeats(node="b", at=1.0)))  # of before: says nothing
    found = offsets(cast(Store, Beating(store, beat)), keys, {"b"}, wait_s=60.0)
    assert found.keys() == {"b"}
    assert offsets(store, keys, {"silent"}, wait_s=0.01) == {}
    ahead = found["b"]
    assert AHEAD_S - 60 < ahead.ahead_s <= AHEAD_S, "a heartbeat is never seen before it was written"
    assert ahead.within_s < 60


def test_a_clock_counts_as_wrong_only_beyond_what_is_not_known() -> None:
    skew, some = CLOCK_SKEW_S, 0.5
    found = {
        "fine": Offset(-skew - some / 2, some), "wrong": Offset(-skew - 2 * some, some), "ahead": Offset(9.0, 0.1),
    }  # fmt: skip
    levels = {each.what: each for each in clock_findings({*found, "silent"}, found)}
    assert {name: each.level for name, each in levels.items()} == {
        "host fine": "ok", "host wrong": "warn", "host ahead": "warn", "host silent": "warn",
    }  # fmt: skip
    assert "9.000 s ahead of this host's, give or take 0.100 s" in levels["host ahead"].message
    assert "behind" in levels["host wrong"].message
    assert all(each.hint for each in levels.values() if each.level == "warn")
