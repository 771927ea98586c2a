"""The registrar: what the agent wants to stand in the store stands there, also after outages and lost leases."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import closing

import pytest

from membership.base.errors import Fenced
from membership.base.rank_id import RankId
from membership.store.codec import decode, encode
from membership.store.in_memory import MemoryStore
from membership.store.interface import Compare, KeyValue, Op, TxnResult
from membership.store.keys import Keys
from membership.store.records import AgentRecord, Assignment, Heartbeats, RankExit, RankRecord, RankState
from tests.support.helpers import eventually
from tests.support.late_store import LateStore
from workers.agent.registrar import MOST_BYTES, MOST_RENEWALS, Registrar

pytestmark = pytest.mark.unit

KEYS = Keys("c")
T = 60.0
TTL_S = 30.0  # of leases that are not to run out, however busy the machine is
SHORT_S = 1.0
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
    with closing(Registrar(store, KEYS, ttl_s=TTL_S)) as made:
        yield made


@pytest.fixture
def quick(store: MemoryStore) -> Iterator[Registrar]:
    """It soon sees that a lease is gone."""
    with closing(Registrar(store, KEYS, ttl_s=SHORT_S)) as made:
        yield made


def stored(store: MemoryStore) -> RankRecord | None:
    kv = store.get(KEY)
    return decode(kv.value, RankRecord) if kv else None


def test_records_are_written_under_leases_and_revoked_at_the_end(store: MemoryStore) -> None:
    registrar = Registrar(store, KEYS, ttl_s=TTL_S)
    registrar.publish(KEYS.agent("n"), AgentRecord(node="n", pid=1, started=1.0))
    publish(registrar, record())
    eventually(lambda: stored(store), T, "the record")
    publish(registrar, record(RankState.STANDBY))
    eventually(lambda: stored(store) == record(RankState.STANDBY), T, "the newer record")
    kv = store.get(KEY)
    assert kv is not None
    assert kv.lease
    registrar.close()
    assert store.range(KEYS.prefix)[1] == ()


@pytest.mark.parametrize(("agent_started", "stays"), [(1.0, False), (2.0, True)])
def test_an_agent_that_ends_takes_its_own_assignment_along(
    store: MemoryStore, registrar: Registrar, agent_started: float, stays: bool
) -> None:
    """Not that of the next agent of its node."""
    me = AgentRecord(node="n", pid=1, started=1.0)
    registrar.unassign(me)
    store.put(KEYS.assign("n"), encode(Assignment(node="n", agent_started=agent_started)))
    registrar.unassign(me)
    assert (store.get(KEYS.assign("n")) is not None) == stays


def test_a_withdrawn_record_and_its_exit_change_in_one_transaction(store: MemoryStore, registrar: Registrar) -> None:
    publish(registrar, record())
    eventually(lambda: stored(store), T, "the record")
    registrar.withdraw(RankId(0, 1), RankExit(rank=0, incarnation=1, reason="killed", at=1.0))
    eventually(lambda: stored(store) is None, T, "the record gone")
    kv = store.get(KEYS.exit(0))
    assert kv is not None
    assert decode(kv.value, RankExit).reason == "killed"
    watch = store.watch(KEYS.prefix, 1)
    batches = []
    while (batch := watch.next(0.01)) is not None:
        batches.append([event for event in batch.events if event.kv.mod_revision == kv.mod_revision])
    assert {event.kv.key for batch in batches for event in batch} == {KEY, KEYS.exit(0)}


def test_a_lease_that_is_not_renewed_runs_out_and_comes_back_when_it_is(store: MemoryStore, quick: Registrar) -> None:
    publish(quick, record())
    eventually(lambda: stored(store), T, "the record")
    quick.set_renewing(RankId(0, 1), False)
    eventually(lambda: stored(store) is None, T, "the lease to run out")
    quick.set_renewing(RankId(0, 1), True)
    eventually(lambda: stored(store), T, "the record again")


def test_notes_are_under_the_lease_they_belong_to(store: MemoryStore, registrar: Registrar) -> None:
    agent, key = KEYS.agent("n"), KEYS.heartbeats("n")
    registrar.note(key, Heartbeats(node="n", at=1.0), beside=agent)
    registrar.publish(agent, AgentRecord(node="n", pid=1, started=1.0))
    eventually(lambda: store.get(agent), T, "the agent's record")
    registrar.note(key, Heartbeats(node="n", at=2.0), beside=agent)
    eventually(lambda: noted(store) == 2.0, T, "the note")
    [of_agent, of_note] = [store.get(agent), store.get(key)]
    assert of_agent is not None
    assert of_note is not None
    assert of_note.lease == of_agent.lease


def test_notes_are_not_kept_for_after_an_outage(store: MemoryStore, quick: Registrar, skew: list[float]) -> None:
    agent, key = KEYS.agent("n"), KEYS.heartbeats("n")
    quick.publish(agent, AgentRecord(node="n", pid=1, started=1.0))
    eventually(lambda: store.get(agent), T, "the agent's record")
    store.outage = True
    quick.publish(agent, AgentRecord(node="n", pid=2, started=1.0))
    eventually(lambda: not quick._reachable, T, "the outage noticed")
    quick.note(key, Heartbeats(node="n", at=3.0), beside=agent)
    skew[0] += 60.0
    store.outage = False
    eventually(lambda: store.get(agent), T, "the agent's record under a new lease")
    assert eventually(lambda: quick.settled, T, "all written")
    assert store.get(key) is None
    quick.note(key, Heartbeats(node="n", at=4.0), beside=agent)
    eventually(lambda: noted(store) == 4.0, T, "the next note")


def noted(store: MemoryStore) -> float:
    kv = store.get(KEYS.heartbeats("n"))
    return decode(kv.value, Heartbeats).at if kv else 0.0


def test_after_an_outage_everything_stands_as_wanted(store: MemoryStore, quick: Registrar, skew: list[float]) -> None:
    publish(quick, record())
    quick.publish(KEYS.rank(1, 2), record())
    eventually(lambda: len(store.range(KEYS.prefix)[1]) == 2, T, "both records")
    store.outage = True
    publish(quick, record(RankState.STANDBY))
    quick.withdraw(RankId(1, 2), RankExit(rank=1, incarnation=2, reason="killed", at=1.0))
    skew[0] += 60.0  # all leases run out meanwhile
    store.outage = False
    eventually(lambda: stored(store) == record(RankState.STANDBY), T, "the record under a new lease")
    eventually(lambda: store.get(KEYS.exit(1)), T, "the exit")
    assert store.get(KEYS.rank(1, 2)) is None


class Counting(MemoryStore):
    """It counts calls."""

    def __init__(self) -> None:
        super().__init__(lambda: 0.0)
        self.transactions: list[int] = []  # the number of operations of each
        self.renewals: list[int] = []  # the number of leases of each

    def txn(self, compares: Sequence[Compare], success: Sequence[Op], failure: Sequence[Op] = ()) -> TxnResult:
        self.transactions.append(len(success))
        return super().txn(compares, success, failure)

    def keepalives(self, leases: Sequence[int], timeout_s: float | None = None) -> dict[int, float]:
        self.renewals.append(len(leases))
        return super().keepalives(leases, timeout_s)


def ranks(number: int, error: str = "") -> dict[str, RankRecord]:
    records = [
        RankRecord(rank=r, node="n", incarnation=r + 1, pid=5, state=RankState.STANDBY, prepare_error=error)
        for r in range(number)
    ]
    return {KEYS.rank(*each.id): each for each in records}


def test_what_changes_together_is_one_write_and_all_leases_are_renewed_in_one_call() -> None:
    now, store = [0.0], Counting()
    registrar = Registrar(store, KEYS, ttl_s=TTL_S, clock=lambda: now[0], background=False)
    registrar.publish_all(ranks(64))
    registrar.turn()
    assert (store.transactions, store.renewals) == ([64], [])
    now[0] += TTL_S / 2
    registrar.turn()
    assert (store.transactions, store.renewals) == ([64], [64])
    registrar.turn()
    assert store.renewals == [64]


def test_leases_follow_the_stores_pace_one_at_a_time_and_no_record_is_missed() -> None:
    now = [0.0]

    class Paced(Counting):
        """Its answers take a known time."""

        paced_s = 0.0
        granted: list[float]

        @property
        def pace_s(self) -> float:
            return self.paced_s

        def grant(self, ttl_s: float) -> int:
            self.granted.append(ttl_s)
            return super().grant(ttl_s)

    store = Paced()
    store._clock, store.granted = lambda: now[0], []
    registrar = Registrar(store, KEYS, ttl_s=3.0, clock=lambda: now[0], background=False)

    def settle(seconds: float) -> None:
        end = now[0] + seconds
        while now[0] < end:
            now[0] += 0.25
            before = len(store.granted)
            if registrar.due:
                assert registrar.turn()
            assert len(store.granted) <= before + 1
            assert len(store.range(KEYS.prefix)[1]) == 4

    registrar.publish_all(ranks(4))
    registrar.turn()
    store.paced_s = 1.0
    settle(20.0)
    assert store.granted == [3.0] * 4 + [6.0] * 4
    store.paced_s = 0.0
    settle(20.0)
    assert store.granted == [3.0] * 4 + [6.0] * 4 + [3.0] * 4
    assert {kv.lease for kv in store.range(KEYS.prefix)[1]} == {9, 10, 11, 12}
    now[0] += 3.5
    assert not store.range(KEYS.prefix)[1], "they are gone as soon as configured"


def test_leases_that_there_are_do_not_wait_for_those_of_new_ranks() -> None:
    now, done = [0.0], list[str]()

    class Slow(Counting):
        """A grant takes a third of a lease's time."""

        def grant(self, ttl_s: float) -> int:
            now[0] += TTL_S / 3
            done.append("grant")
            return super().grant(ttl_s)

        def keepalives(self, leases: Sequence[int], timeout_s: float | None = None) -> dict[int, float]:
            done.append("renew")
            return super().keepalives(leases, timeout_s)

    registrar = Registrar(Slow(), KEYS, ttl_s=TTL_S, clock=lambda: now[0], background=False)
    registrar.publish_all(ranks(1))
    registrar.turn()
    done.clear()
    registrar.publish_all(ranks(4))
    registrar.turn()
    assert done == ["grant", "renew"] * 3


