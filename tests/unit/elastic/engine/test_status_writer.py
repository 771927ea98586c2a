"""The engine's status in the store: what was written late, and by whom."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from elastic.engine.status_writer import StatusWriter
from membership.store.codec import decode
from membership.store.keys import Keys
from membership.store.records import EngineStatus
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
