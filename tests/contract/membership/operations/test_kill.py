"""The request to kill a rank, against both stores: it names who serves there now, and needs an operator's leave."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from membership.base.errors import ConfigError, PlanRefused
from membership.operations.kill import kill
from membership.store.codec import decode, encode
from membership.store.interface import Compare, Op, Put, Store, TxnResult
from membership.store.keys import Keys
from membership.store.records import AgentRecord, KillRequest, Member, RankRecord, RankState, View

pytestmark = pytest.mark.contract

AGENT = AgentRecord(node="n", pid=1, started=1.0, killable=True)
VIEW = View(epoch=1, members=(Member(rank=2, node="n", incarnation=9),))


def serving(store: Store, prefix: str, agent: AgentRecord = AGENT) -> Keys:
    """One rank on one node."""
    keys = Keys(prefix.split("/")[2])
    rank = RankRecord(rank=2, node="n", incarnation=9, pid=7, state=RankState.STANDBY)
    records = {keys.view: VIEW, keys.agent("n"): agent, keys.rank(2, 9): rank}
    store.txn([], [Put(key, encode(record)) for key, record in records.items()])
    return keys


def test_it_names_the_incarnation_that_serves(store: Store, prefix: str) -> None:
    keys = serving(store, prefix)
    assert kill(store, keys.cluster, 2, "ann") == KillRequest(rank=2, incarnation=9, by="ann")
    found = store.get(keys.kill)
    assert found is not None
    assert decode(found.value, KillRequest) == KillRequest(rank=2, incarnation=9, by="ann")


def test_without_an_operators_leave_nothing_is_written(store: Store, prefix: str) -> None:
    keys = serving(store, prefix, replace(AGENT, killable=False))
    with pytest.raises(PlanRefused, match="ranks of node 'n' may not be killed"):
        kill(store, keys.cluster, 2)
    with pytest.raises(ConfigError, match="no rank 3 serves"):
        kill(store, keys.cluster, 3)
    assert store.get(keys.kill) is None


def test_a_change_of_members_that_comes_between_is_no_ground_to_kill(store: Store, prefix: str) -> None:
    keys = serving(store, prefix)

    class Meanwhile:
        """The store, in which a view is committed before the request is written."""

        range = staticmethod(store.range)

        @staticmethod
        def txn(compares: list[Compare], ops: list[Op]) -> TxnResult:
            store.put(keys.view, encode(replace(VIEW, epoch=2)))
            return store.txn(compares, ops)

    with pytest.raises(PlanRefused, match="members have just changed"):
        kill(Meanwhile(), keys.cluster, 2)  # type: ignore[arg-type]
    assert store.get(keys.kill) is None