def test_of_very_many_leases_those_that_waited_longest_are_renewed_first() -> None:
    now, store = [0.0], Counting()
    registrar = Registrar(store, KEYS, ttl_s=TTL_S, clock=lambda: now[0], background=False)
    registrar.publish_all(ranks(MOST_RENEWALS + 1))
    registrar.turn()
    now[0] += TTL_S / 2
    registrar.turn()
    assert store.renewals == [MOST_RENEWALS, 1]


def test_more_than_a_transaction_takes_is_written_in_parts() -> None:
    store = Counting()
    with closing(Registrar(store, KEYS, ttl_s=TTL_S, background=False)) as registrar:
        registrar.publish_all(ranks(256))
        registrar.turn()
        assert store.transactions == [100, 100, 56]
        registrar.publish_all(ranks(3, "x" * MOST_BYTES))
        registrar.turn()
        assert store.transactions[3:] == [1, 1, 1]
        for rank in range(256):
            gone = RankId(rank, rank + 1)
            registrar.withdraw(gone, RankExit(rank=rank, incarnation=rank + 1, reason="killed", at=1.0))
        registrar.turn()
        assert store.transactions[6:] == [80, 80, 80, 80, 80, 80, 32]
        assert {kv.key for kv in store.range(KEYS.prefix)[1]} == {KEYS.exit(rank) for rank in range(256)}


