"""Election of one holder of a key, under a lease. The key's create revision is the fencing token.

Two processes may *believe* that they hold it (one was stopped past its lease), but only one can *act*: each write of
the holder carries `fence()`, which the store checks in the same transaction.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from membership.base.errors import Fenced, LeaseLost, StoreCompacted, StoreUnavailable, WaitTimeout
from membership.store.interface import Compare, Delete, KeyValue, Put, Store
from membership.store.lease import LeaseKeeper

RETRY_S = 0.1


class Election:
    """A candidate for `key`. `value`: the key's value while we hold it, at most as long as the keeper's lease lasts."""

    def __init__(self, store: Store, key: str, value: bytes | Callable[[], bytes], keeper: LeaseKeeper) -> None:
        self._store = store
        self._key = key
        self._value = value
        self._keeper = keeper
        self._token = 0
        self._pause = threading.Event()

    @property
    def token(self) -> int:
        """Our fencing token; 0 before `campaign` and after `resign`."""
        return self._token

    @property
    def held(self) -> bool:
        """Whether we won and the lease still certainly holds. Writes need the fence all the same."""
        return self._token != 0 and self._keeper.alive

    def fence(self) -> Compare:
        """The condition for every transaction that only the holder may make."""
        if not self._token:
            raise Fenced(f"{self._key} is not held")
        return Compare(self._key, "create", "=", self._token)

    def campaign(self, timeout_s: float) -> int:
        """Return our token once we hold the key. WaitTimeout: not within `timeout_s`. LeaseLost: our lease ended first.

        If an attempt is not answered, the key is read back: under our lease it is ours, whenever it was written.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            if not self._keeper.alive:
                raise LeaseLost(f"lease {self._keeper.lease:x} ended while campaigning for {self._key}")
            left = deadline - time.monotonic()
            try:
                holder = self._take() or self._store.get(self._key)
                if holder is not None and holder.lease == self._keeper.lease:
                    self._token = holder.create_revision
                    self._keeper.carry = self._carry
                    return self._token
                reason = f"held by lease {holder.lease:x}" if holder else "free again just now"
                if holder is not None and left > 0:
                    self._wait_gone(holder, min(left, max(RETRY_S, self._keeper.remaining_s)))
            except StoreUnavailable as error:
                reason = str(error)
                self._pause.wait(max(0.0, min(RETRY_S, left)))
            if left <= 0:
                raise WaitTimeout(f"waited {timeout_s:g} s for {self._key}: {reason}")

    def resign(self) -> None:
        """Release the key if it is still ours."""
        if self._token:
            fence, self._token = self.fence(), 0
            self._store.txn([fence], [Delete(self._key)])

    def _carry(self, lease: int) -> None:
        """Hold the key under another lease: it is not created anew, so its token stays. LeaseLost: it is not ours."""
        ours = Compare(self._key, "create", "=", self._token)
        if not self._token or not self._store.txn([ours], [Put(self._key, self._bytes(), lease)]).succeeded:
            raise LeaseLost(f"{self._key} is not held under token {self._token} any more")

    def _bytes(self) -> bytes:
        return self._value() if callable(self._value) else self._value

    def _take(self) -> KeyValue | None:
        """Create the key; None if it exists. Safe to repeat, since it only succeeds if the key is absent."""
        put = Put(self._key, self._bytes(), self._keeper.lease)
        done = self._store.txn([Compare(self._key, "create", "=", 0)], [put])
        if not done.succeeded:
            return None
        return KeyValue(key=self._key, create_revision=done.revision, lease=self._keeper.lease)

    def _wait_gone(self, holder: KeyValue, timeout_s: float) -> None:
        """Wait until `holder` may be gone. The watch starts at its revision: see `Mirror._open` for why."""
        deadline = time.monotonic() + timeout_s
        try:
            watch = self._store.watch(self._key, holder.mod_revision)
        except StoreCompacted:
            return
        try:
            while (left := deadline - time.monotonic()) > 0:
                batch = watch.next(left)
                if batch and any(e.kind == "delete" and e.kv.key == self._key for e in batch.events):
                    return
        except StoreCompacted:
            return
        finally:
            watch.close()
