"""A store in this process's memory with etcd's semantics: for unit tests and for simulation under a virtual clock.

It passes the same contract suite as etcd. `outage` makes it unreachable, like a stopped or partitioned etcd; `wipe` and
`restore` do what an operator may do to etcd's data directory.
"""

from __future__ import annotations

import math
import secrets
import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count

import msgspec

from membership.base.errors import LeaseLost, StoreCompacted, StoreError, StoreUnavailable
from membership.store.interface import (
    Compare,
    Delete,
    Get,
    KeyValue,
    Op,
    Put,
    Response,
    TxnResult,
    WatchBatch,
    WatchEvent,
    key_bytes,
)
from membership.store.provenance import Provenance


@dataclass
class _Lease:
    ttl_s: float
    expires_at: float
    keys: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Backup:
    """A copy of the data directory."""

    store_id: int
    revision: int
    items: dict[str, KeyValue]


class MemoryStore:
    """The fake. Threads may share one; they then see each other as clients of one etcd would."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._store_id = secrets.randbits(63)
        self._provenance = Provenance()
        self._changed = threading.Condition()
        self._items: dict[str, KeyValue] = {}
        self._history: list[WatchBatch] = []  # one batch per revision
        self._leases: dict[int, _Lease] = {}
        self._lease_ids = count(1)
        self._revision = 1
        self._compacted = 0
        self._breaks = 0  # number of outages and restarts: older watches are broken
        self._outage = False
        self._closed = False

    @property
    def outage(self) -> bool:
        """Whether the store is unreachable. Setting it breaks all watches; leases go on expiring meanwhile."""
        return self._outage

    @outage.setter
    def outage(self, down: bool) -> None:
        with self._changed:
            self._outage = down
            self._breaks += down
            self._changed.notify_all()

    @property
    def seen(self) -> str:
        return self._provenance.seen

    @property
    def pace_s(self) -> float:
        return 0.0

    def backup(self) -> Backup:
        """Copy the data. Leases are not copied: their keys have none after a restore."""
        with self._changed:
            items = {key: msgspec.structs.replace(kv, lease=0) for key, kv in self._items.items()}
            return Backup(self._store_id, self._revision, items)

    def restore(self, backup: Backup) -> None:
        """Restart with older data. Watches break, as at any restart."""
        with self._changed:
            self._store_id, self._revision, self._items = backup.store_id, backup.revision, dict(backup.items)
            self._history, self._leases, self._compacted = [], {}, backup.revision
            self._breaks += 1
            self._changed.notify_all()

    def wipe(self) -> None:
        """Restart with no data."""
        self.restore(Backup(secrets.randbits(63), 1, {}))

    def get(self, key: str) -> KeyValue | None:
        with self._changed:
            self._enter()
            return self._items.get(key)

    def range(self, prefix: str) -> tuple[int, tuple[KeyValue, ...]]:
        with self._changed:
            self._enter()
            return self._revision, self._read(Get(prefix, prefix=True))

    def put(self, key: str, value: bytes, lease: int = 0) -> int:
        return self.txn((), (Put(key, value, lease),)).revision

    def delete(self, key: str) -> bool:
        return bool(self.txn((), (Delete(key),)).responses[0])

    def txn(self, compares: Sequence[Compare], success: Sequence[Op], failure: Sequence[Op] = ()) -> TxnResult:
        with self._changed:
            self._enter()
            for branch in (success, failure):
                _refuse_overlap(branch)
            succeeded = all(self._holds(compare) for compare in compares)
            chosen = success if succeeded else failure
            for op in chosen:
                if isinstance(op, Put) and op.lease and op.lease not in self._leases:
                    raise LeaseLost(f"no lease {op.lease:x} to put {op.key} under")
            responses = self._commit(chosen)
            return TxnResult(succeeded, self._revision, responses)

    def grant(self, ttl_s: float) -> int:
        with self._changed:
            self._enter()
            lease, ttl = next(self._lease_ids), float(max(1, math.ceil(ttl_s)))
            self._leases[lease] = _Lease(ttl, self._clock() + ttl)
            return lease

    def keepalive(self, lease: int, timeout_s: float | None = None) -> float:
        renewed = self.keepalives([lease], timeout_s)
        if not renewed:
            raise LeaseLost(f"lease {lease:x} has ended")
        return renewed[lease]

    def keepalives(self, leases: Sequence[int], timeout_s: float | None = None) -> dict[int, float]:
        with self._changed:
            self._enter()
            found = {lease: self._leases[lease] for lease in leases if lease in self._leases}
            for each in found.values():
                each.expires_at = self._clock() + each.ttl_s
            return {lease: each.ttl_s for lease, each in found.items()}

    def lifetime_s(self, lease: int) -> float:
        """See Store."""
        with self._changed:
            self._enter()
            return self._leases[lease].ttl_s if lease in self._leases else 0.0

    def revoke(self, lease: int) -> None:
        with self._changed:
            self._enter()
            self._end(lease)

    def watch(self, prefix: str, start_revision: int) -> MemoryWatch:
        with self._changed:
            self._enter()
            if start_revision > self._revision + 1:
                raise StoreCompacted(f"revision {start_revision} is beyond the store's history ({self._revision})")
            return MemoryWatch(self, prefix, start_revision or self._revision + 1)

    def compact(self, revision: int) -> None:
        with self._changed:
            self._enter()
            if revision > self._revision:
                raise StoreError(f"cannot compact at {revision}: the store is at {self._revision}")
            if revision <= self._compacted:
                raise StoreCompacted(f"revision {revision} has been compacted already")
            self._compacted = revision
            del self._history[: self._index(revision)]
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _enter(self) -> None:
        now = self._clock()
        for lease in [lease for lease, held in self._leases.items() if held.expires_at <= now]:
            self._end(lease)
        if self._outage or self._closed:
            raise StoreUnavailable("memory store: " + ("closed" if self._closed else "outage"))
        self._provenance.observed(self._store_id, self._revision, self._provenance.floor())

    def _end(self, lease: int) -> None:
        held = self._leases.get(lease)
        if held is not None:
            self._commit([Delete(key) for key in sorted(held.keys, key=key_bytes)])
            del self._leases[lease]

    def _holds(self, compare: Compare) -> bool:
        kv = self._items.get(compare.key)
        if isinstance(compare.value, bytes):
            return kv is not None and _compare(kv.value, compare.op, compare.value)
        kv = kv or KeyValue(key=compare.key)
        numbers = {"create": kv.create_revision, "mod": kv.mod_revision, "version": kv.version, "lease": kv.lease}
        return _compare(numbers[compare.target], compare.op, compare.value)

    def _read(self, op: Get | Delete) -> tuple[KeyValue, ...]:
        if not op.prefix:
            return (self._items[op.key],) if op.key in self._items else ()
        keys = [key for key in self._items if key_bytes(key).startswith(key_bytes(op.key))]
        return tuple(self._items[key] for key in sorted(keys, key=key_bytes))

    def _commit(self, ops: Sequence[Op]) -> tuple[Response, ...]:
        revision, events, responses = self._revision + 1, list[WatchEvent](), list[Response]()
        for op in ops:
            if isinstance(op, Get):
                responses.append(self._read(op))
            elif isinstance(op, Put):
                events.append(WatchEvent("put", self._put(op, revision)))
                responses.append(revision)
            else:
                gone = self._read(op)
                for kv in gone:
                    del self._items[kv.key]
                    self._detach(kv)
                    events.append(WatchEvent("delete", KeyValue(key=kv.key, mod_revision=revision)))
                responses.append(len(gone))
        if events:
            self._revision = revision
            self._provenance.observed(self._store_id, revision)
            self._history.append(WatchBatch(revision, tuple(events)))
            self._changed.notify_all()
        return tuple(responses)

    def _put(self, op: Put, revision: int) -> KeyValue:
        old = self._items.get(op.key)
        if old is not None:
            self._detach(old)
        if op.lease:
            self._leases[op.lease].keys.add(op.key)
        self._items[op.key] = KeyValue(
            key=op.key,
            value=op.value,
            create_revision=old.create_revision if old else revision,
            mod_revision=revision,
            version=old.version + 1 if old else 1,
            lease=op.lease,
        )
        return self._items[op.key]

    def _detach(self, kv: KeyValue) -> None:
        if kv.lease in self._leases:
            self._leases[kv.lease].keys.discard(kv.key)

    def _index(self, revision: int) -> int:
        return bisect_left(self._history, revision, key=lambda batch: batch.revision)


class MemoryWatch:
    """A watch on a MemoryStore."""

    def __init__(self, store: MemoryStore, prefix: str, start_revision: int) -> None:
        self._store = store
        self._prefix = key_bytes(prefix)
        self._next = start_revision
        self._breaks = store._breaks
        self._closed = False

    def next(self, timeout_s: float) -> WatchBatch | None:
        store = self._store
        deadline = time.monotonic() + timeout_s
        with store._changed:
            while True:
                self._check()
                if batch := self._pending():
                    return batch
                left = deadline - time.monotonic()
                if left <= 0:
                    return None
                expiries = [lease.expires_at - store._clock() for lease in store._leases.values()]
                store._changed.wait(max(0.001, min([left, *expiries])))

    def close(self) -> None:
        with self._store._changed:
            self._closed = True
            self._store._changed.notify_all()

    def _check(self) -> None:
        if self._closed or self._breaks != self._store._breaks:
            raise StoreUnavailable("the watch " + ("was closed" if self._closed else "broke: memory store outage"))
        self._store._enter()
        if self._next < self._store._compacted:
            raise StoreCompacted(f"revision {self._next} was compacted (at {self._store._compacted})")

    def _pending(self) -> WatchBatch | None:
        batches = self._store._history[self._store._index(self._next) :]
        events = tuple(e for b in batches for e in b.events if key_bytes(e.kv.key).startswith(self._prefix))
        self._next = self._store._revision + 1
        return WatchBatch(events[-1].kv.mod_revision, events) if events else None


def _compare(left: bytes | int, op: str, right: bytes | int) -> bool:
    if op == "=":
        return left == right
    if op == "!=":
        return left != right
    return left < right if op == "<" else left > right  # type: ignore[operator]  # both bytes or both int


def _refuse_overlap(ops: Sequence[Op]) -> None:
    """As etcd does: within one branch no key may be put twice, nor put and deleted."""
    puts = [op.key for op in ops if isinstance(op, Put)]
    deletes = [op for op in ops if isinstance(op, Delete)]
    clash = len(puts) != len(set(puts)) or any(
        key_bytes(key).startswith(key_bytes(op.key)) if op.prefix else key == op.key for key in puts for op in deletes
    )
    if clash:
        raise StoreError("a transaction writes the same key twice")
