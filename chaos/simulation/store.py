"""The simulated store, and each process's client of it, which may be cut off or lose the answers to its writes.

The store is the in-memory fake with leases in virtual time. It notes which process wrote last, for the invariants.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from random import Random
from typing import TypeVar, cast

from chaos.simulation.clock import Clock
from chaos.simulation.network import ETCD, Network
from membership.base.errors import StoreUnavailable
from membership.store.in_memory import MemoryStore
from membership.store.interface import Compare, KeyValue, Op, Response, TxnResult, Watch, WatchBatch
from membership.store.keys import Keys, Reading
from membership.store.mirror import Mirror
from membership.store.records import ClusterState

R = TypeVar("R")


class Unlocked:
    """In place of a lock: there is only one thread."""

    def __enter__(self) -> None:
        """Nothing to take."""

    def __exit__(self, *exc: object) -> None:
        """Nothing to release."""

    def notify_all(self) -> None:
        """Nothing waits."""


class SimStore(MemoryStore):
    """Reports each change and its author."""

    def __init__(self, clock: Clock, keys: Keys) -> None:
        super().__init__(clock)
        self._sim_clock = clock
        self._changed = cast(threading.Condition, Unlocked())
        self.author = ""
        self.slow_s = 0.0  # what each answer takes; a call that would wait for less has none
        self.on_change: Callable[[str, ClusterState, ClusterState], None] = lambda author, before, after: None
        self._keys = keys
        self._reading = Reading()
        self._known = ClusterState(revision=0)
        self._expired_at = -1.0

    @property
    def state(self) -> ClusterState:
        if self._known.revision != self._revision:
            self._reading.list(self._items.values())
            self._known = self._reading.state(self._revision)
        return self._known

    def renew_all(self) -> None:
        """As a new leader of etcd does."""
        for held in self._leases.values():
            held.expires_at = self._clock() + held.ttl_s

    def lapse(self, random: Random) -> str:
        """End a lease. Returns a key that was attached to it, "" if there is no lease."""
        held = [(sorted(lease.keys)[0], number) for number, lease in self._leases.items() if lease.keys]
        if not held:
            return ""
        key, number = random.choice(held)
        self.author = "the store"
        with self._changed:
            self._end(number)
        return key.removeprefix(self._keys.prefix)

    def pass_time(self) -> None:
        """End the leases that have run out."""
        if not self._outage:
            self._enter()

    def _enter(self) -> None:
        """As in the fake, except that leases are checked only once at any time."""
        if self._expired_at != self._sim_clock.now:
            self._expired_at = self._sim_clock.now
            for lease in [lease for lease, held in self._leases.items() if held.expires_at <= self._expired_at]:
                self.author = "the store"
                self._end(lease)
        if self._outage:
            raise StoreUnavailable("the store is out")

    def _commit(self, ops: Sequence[Op]) -> tuple[Response, ...]:
        before, revision = self.state, self._revision
        responses = super()._commit(ops)
        if self._revision != revision:
            self.on_change(self.author, before, self.state)
        return responses


class Client:
    """One process's connection to the store: a Store."""

    def __init__(self, store: SimStore, name: str, random: Random, network: Network, at: str) -> None:
        self._store, self._name, self._random = store, name, random
        self._network, self._at = network, at
        self.cut = False  # from the store, by a fault of this process alone
        self._current = (-1, -1)  # (revision, breaks) of the store when a mirror last took its turn here
        self.doubtful = 0  # number of writes whose answers will be lost, whether they take effect or not

    @property
    def seen(self) -> str:
        return self._store.seen

    @property
    def pace_s(self) -> float:
        return self._store.slow_s

    def get(self, key: str) -> KeyValue | None:
        return self._reach().get(key)

    def range(self, prefix: str) -> tuple[int, tuple[KeyValue, ...]]:
        return self._reach().range(prefix)

    def put(self, key: str, value: bytes, lease: int = 0) -> int:
        return self._write(lambda store: store.put(key, value, lease))

    def delete(self, key: str) -> bool:
        return self._write(lambda store: store.delete(key))

    def txn(self, compares: Sequence[Compare], success: Sequence[Op], failure: Sequence[Op] = ()) -> TxnResult:
        return self._write(lambda store: store.txn(compares, success, failure))

    def grant(self, ttl_s: float) -> int:
        return self._write(lambda store: store.grant(ttl_s))

    def keepalive(self, lease: int, timeout_s: float | None = None) -> float:
        self._in_time(timeout_s)
        return self._write(lambda store: store.keepalive(lease, timeout_s))

    def keepalives(self, leases: Sequence[int], timeout_s: float | None = None) -> dict[int, float]:
        self._in_time(timeout_s)
        return self._write(lambda store: store.keepalives(leases, timeout_s))

    def lifetime_s(self, lease: int) -> float:
        return self._reach().lifetime_s(lease)

    def revoke(self, lease: int) -> None:
        self._write(lambda store: store.revoke(lease))

    def watch(self, prefix: str, start_revision: int) -> Watch:
        return SimWatch(self, self._reach().watch(prefix, start_revision))

    def compact(self, revision: int) -> None:
        self._reach().compact(revision)

    def close(self) -> None:
        """Other processes go on using the store."""

    def follow(self, mirror: Mirror) -> None:
        """Let the process's mirror take a turn, unless nothing has happened since the last one."""
        store = self._store
        store.pass_time()
        current = (store._revision, store._breaks)
        if self.away or store.outage or current != self._current or not mirror.synced:
            mirror.turn()
            self._current = (mirror.state().revision, store._breaks)

    @property
    def away(self) -> bool:
        """Whether it has no answers from the store."""
        return self.cut or (self._at != "" and not self._network.connected(self._at, ETCD))

    @property
    def _doubtful(self) -> bool:
        """Whether the next write may take effect, and is not answered."""
        return self.doubtful > 0 or (
            self._at != "" and self._network.passes(self._at, ETCD) and not self._network.passes(ETCD, self._at)
        )

    def check(self) -> None:
        """StoreUnavailable while it is cut off."""
        if self.away:
            raise StoreUnavailable(f"{self._name} is cut off from the store")

    def _in_time(self, timeout_s: float | None) -> None:
        """StoreUnavailable if a renewal would be given up before its answer."""
        if timeout_s is not None and timeout_s < self._store.slow_s:
            raise StoreUnavailable(f"{self._name} has no answer from the store within {timeout_s:g} s")

    def _reach(self) -> SimStore:
        self.check()
        return self._sent()

    def _sent(self) -> SimStore:
        """What a request reaches, even if its answer does not come."""
        if self.cut or not self._network.passes(self._at, ETCD):
            raise StoreUnavailable(f"{self._name} does not reach the store")
        self._store.pass_time()  # what expires now has no author
        self._store.author = self._name
        return self._store

    def _write(self, write: Callable[[SimStore], R]) -> R:
        if not self._doubtful:
            return write(self._reach())
        self.doubtful = max(0, self.doubtful - 1)
        if self._random.random() < 0.5:
            write(self._sent())
        raise StoreUnavailable(f"{self._name} has no answer from the store")


class SimWatch:
    """A watch that breaks when its process is cut off."""

    def __init__(self, client: Client, watch: Watch) -> None:
        self._client, self._watch = client, watch

    def next(self, timeout_s: float) -> WatchBatch | None:
        self._client.check()
        return self._watch.next(timeout_s)

    def close(self) -> None:
        self._watch.close()
