"""The engine's status in the store: what was written late, and by whom."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from elastic.engine.status_writer import StatusWriter
from membership.store.codec import decode
from membership.store.keys import Keys
from membership.store.records import EngineStatus, ExpertLoad
from tests.support.late_store import LateStore

pytestmark = pytest.mark.unit

KEYS = Keys("c")


@pytest.fixture
def store() -> LateStore:
    return LateStore()


def lease_of(store: LateStore) -> Callable[[], int]:
    lease = store.grant(60.0)
    return lambda: lease


def writer_of(store: LateStore) -> tuple[StatusWriter, int]:
    token = store.put(KEYS.engine, b"{}")
    return StatusWriter(store, KEYS, token, lease_of(store), on_fenced=lambda: None, background=False), token


def written(store: LateStore) -> EngineStatus:
    found = store.get(KEYS.engine_status)
    assert found is not None
    return decode(found.value, EngineStatus)


def test_a_status_that_arrives_late_undoes_no_newer_one(store: LateStore) -> None:
    writer, token = writer_of(store)
    assert writer.turn()
    store.cut = True
    writer.update(EngineStatus(token=token, epoch=50))
    assert writer.turn(), "the store is away: it is tried again"
    store.cut = False
    newer = EngineStatus(token=token, epoch=51, masked=(2,))
    writer.update(newer)
    assert writer.turn()
    store.arrive()
    assert written(store) == newer


def test_one_that_arrived_after_all_is_written_over(store: LateStore) -> None:
    writer, token = writer_of(store)
    store.cut = True
    writer.update(EngineStatus(token=token, epoch=50))
    assert writer.turn()
    store.cut = False
    store.arrive()
    newer = EngineStatus(token=token, epoch=51)
    writer.update(newer)
    assert writer.turn()
    assert written(store) == newer


def test_an_engine_that_was_replaced_writes_nothing(store: LateStore) -> None:
    writer, _ = writer_of(store)
    assert writer.turn()
    store.delete(KEYS.engine)
    token = store.put(KEYS.engine, b"{}")
    assert not writer.turn()
    assert writer.fenced
    successor = StatusWriter(store, KEYS, token, lease_of(store), on_fenced=lambda: None, background=False)
    successor.update(EngineStatus(token=token, epoch=7))
    assert successor.turn(), "a status of its predecessor is there"
    assert not writer.turn()
    assert written(store).epoch == 7


def test_all_of_it_follows_to_another_lease(store: LateStore) -> None:
    """Else it ends with the lease before: the status for a moment, loads that do not change for good."""
    token, held = store.put(KEYS.engine, b"{}"), [store.grant(60.0)]
    writer = StatusWriter(store, KEYS, token, lambda: held[-1], on_fenced=lambda: None, background=False)
    writer.publish_loads(ExpertLoad(at=1.0, loads=((16,),)))
    assert writer.turn()
    assert not writer.urgent
    held.append(store.grant(60.0))
    writer.rewrite()
    assert writer.urgent, "at once"
    assert writer.turn()
    store.revoke(held[0])
    assert written(store).token == token
    assert store.get(KEYS.expert_load) is not None


def test_loads_that_stand_there_are_not_written_again(store: LateStore) -> None:
    writer, _ = writer_of(store)
    loads = ExpertLoad(at=1.0)
    store.cut = True
    writer.publish_loads(loads)
    assert writer.turn()
    store.cut = False
    assert writer.turn(), "they may not have arrived"
    first = store.get(KEYS.expert_load)
    assert writer.turn()
    assert first is not None
    assert store.get(KEYS.expert_load) == first


def test_a_status_that_was_on_its_way_under_a_lease_that_ended_meanwhile_fences_nobody(store: LateStore) -> None:
    token, fenced = store.put(KEYS.engine, b"{}"), list[bool]()
    ended, other = store.grant(60.0), store.grant(60.0)
    store.revoke(ended)
    asked = iter((ended, other, other))  # the office goes over while the first write is on its way
    writer = StatusWriter(store, KEYS, token, lambda: next(asked), lambda: fenced.append(True), background=False)
    assert writer.turn()
    assert writer.urgent
    assert writer.turn()
    assert written(store).token == token
    store.revoke(other)
    last = StatusWriter(store, KEYS, token, lambda: other, lambda: fenced.append(True), background=False)
    assert not last.turn(), "there is no other lease"
    assert fenced == [True]
