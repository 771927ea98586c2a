"""A client of a store to whom something happens between its read and its write, or while it waits for an answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from membership.base.errors import StoreCompacted
from membership.store.in_memory import MemoryStore, MemoryWatch
from membership.store.interface import Compare, Op, TxnResult


class Between:
    """Passes everything on to the store. `before_txn`, once set, is called once, just before the next transaction."""

    def __init__(self, store: MemoryStore) -> None:
        self._store = store
        self.before_txn: Callable[[Sequence[Op]], bool] | None = None
        self.outcome: TxnResult | None = None  # of the transaction that it was called for

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def txn(self, compares: Sequence[Compare], success: Sequence[Op], failure: Sequence[Op] = ()) -> TxnResult:
        """See Store. `before_txn` says whether this is the transaction that it waits for."""
        happen = self.before_txn
        if happen is None or not happen(success):
            return self._store.txn(compares, success, failure)
        self.before_txn = None
        self.outcome = self._store.txn(compares, success, failure)
        return self.outcome


class Prompt(MemoryStore):
    """Says at once that it no longer has what a watch begins with, and not only when that is read: both are allowed."""

    def watch(self, prefix: str, start_revision: int) -> MemoryWatch:
        """See Store."""
        if 0 < start_revision < self._compacted:
            raise StoreCompacted(f"revision {start_revision} was compacted (at {self._compacted})")
        return super().watch(prefix, start_revision)


class Slow(MemoryStore):
    """Its answers to questions about leases take their time, on the way there and on the way back."""

    def __init__(self) -> None:
        self.now = 100.0
        self.there_s = self.back_s = 0.0
        super().__init__(lambda: self.now)

    def grant(self, ttl_s: float) -> int:
        """See Store."""
        self.now += self.there_s
        lease = super().grant(ttl_s)
        self.now += self.back_s
        return lease

    def keepalive(self, lease: int, timeout_s: float | None = None) -> float:
        """See Store."""
        self.now += self.there_s
        ttl_s = super().keepalive(lease)
        self.now += self.back_s
        return ttl_s
