"""Waiting for an operation: each phase is shown, outages are waited out, and there is a deadline and a way out."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from msgspec.structs import replace

from elastic.cli.client import StoreClient, wait_for
from membership.base.enums import OperationKind
from membership.base.errors import ConfigError, WaitTimeout
from membership.store.codec import encode
from membership.store.in_memory import MemoryStore
from membership.store.keys import Keys
from membership.store.records import Operation, Phase

pytestmark = pytest.mark.unit

KEY = Keys("c").op("x")
PROPOSED = Operation(id="x", kind=OperationKind.SCALE, target=6)


@pytest.fixture
def store() -> Iterator[MemoryStore]:
    store = MemoryStore()
    store.put(KEY, encode(PROPOSED))
    yield store
    store.close()


def waiting(store: MemoryStore, timeout_s: float, stop: threading.Event | None = None) -> Iterator[Operation]:
    return wait_for(StoreClient(store, "c", None), PROPOSED, timeout_s, stop or threading.Event())


def test_each_phase_is_shown_up_to_the_end(store: MemoryStore) -> None:
    seen = []
    for operation in waiting(store, 20.0):
        seen.append(operation.phase)
        following = {Phase.PROPOSED: Phase.LOADING, Phase.LOADING: Phase.DONE}.get(operation.phase)
        if following is not None:
            store.put(KEY, encode(replace(operation, phase=following)))
    assert seen == [Phase.PROPOSED, Phase.LOADING, Phase.DONE]


def test_an_outage_is_waited_out(store: MemoryStore) -> None:
    store.put(KEY, encode(replace(PROPOSED, phase=Phase.DONE)))
    store.outage = True
    asked = 0

    class Stop(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            nonlocal asked
            asked += 1
            store.outage = asked < 4
            return False

    *_, last = waiting(store, 20.0, Stop())
    assert (last.phase, asked) == (Phase.DONE, 4)


def test_there_is_a_deadline_and_a_way_out(store: MemoryStore) -> None:
    with pytest.raises(WaitTimeout, match="operation x is still proposed"):
        list(waiting(store, 0.0))
    store.outage = True
    with pytest.raises(WaitTimeout, match=r"still proposed .*outage"):
        list(waiting(store, 0.0))
    stop = threading.Event()
    stop.set()
    assert list(waiting(store, 20.0, stop)) == [PROPOSED]


def test_an_unknown_operation(store: MemoryStore) -> None:
    store.delete(KEY)
    with pytest.raises(ConfigError, match="no operation 'x'"):
        list(waiting(store, 20.0))
