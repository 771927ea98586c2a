"""A key that one process keeps writing, in order: a write that takes effect late undoes none that came after it.

Where a call's answer does not come, its request may still be on the way: in a connection that is cut, its kernel sends
it again once the network is back, seconds after the client has written something newer by another member of etcd.
"""

from __future__ import annotations

from collections.abc import Sequence

from membership.base.errors import StoreUnavailable
from membership.store.interface import Compare, Get, Op, Put, Store

ATTEMPTS = 4  # the first one may not know what is there; late writes may come between the others


class OrderedKey:
    """Each write holds only if the key is as this process has last known it."""

    def __init__(self, store: Store, key: str) -> None:
        self.key = key
        self._store, self._revision = store, 0

    def put(self, value: bytes, lease: int = 0, fences: Sequence[Compare] = (), more: Sequence[Op] = ()) -> bool:
        """Write it, and `more` with it; False if a fence does not hold. StoreUnavailable: it is unknown, as ever."""
        for _ in range(ATTEMPTS):
            known = Compare(self.key, "mod", "=", self._revision)
            outcome = self._store.txn([*fences, known], [Put(self.key, value, lease), *more], [Get(self.key)])
            if outcome.succeeded:
                self._revision = outcome.revision
                return True
            found = outcome.responses[0]
            seen = found[0].mod_revision if isinstance(found, tuple) and found else 0
            if seen == self._revision:
                return False
            self._revision = seen
        raise StoreUnavailable(
            f"{self.key} was changed {ATTEMPTS} times while we wrote it: another process writes it, too"
        )
