"""Reads, writes, transactions, leases: the same answers from the fake and from etcd."""

from __future__ import annotations

import pytest

from membership.base.errors import LeaseLost, StoreCompacted, StoreError
from membership.store.interface import Compare, Delete, Get, Op, Operator, Put, Store, Target
from tests.support.helpers import eventually

pytestmark = pytest.mark.contract


def test_get_of_an_absent_key_is_none(store: Store, prefix: str) -> None:
    assert store.get(prefix + "a") is None


def test_put_counts_revisions_and_versions(store: Store, prefix: str) -> None:
    first = store.put(prefix + "a", b"1")
    second = store.put(prefix + "a", b"2")
    kv = store.get(prefix + "a")
    assert kv is not None
    assert (kv.key, kv.value, kv.lease) == (prefix + "a", b"2", 0)
    assert (kv.create_revision, kv.mod_revision, kv.version) == (first, second, 2)
    assert second == first + 1


def test_a_key_created_again_starts_anew(store: Store, prefix: str) -> None:
    store.put(prefix + "a", b"1")
    assert store.delete(prefix + "a")
    assert not store.delete(prefix + "a")
    again = store.put(prefix + "a", b"2")
    kv = store.get(prefix + "a")
    assert kv is not None
    assert (kv.create_revision, kv.version) == (again, 1)


def test_deleting_nothing_makes_no_revision(store: Store, prefix: str) -> None:
    before = store.put(prefix + "a", b"")
    store.delete(prefix + "b")
    assert store.range(prefix)[0] == before


def test_range_is_sorted_bounded_and_says_its_revision(store: Store, prefix: str) -> None:
    for name in ("b", "a/2", "a/1", "é", "a"):
        revision = store.put(prefix + name, name.encode())
    store.put(prefix[:-1] + "0", b"the key after the prefix")
    found, items = store.range(prefix)
    assert found == revision + 1
    assert [kv.key.removeprefix(prefix) for kv in items] == ["a", "a/1", "a/2", "b", "é"]
    assert [kv.key.removeprefix(prefix) for kv in store.range(prefix + "a")[1]] == ["a", "a/1", "a/2"]


def test_a_prefix_may_end_in_0xff(store: Store, prefix: str) -> None:
    """Keys may hold any byte; the end of such a range needs a carry."""
    odd = prefix + "\udcff"
    for name in ("a", "\udcff", "\udcff\udcff", "\udcffz"):
        store.put(prefix + name, b"")
    assert [kv.key for kv in store.range(odd)[1]] == [odd, odd + "z", odd + "\udcff"]
    watch = store.watch(odd, 0)
    store.put(odd + "new", b"")
    batch = watch.next(30.0)
    watch.close()
    assert batch is not None
    assert batch.events[0].kv.key == odd + "new"
    assert store.txn((), [Delete(odd, prefix=True)]).responses == (4,)
    assert [kv.key for kv in store.range(prefix)[1]] == [prefix + "a"]


def test_the_empty_prefix_is_everything(open_store: Store, prefix: str) -> None:
    open_store.put(prefix + "a", b"")
    assert prefix + "a" in [kv.key for kv in open_store.range("")[1]]


def test_txn_is_one_revision_in_order(store: Store, prefix: str) -> None:
    a, b, c = (prefix + name for name in "abc")
    start = store.put(c, b"old")
    done = store.txn((), [Put(a, b"1"), Get(a), Put(b, b"2"), Delete(c), Get(prefix, prefix=True), Delete(c)])
    assert done.succeeded
    assert done.revision == start + 1
    put_a, got_a, put_b, deleted, everything, nothing = done.responses
    assert (put_a, put_b, deleted, nothing) == (done.revision, done.revision, 1, 0)
    assert isinstance(got_a, tuple)
    assert isinstance(everything, tuple)
    assert [kv.value for kv in got_a] == [b"1"]
    assert [kv.key for kv in everything] == [a, b]
    assert {kv.mod_revision for kv in everything} == {done.revision}


def test_txn_takes_the_other_branch(store: Store, prefix: str) -> None:
    key = prefix + "a"
    store.put(key, b"theirs")
    done = store.txn([Compare(key, "create", "=", 0)], [Put(key, b"mine")], [Get(key)])
    assert not done.succeeded
    assert isinstance(done.responses[0], tuple)
    assert done.responses[0][0].value == b"theirs"
    assert done.revision == store.range(prefix)[0]


def test_all_compares_must_hold(store: Store, prefix: str) -> None:
    a, b = prefix + "a", prefix + "b"
    revision = store.put(a, b"")
    both = [Compare(a, "mod", "=", revision), Compare(b, "create", "=", 0)]
    assert store.txn(both, [Put(b, b"")]).succeeded
    assert not store.txn(both, [Put(a, b"")]).succeeded
    assert store.txn([], []).succeeded


@pytest.mark.parametrize(
    ("target", "offset", "op", "holds"),
    [
        (target, offset, op, holds)
        for target in ("create", "mod", "version", "lease")
        for offset, op, holds in (
            (0, "=", True),
            (1, "=", False),
            (0, "!=", False),
            (1, "!=", True),
            (1, "<", True),
            (0, "<", False),
            (-1, ">", True),
            (0, ">", False),
        )
    ],
)
def test_compare_of_numbers(store: Store, prefix: str, target: Target, offset: int, op: Operator, holds: bool) -> None:
    key, lease = prefix + "a", store.grant(60)
    created = store.put(key, b"1")
    changed = store.put(key, b"2", lease)
    actual = {"create": created, "mod": changed, "version": 2, "lease": lease}[target]
    assert store.txn([Compare(key, target, op, actual + offset)], []).succeeded is holds
    store.revoke(lease)