def test_one_lease_that_has_ended_does_not_hold_up_the_records_of_others() -> None:
    store, first, other = MemoryStore(lambda: 0.0), KEYS.rank(0, 1), KEYS.rank(1, 2)
    with closing(Registrar(store, KEYS, ttl_s=TTL_S, background=False)) as registrar:
        registrar.publish_all(ranks(2))
        registrar.turn()
        ended = found(store, first).lease
        store.revoke(ended)
        registrar.publish_all(ranks(2, "new"))
        registrar.turn()
        assert b"new" in found(store, other).value
        registrar.turn()
        assert b"new" in found(store, first).value
        assert found(store, first).lease != ended


def stands(store: LateStore, registrar: Registrar, wanted: RankRecord) -> None:
    """After a few turns, and although what was under way arrives then."""
    for _ in range(3):
        if registrar.due:
            registrar.turn()
    store.arrive()
    assert stored(store) == wanted
    assert registrar.settled


@pytest.mark.parametrize("first", [True, False])
def test_a_record_that_arrives_late_undoes_no_newer_one(first: bool) -> None:
    """Whether it was the key's first one or not: the kernel sends it again after the cut, behind what came since."""
    store = LateStore()
    with closing(Registrar(store, KEYS, ttl_s=TTL_S, background=False)) as registrar:
        if not first:
            publish(registrar, record())
            registrar.turn()
        store.cut = True
        publish(registrar, record(RankState.LOADING))
        assert not registrar.turn(), "no answer came"
        store.cut = False
        publish(registrar, record(RankState.STANDBY))
        stands(store, registrar, record(RankState.STANDBY))


def test_a_record_that_arrived_after_all_is_written_over() -> None:
    store = LateStore()
    with closing(Registrar(store, KEYS, ttl_s=TTL_S, background=False)) as registrar:
        store.cut = True
        publish(registrar, record(RankState.LOADING))
        assert not registrar.turn()
        store.cut = False
        store.arrive()
        publish(registrar, record(RankState.STANDBY))
        stands(store, registrar, record(RankState.STANDBY))


def test_a_late_record_of_one_rank_holds_up_no_other() -> None:
    """What is written together is compared key by key; one that is not as we knew it costs one more turn."""
    store = LateStore()
    with closing(Registrar(store, KEYS, ttl_s=TTL_S, background=False)) as registrar:
        registrar.publish_all(ranks(4))
        registrar.turn()
        store.put(KEYS.rank(2, 3), b"{}")
        registrar.publish_all(ranks(4, "new"))
        registrar.turn()
        registrar.turn()
        assert all(b"new" in found(store, KEYS.rank(r, r + 1)).value for r in range(4))
        assert registrar.settled


