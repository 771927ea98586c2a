"""The protocol of the store, which etcd and its fake implement: keys with revisions, transactions, leases, watches.

Two implementations pass the same contract suite: `EtcdStore` (etcd.py) and `MemoryStore` (in_memory.py). Each call has
a deadline. `StoreUnavailable` from a write means *unknown*: read back, never retry blindly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

import msgspec

from membership.base.errors import StoreError

Target = Literal["create", "mod", "version", "value", "lease"]
Operator = Literal["=", "!=", "<", ">"]


class KeyValue(msgspec.Struct, frozen=True, kw_only=True):
    """One key as of some revision. In a delete event only `key` and `mod_revision` mean anything."""

    key: str
    value: bytes = b""
    create_revision: int = 0
    mod_revision: int = 0
    version: int = 0
    lease: int = 0


class Compare(msgspec.Struct, frozen=True):
    """A condition of a transaction. An absent key has 0 for every number; no comparison with its value holds."""

    key: str
    target: Target
    op: Operator
    value: int | bytes

    def __post_init__(self) -> None:
        if isinstance(self.value, bytes) != (self.target == "value"):
            raise StoreError(f"cannot compare the {self.target} of {self.key} with {self.value!r}")


class Put(msgspec.Struct, frozen=True):
    """Write `value`, under `lease` if that is not 0. Its response is the revision written."""

    key: str
    value: bytes
    lease: int = 0


class Delete(msgspec.Struct, frozen=True):
    """Delete a key, or all keys that begin with it. Its response is how many there were."""

    key: str
    prefix: bool = False


class Get(msgspec.Struct, frozen=True):
    """Read a key, or all keys that begin with it, in key order. Its response is what there was."""

    key: str
    prefix: bool = False


Op = Put | Delete | Get
Response = tuple[KeyValue, ...] | int


class TxnResult(msgspec.Struct, frozen=True):
    """What a transaction did: one response per operation of the branch that ran, all at one revision."""

    succeeded: bool
    revision: int
    responses: tuple[Response, ...]


class WatchEvent(msgspec.Struct, frozen=True):
    """One change."""

    kind: Literal["put", "delete"]
    kv: KeyValue


class WatchBatch(msgspec.Struct, frozen=True):
    """Changes in order, whole revisions only. To go on after it, watch from `revision + 1`."""

    revision: int
    events: tuple[WatchEvent, ...]


class Watch(Protocol):
    """A running watch. It never resumes by itself: its owner (Mirror) lists and watches again."""

    def next(self, timeout_s: float) -> WatchBatch | None:
        """Return the next changes, or None if none came in time. Raise StoreUnavailable once the watch has broken."""
        ...

    def close(self) -> None:
        """End it; a `next` in another thread returns at once with StoreUnavailable."""
        ...


class Store(Protocol):
    """All calls may raise StoreUnavailable (no answer in time) or another StoreError (refused: did not happen).

    StoreReplaced, once raised, is raised by each later call: the store lost data that this client has seen.
    """

    @property
    def seen(self) -> str:
        """Id and latest seen revision of this store, for a process that connects later; see Provenance."""
        ...

    @property
    def pace_s(self) -> float:
        """How long it takes to answer, of late; 0 before the first answer. See `Pace`."""
        ...

    def get(self, key: str) -> KeyValue | None:
        """Return the key, or None."""
        ...

    def range(self, prefix: str) -> tuple[int, tuple[KeyValue, ...]]:
        """Return the store's revision, and every key that begins with `prefix` as of it, in key order."""
        ...

    def put(self, key: str, value: bytes, lease: int = 0) -> int:
        """Write; return the revision. LeaseLost if there is no such lease."""
        ...

    def delete(self, key: str) -> bool:
        """Delete; return whether there was such a key."""
        ...

    def txn(self, compares: Sequence[Compare], success: Sequence[Op], failure: Sequence[Op] = ()) -> TxnResult:
        """Run `success` if all `compares` hold, else `failure`: atomically, as one revision, in the order given."""
        ...

    def grant(self, ttl_s: float) -> int:
        """Create a lease of at least `ttl_s` (whole seconds, rounded up); return its id."""
        ...

    def keepalive(self, lease: int, timeout_s: float | None = None) -> float:
        """Renew it; return its time to live, which counts from before this call. LeaseLost if it has ended."""
        ...

    def keepalives(self, leases: Sequence[int], timeout_s: float | None = None) -> dict[int, float]:
        """Renew all of these in one exchange; return the time to live of each that has not ended."""
        ...

    def lifetime_s(self, lease: int) -> float:
        """How long it was granted for, which is how long it lasts from a renewal on; 0 if it has ended."""
        ...

    def revoke(self, lease: int) -> None:
        """End it, and delete its keys. Ending a lease that has ended already is no error."""
        ...

    def watch(self, prefix: str, start_revision: int) -> Watch:
        """Watch keys that begin with `prefix`, from `start_revision` on (0: from now).

        Raise StoreCompacted, here or from `next`, if that revision is gone or the store's history ends before it.
        """
        ...

    def compact(self, revision: int) -> None:
        """Forget what was overwritten before `revision`."""
        ...

    def close(self) -> None:
        """Release connections and end all watches. Leases are left to expire."""
        ...


def key_bytes(key: str) -> bytes:
    """Return the key as stored. Surrogate escapes let a key hold any byte."""
    return key.encode("utf-8", "surrogateescape")


def key_text(key: bytes) -> str:
    """Inverse of `key_bytes`."""
    return key.decode("utf-8", "surrogateescape")


def prefix_end(prefix: bytes) -> bytes:
    """Return the first key after all keys that begin with `prefix`; a zero byte (etcd's "to the end") if none does."""
    head = prefix.rstrip(b"\xff")
    return head[:-1] + bytes([head[-1] + 1]) if head else b"\0"