@pytest.mark.parametrize(
    ("op", "value", "holds"),
    [
        ("=", b"m", True),
        ("=", b"n", False),
        ("!=", b"n", True),
        ("<", b"n", True),
        (">", b"a", True),
        (">", b"n", False),
    ],
)
def test_compare_of_values(store: Store, prefix: str, op: Operator, value: bytes, holds: bool) -> None:
    store.put(prefix + "a", b"m")
    assert store.txn([Compare(prefix + "a", "value", op, value)], []).succeeded is holds


@pytest.mark.parametrize(
    ("compare", "holds"),
    [
        (Compare("a", "create", "=", 0), True),
        (Compare("a", "version", "=", 0), True),
        (Compare("a", "mod", ">", 0), False),
        (Compare("a", "lease", "=", 0), True),
        (Compare("a", "value", "=", b""), False),
        (Compare("a", "value", "!=", b"x"), False),
    ],
)
def test_compare_of_an_absent_key(store: Store, prefix: str, compare: Compare, holds: bool) -> None:
    absent = Compare(prefix + compare.key, compare.target, compare.op, compare.value)
    assert store.txn([absent], []).succeeded is holds


@pytest.mark.parametrize(("target", "value"), [("value", 1), ("mod", b"1")])
def test_a_compare_of_the_wrong_type_is_refused(target: Target, value: int | bytes) -> None:
    with pytest.raises(StoreError):
        Compare("a", target, "=", value)


@pytest.mark.parametrize(
    "ops",
    [
        [Put("a", b"1"), Put("a", b"2")],
        [Put("a", b"1"), Delete("a")],
        [Delete("", prefix=True), Put("a", b"1")],
    ],
)
def test_a_txn_may_not_write_a_key_twice(store: Store, prefix: str, ops: list[Op]) -> None:
    placed: list[Op] = [
        Put(prefix + op.key, op.value) if isinstance(op, Put) else Delete(prefix + op.key, op.prefix)  # type: ignore[union-attr]
        for op in ops
    ]
    with pytest.raises(StoreError):
        store.txn((), placed)
    assert store.range(prefix)[1] == ()


def test_revoke_deletes_the_leases_keys_at_once(store: Store, prefix: str) -> None:
    lease, other = store.grant(60), store.grant(60)
    for name in ("a", "b"):
        store.put(prefix + name, b"", lease)
    store.put(prefix + "c", b"", other)
    store.put(prefix + "b", b"moved", other)
    revision = store.put(prefix + "d", b"", lease)
    store.revoke(lease)
    assert [kv.key for kv in store.range(prefix)[1]] == [prefix + "b", prefix + "c"]
    assert store.range(prefix)[0] == revision + 1
    store.revoke(other)


def test_a_put_without_the_lease_frees_the_key_from_it(store: Store, prefix: str) -> None:
    lease = store.grant(60)
    store.put(prefix + "a", b"", lease)
    store.put(prefix + "a", b"kept")
    store.revoke(lease)
    kv = store.get(prefix + "a")
    assert kv is not None
    assert kv.lease == 0


def test_an_ended_lease_is_lost_to_all_but_revoke(store: Store, prefix: str) -> None:
    lease = store.grant(60)
    store.revoke(lease)
    store.revoke(lease)
    with pytest.raises(LeaseLost):
        store.keepalive(lease)
    with pytest.raises(LeaseLost):
        store.put(prefix + "a", b"", lease)
    with pytest.raises(LeaseLost):
        store.txn((), [Put(prefix + "b", b""), Put(prefix + "a", b"", lease)])
    assert store.range(prefix)[1] == ()


def test_leases_are_renewed_together_and_those_that_have_ended_are_missing(store: Store) -> None:
    kept, ended, other = store.grant(60), store.grant(60), store.grant(90)
    store.revoke(ended)
    assert store.keepalives([kept, ended, other]) == {kept: 60.0, other: 90.0}
    assert store.keepalives([]) == {}
    for lease in (kept, other):
        store.revoke(lease)


def test_ttls_are_whole_seconds_rounded_up(store: Store) -> None:
    lease = store.grant(59.5)
    assert store.keepalive(lease) == 60.0
    assert store.lifetime_s(lease) == 60.0
    store.revoke(lease)
    assert (store.lifetime_s(lease), store.lifetime_s(0)) == (0.0, 0.0)


def test_a_lease_expires_unless_it_is_renewed(store: Store, prefix: str) -> None:
    kept, left = store.grant(3), store.grant(3)
    store.put(prefix + "kept", b"", kept)
    store.put(prefix + "left", b"", left)

    def only_one() -> bool:
        store.keepalive(kept)
        return [kv.key for kv in store.range(prefix)[1]] == [prefix + "kept"]

    eventually(only_one, 30.0, "the lease that is not renewed to expire", interval_s=0.2)
    with pytest.raises(LeaseLost):
        store.keepalive(left)
    store.revoke(kept)


def test_compaction_keeps_what_is_current(store: Store, prefix: str) -> None:
    store.put(prefix + "a", b"1")
    revision = store.put(prefix + "a", b"2")
    store.compact(revision)
    kv = store.get(prefix + "a")
    assert kv is not None
    assert kv.value == b"2"
    with pytest.raises(StoreCompacted):
        store.compact(revision)
    with pytest.raises(StoreError):
        store.compact(revision + 1000)
