"""A store from which a network may keep writes for a while: they take effect later, sent again by a kernel."""

from __future__ import annotations

from collections.abc import Sequence

from membership.base.errors import StoreUnavailable
from membership.store.in_memory import MemoryStore
from membership.store.interface import Compare, Op, Put, TxnResult


class LateStore(MemoryStore):
    """While `cut`, writes are on their way, and their callers get no answer."""

    cut = False

    def __init__(self) -> None:
        super().__init__()
        self.under_way: list[tuple[Sequence[Compare], Sequence[Op], Sequence[Op]]] = []

    def txn(self, compares: Sequence[Compare], success: Sequence[Op], failure: Sequence[Op] = ()) -> TxnResult:
        if self.cut:
            self.under_way.append((compares, success, failure))
            raise StoreUnavailable("no answer")
        return super().txn(compares, success, failure)

    def put(self, key: str, value: bytes, lease: int = 0) -> int:
        if self.cut:
            self.under_way.append(((), (Put(key, value, lease),), ()))
            raise StoreUnavailable("no answer")
        return super().put(key, value, lease)

    def arrive(self) -> None:
        """What was on its way takes effect."""
        while self.under_way:
            super().txn(*self.under_way.pop(0))
