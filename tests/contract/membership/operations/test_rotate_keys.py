"""Naming another join secret in the cluster's config, against both stores."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from msgspec.structs import replace

from membership.base.errors import OperationConflict, PlanRefused
from membership.operations.rotate_keys import ATTEMPTS, name_of, rotate_keys
from membership.store.codec import decode, encode
from membership.store.interface import Compare, Op, Store, TxnResult
from membership.store.keys import Keys
from membership.store.records import AgentRecord, ClusterConfig, Counter
from tests.support.world import CONFIG

pytestmark = pytest.mark.contract

OLD, NEW = "old key", "new key"


def begun(store: Store, prefix: str, *has: str) -> Keys:
    """A cluster with the old secret, on a host that has these; seven incarnations were given out."""
    keys = Keys(prefix.split("/")[2])
    store.put(keys.config, encode(replace(CONFIG, cluster=prefix.split("/")[2], join_key=OLD)))
    store.put(keys.incarnation, encode(Counter(value=7)))
    store.put(keys.agent("a"), encode(AgentRecord(node="a", pid=1, started=1.0, join_keys=has)))
    return keys


def config_of(store: Store, keys: Keys) -> ClusterConfig:
    found = store.get(keys.config)
    assert found is not None
    return decode(found.value, ClusterConfig)


def test_the_config_names_the_new_one_and_remembers_the_one_before(store: Store, prefix: str) -> None:
    keys = begun(store, prefix, OLD, NEW)
    before = config_of(store, keys)
    plan = rotate_keys(store, before.cluster)
    assert (plan.secret, plan.generation) == (name_of(NEW), 1)
    grace = replace(before, join_key=NEW, join_keys_before=(OLD,), join_grace=True, join_generation=1, join_since=7)
    assert config_of(store, keys) == grace
    assert rotate_keys(store, before.cluster, generation=1).ends, "nothing listens with the one before"
    ended = replace(grace, join_grace=False)
    assert (config_of(store, keys), ended.join_keys_retired) == (ended, (OLD,))
    assert not rotate_keys(store, before.cluster).changes
    assert config_of(store, keys) == ended, "once more changes nothing"


def test_no_rotation_goes_back_to_a_secret_that_was_used(store: Store, prefix: str) -> None:
    """Though all hosts have kept the lines of all of them."""
    keys, has = begun(store, prefix, OLD), [OLD]
    for number in range(1, 4):
        has.append(f"key {number}")
        store.put(keys.agent("a"), encode(AgentRecord(node="a", pid=1, started=1.0, join_keys=tuple(has))))
        assert not rotate_keys(store, keys.cluster, generation=number).ends
        assert rotate_keys(store, keys.cluster, generation=number).ends
        assert config_of(store, keys).join_key == has[-1]
    assert not rotate_keys(store, keys.cluster).changes
    assert (config_of(store, keys).join_key, config_of(store, keys).join_keys_retired) == (has[-1], tuple(has[:-1]))


def test_a_generation_that_was_reached_is_not_left_for_the_next(store: Store, prefix: str) -> None:
    """An answer may be lost, or a mirror be late: whoever asks again has asked for this one."""
    keys = begun(store, prefix, OLD, NEW)
    rotate_keys(store, keys.cluster, generation=1)
    rotate_keys(store, keys.cluster, generation=1)
    store.put(keys.agent("a"), encode(AgentRecord(node="a", pid=1, started=1.0, join_keys=(NEW, "third"))))
    assert not rotate_keys(store, keys.cluster, generation=1).ends
    assert config_of(store, keys).join_key == NEW
    rotate_keys(store, keys.cluster, generation=2)
    assert config_of(store, keys).join_key == "third"


def test_a_host_that_lacks_it_stops_the_change(store: Store, prefix: str) -> None:
    keys = begun(store, prefix, OLD, NEW)
    store.put(keys.agent("b"), encode(AgentRecord(node="b", pid=1, started=1.0, join_keys=(OLD,))))
    before = config_of(store, keys)
    with pytest.raises(PlanRefused, match=f"join secret {name_of(NEW)} is lacking: agent on b") as refused:
        rotate_keys(store, before.cluster)
    assert "--join-secret-file" in refused.value.hint
    assert config_of(store, keys) == before


class Racing:
    """A store in which the controller gives out an incarnation just before a transaction, `times` times."""

    def __init__(self, store: Store, keys: Keys, times: int) -> None:
        self._store, self._keys, self._left = store, keys, times
        self.range = store.range

    def txn(self, compares: Sequence[Compare], ops: Sequence[Op]) -> TxnResult:
        if self._left:
            self._left -= 1
            self._store.put(self._keys.incarnation, encode(Counter(value=20 + self._left)))
        return self._store.txn(compares, ops)


def test_a_rank_that_is_assigned_meanwhile_is_no_later_one(store: Store, prefix: str) -> None:
    """Else it would be taken for one that was begun with the new secret."""
    keys = begun(store, prefix, OLD, NEW)
    rotate_keys(Racing(store, keys, 2), config_of(store, keys).cluster)  # type: ignore[arg-type]
    assert config_of(store, keys).join_since == 20
    keys = begun(store, prefix, OLD, NEW)
    with pytest.raises(OperationConflict):
        rotate_keys(Racing(store, keys, ATTEMPTS), config_of(store, keys).cluster)  # type: ignore[arg-type]
    assert config_of(store, keys).join_key == OLD