def gone(incarnation: int) -> RankExit:
    return RankExit(rank=0, incarnation=incarnation, reason=f"death of {incarnation}", at=1.0)


@pytest.mark.parametrize("first", [True, False])
def test_an_exit_that_arrives_late_undoes_no_newer_one(first: bool) -> None:
    """Exits have one key per slot: the death of a later rank stays known, whether the slot had one before or not."""
    store = LateStore()
    with closing(Registrar(store, KEYS, ttl_s=TTL_S, background=False)) as registrar:
        if not first:
            store.put(KEYS.exit(0), encode(gone(1)))  # another host's
        registrar.publish(KEYS.rank(0, 10), record())
        registrar.turn()
        store.cut = True
        registrar.withdraw(RankId(0, 10), gone(10))
        assert not registrar.turn(), "no answer came"
        store.cut = False
        registrar.turn()
        registrar.publish(KEYS.rank(0, 11), record())
        registrar.withdraw(RankId(0, 11), gone(11))
        registrar.turn()
        store.arrive()
        assert decode(found(store, KEYS.exit(0)).value, RankExit) == gone(11)
        assert registrar.settled


def test_an_exit_is_not_written_over_that_of_a_later_rank_of_another_host() -> None:
    """That host may have been quicker to reach the store. Our record goes all the same."""
    store = LateStore()
    with closing(Registrar(store, KEYS, ttl_s=TTL_S, background=False)) as registrar:
        publish(registrar, record())
        registrar.turn()
        store.put(KEYS.exit(0), encode(gone(2)))
        registrar.withdraw(RankId(0, 1), gone(1))
        registrar.turn()
        assert decode(found(store, KEYS.exit(0)).value, RankExit) == gone(2)
        assert stored(store) is None
        assert registrar.settled
        registrar.record_exit(gone(1))
        registrar.turn()
        assert registrar.settled, "there is nothing to write at all"


def test_an_exit_is_written_over_what_is_none() -> None:
    store = MemoryStore(lambda: 0.0)
    store.put(KEYS.exit(0), b"{}")
    with closing(Registrar(store, KEYS, ttl_s=TTL_S, background=False)) as registrar:
        registrar.record_exit(gone(1))
        registrar.turn()
        assert decode(found(store, KEYS.exit(0)).value, RankExit) == gone(1)


def test_a_record_that_is_there_again_is_not_taken_away_by_the_end_of_an_earlier_one() -> None:
    """A start that is postponed and tried again has the same key."""
    store = LateStore()
    with closing(Registrar(store, KEYS, ttl_s=TTL_S, background=False)) as registrar:
        publish(registrar, record(RankState.LOADING))
        registrar.turn()
        store.cut = True
        registrar.withdraw(RankId(0, 1))
        assert not registrar.turn(), "no answer came"
        store.cut = False
        registrar.turn()
        assert stored(store) is None
        publish(registrar, record(RankState.STANDBY))
        stands(store, registrar, record(RankState.STANDBY))


def found(store: MemoryStore, key: str) -> KeyValue:
    kv = store.get(key)
    assert kv is not None
    return kv


def test_an_agent_whose_name_is_anothers_by_now_writes_nothing_and_says_so(
    store: MemoryStore, skew: list[float]
) -> None:
    """It was cut off, and its pod was started anew elsewhere."""
    now = [0.0]
    with closing(Registrar(store, KEYS, ttl_s=TTL_S, clock=lambda: now[0], background=False)) as registrar:
        registrar.publish(KEYS.agent("n"), AgentRecord(node="n", pid=1, started=1.0))
        publish(registrar, record())
        registrar.turn()
        registrar.require_name()
        skew[0] = now[0] = 2 * TTL_S
        assert store.get(KEYS.agent("n")) is None, "its leases have run out"
        other = AgentRecord(node="n", pid=2, started=2.0, address="10.0.0.9")
        store.put(KEYS.agent("n"), encode(other))
        registrar.turn()
        with pytest.raises(Fenced, match=r"another agent \(pid 2 at 10\.0\.0\.9\) runs as node n"):
            registrar.require_name()
        assert not registrar.due
    assert [kv.value for kv in store.range(KEYS.prefix)[1]] == [encode(other)]


def test_its_own_earlier_record_is_no_other_agents(store: MemoryStore, registrar: Registrar) -> None:
    """A write that was thought lost took effect."""
    store.put(KEYS.agent("n"), encode(AgentRecord(node="n", pid=1, started=1.0)))
    newer = AgentRecord(node="n", pid=1, started=1.0, leaving=True)
    registrar.publish(KEYS.agent("n"), newer)
    eventually(
        lambda: (kv := store.get(KEYS.agent("n"))) and decode(kv.value, AgentRecord) == newer, T, "the newer one"
    )
    registrar.require_name()
