"""A standby engine that sees hundreds of ranks die and come back keeps nothing of them: objects are counted."""

from __future__ import annotations

import gc
from collections import Counter

import pytest
from msgspec.structs import replace

from elastic.engine.unrecorded import Unrecorded
from membership.store.codec import encode
from membership.store.in_memory import MemoryStore
from membership.store.keys import Keys
from membership.store.mirror import Mirror
from membership.store.records import Member, View
from tests.support.cluster_states import CONFIG, record

pytestmark = pytest.mark.unit

KEYS = Keys("c")
WARM_UP, DEATHS = 50, 400


class Deaths:
    """A cluster of three ranks in a store, of which one after the other gets a successor."""

    def __init__(self) -> None:
        self.store, self.done = MemoryStore(), 0
        self.view = View(epoch=1, members=tuple(Member(rank=rank, node="n", incarnation=rank + 1) for rank in range(3)))
        self.store.put(KEYS.config, encode(CONFIG))

    def one_more(self) -> None:
        old = self.view.members[self.done % 3]
        self.done += 1
        new = replace(old, incarnation=self.done + 3)
        members = tuple(new if member is old else member for member in self.view.members)
        self.view = replace(self.view, epoch=self.view.epoch + 1, members=members)
        self.store.delete(KEYS.rank(old.rank, old.incarnation))
        self.store.put(KEYS.rank(new.rank, new.incarnation), encode(record(new.rank, incarnation=new.incarnation)))
        self.store.put(KEYS.view, encode(self.view))


def held() -> Counter[type]:
    gc.collect()
    return Counter(map(type, gc.get_objects()))


def test_what_a_standby_holds_does_not_grow_with_the_deaths_that_it_sees() -> None:
    deaths, known = Deaths(), Unrecorded(ask=lambda endpoint: True, here="host")
    mirror = Mirror(deaths.store, "c", background=False)
    mirror.subscribe(known.note)

    def watch(number: int) -> Counter[type]:
        for _ in range(number):
            deaths.one_more()
            mirror.turn()
            deaths.store.compact(mirror.state().revision)  # its history is no part of the standby
        return held()

    try:
        before = watch(WARM_UP)
        grown = watch(DEATHS) - before
        view = mirror.state().view
        assert view is not None
        assert view.epoch == 1 + WARM_UP + DEATHS, "it has seen them"
        assert {kind: count for kind, count in grown.items() if count >= DEATHS / 4} == {}
    finally:
        known.close()
        mirror.close()
