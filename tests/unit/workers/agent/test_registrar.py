"""The registrar: what the agent wants to stand in the store stands there, also after outages and lost leases."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from membership.base.rank_id import RankId
from membership.store.codec import decode
from membership.store.in_memory import MemoryStore
from membership.store.keys import Keys
from membership.store.records import AgentRecord, Heartbeats, RankExit, RankRecord, RankState
from tests.support.helpers import eventually
from workers.agent.registrar import Registrar

pytestmark = pytest.mark.unit

KEYS = Keys("c")
KEY = KEYS.rank(0, 1)


def record(state: RankState = RankState.HANDSHAKING) -> RankRecord:
    return RankRecord(rank=0, node="n", incarnation=1, pid=5, state=state)


@pytest.fixture
def skew() -> list[float]:
    """How far the store's clock is ahead."""
    return [0.0]


@pytest.fixture
def store(skew: list[float]) -> Iterator[MemoryStore]:
    made = MemoryStore(lambda: time.monotonic() + skew[0])
    yield made
    made.close()


def publish(registrar: Registrar, record: RankRecord) -> None:
    registrar.publish(KEYS.rank(record.rank, record.incarnation), record)


@pytest.fixture
def registrar(store: MemoryStore) -> Iterator[Registrar]:
    made = Registrar(store, KEYS, ttl_s=1.0)
    yield made
    made.close()


def stored(store: MemoryStore) -> RankRecord | None:
    kv = store.get(KEY)
    return decode(kv.value, RankRecord) if kv else None


def test_records_are_written_under_leases_and_revoked_at_the_end(store: MemoryStore) -> None:
    registrar = Registrar(store, KEYS, ttl_s=1.0)
    registrar.publish(KEYS.agent("n"), AgentRecord(node="n", pid=1, started=1.0))
    publish(registrar, record())
    eventually(lambda: stored(store), 2, "the record")
    publish(registrar, record(RankState.STANDBY))
    eventually(lambda: stored(store) == record(RankState.STANDBY), 2, "the newer record")
    kv = store.get(KEY)
    assert kv is not None
    assert kv.lease
    registrar.close()
    assert store.range(KEYS.prefix)[1] == ()


def test_a_withdrawn_record_and_its_exit_change_in_one_transaction(store: MemoryStore, registrar: Registrar) -> None:
    publish(registrar, record())
    eventually(lambda: stored(store), 2, "the record")
    registrar.withdraw(RankId(0, 1), RankExit(rank=0, incarnation=1, reason="killed", at=1.0))
    eventually(lambda: stored(store) is None, 2, "the record gone")
    kv = store.get(KEYS.exit(0))
    assert kv is not None
    assert decode(kv.value, RankExit).reason == "killed"
    watch = store.watch(KEYS.prefix, 1)
    batches = []
    while (batch := watch.next(0.01)) is not None:
        batches.append([event for event in batch.events if event.kv.mod_revision == kv.mod_revision])
    assert {event.kv.key for batch in batches for event in batch} == {KEY, KEYS.exit(0)}


def test_a_lease_that_is_not_renewed_runs_out_and_comes_back_when_it_is(
    store: MemoryStore, registrar: Registrar
) -> None:
    publish(registrar, record())
    eventually(lambda: stored(store), 2, "the record")
    registrar.set_renewing(RankId(0, 1), False)
    eventually(lambda: stored(store) is None, 3, "the lease to run out")
    registrar.set_renewing(RankId(0, 1), True)
    eventually(lambda: stored(store), 2, "the record again")


def test_notes_are_under_the_lease_they_belong_to(store: MemoryStore, registrar: Registrar) -> None:
    agent, key = KEYS.agent("n"), KEYS.heartbeats("n")
    registrar.note(key, Heartbeats(node="n", at=1.0), beside=agent)
    registrar.publish(agent, AgentRecord(node="n", pid=1, started=1.0))
    eventually(lambda: store.get(agent), 2, "the agent's record")
    registrar.note(key, Heartbeats(node="n", at=2.0), beside=agent)
    eventually(lambda: noted(store) == 2.0, 2, "the note")
    [of_agent, of_note] = [store.get(agent), store.get(key)]
    assert of_agent is not None
    assert of_note is not None
    assert of_note.lease == of_agent.lease


def test_notes_are_not_kept_for_after_an_outage(store: MemoryStore, registrar: Registrar, skew: list[float]) -> None:
    agent, key = KEYS.agent("n"), KEYS.heartbeats("n")
    registrar.publish(agent, AgentRecord(node="n", pid=1, started=1.0))
    eventually(lambda: store.get(agent), 2, "the agent's record")
    store.outage = True
    registrar.publish(agent, AgentRecord(node="n", pid=2, started=1.0))
    eventually(lambda: not registrar._reachable, 2, "the outage noticed")
    registrar.note(key, Heartbeats(node="n", at=3.0), beside=agent)
    skew[0] += 60.0
    store.outage = False
    eventually(lambda: store.get(agent), 3, "the agent's record under a new lease")
    assert eventually(lambda: registrar.settled, 2, "all written")
    assert store.get(key) is None
    registrar.note(key, Heartbeats(node="n", at=4.0), beside=agent)
    eventually(lambda: noted(store) == 4.0, 2, "the next note")


def noted(store: MemoryStore) -> float:
    kv = store.get(KEYS.heartbeats("n"))
    return decode(kv.value, Heartbeats).at if kv else 0.0


def test_after_an_outage_everything_stands_as_wanted(
    store: MemoryStore, registrar: Registrar, skew: list[float]
) -> None:
    publish(registrar, record())
    registrar.publish(KEYS.rank(1, 2), record())
    eventually(lambda: len(store.range(KEYS.prefix)[1]) == 2, 2, "both records")
    store.outage = True
    publish(registrar, record(RankState.STANDBY))
    registrar.withdraw(RankId(1, 2), RankExit(rank=1, incarnation=2, reason="killed", at=1.0))
    skew[0] += 60.0  # all leases run out meanwhile
    store.outage = False
    eventually(lambda: stored(store) == record(RankState.STANDBY), 3, "the record under a new lease")
    eventually(lambda: store.get(KEYS.exit(1)), 2, "the exit")
    assert store.get(KEYS.rank(1, 2)) is None
