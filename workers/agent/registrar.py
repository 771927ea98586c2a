"""Keeps this node's keys in the store: the agent's own record, its ranks' records, their exits.

Level-triggered: the agent says what should be there; one thread compares that with what it has written, and renews the
leases. So an outage needs no special case: what could not be written is written after it, under new leases if the old
ones have expired. The agent itself never waits for the store.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import structlog

from membership.base import failpoints
from membership.base.attempts import Attempts
from membership.base.errors import LeaseLost, StoreError, StoreReplaced, StoreUnavailable, WaitTimeout
from membership.base.rank_id import RankId
from membership.store.codec import decode, encode
from membership.store.interface import Compare, Delete, Op, Put, Store
from membership.store.keys import Keys
from membership.store.records import AgentRecord, Assignment, RankExit, Record

RETRY_S = 0.25
CLOSE_TIMEOUT_S = 10.0

log = structlog.get_logger(__name__)


@dataclass
class _Entry:
    """One key under its own lease. `value` None: it must go."""

    value: bytes | None
    renewing: bool = True
    written: bytes | None = None  # None: unknown, or nothing
    lease: int = 0
    renew_at: float = 0.0


class Registrar:
    """Owns the leases of one node's keys and the thread that writes them."""

    def __init__(
        self,
        store: Store,
        keys: Keys,
        ttl_s: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        background: bool = True,
    ) -> None:
        self._store = store
        self._keys = keys
        self._ttl_s = ttl_s
        self._clock = clock
        self._changed = threading.Condition()
        self._entries: dict[str, _Entry] = {}
        self._exits: dict[str, bytes] = {}
        self._notes: dict[str, tuple[str, bytes]] = {}
        self._dirty = False
        self._closing = False
        self._reachable = True
        self._attempts = Attempts("registrar", clock=clock)
        self._thread = threading.Thread(target=self._run, name="registrar", daemon=True)
        if background:
            self._thread.start()

    def publish(self, key: str, record: Record) -> None:
        """Keep `record` at `key`, under a lease of its own, from now on."""
        value = encode(record)
        with self._changed:
            entry = self._entries.get(key)
            if entry is None:
                self._entries[key] = _Entry(value)
            elif entry.value == value:
                return
            else:
                entry.value = value
            self._touch()

    def set_renewing(self, rank: RankId, renewing: bool) -> None:
        """Whether the rank's lease may be renewed: not while its heartbeat stands still."""
        with self._changed:
            entry = self._entries.get(self._keys.rank(*rank))
            if entry is not None and entry.renewing != renewing:
                entry.renewing, entry.renew_at = renewing, 0.0
                self._touch()

    def withdraw(self, rank: RankId, exit_record: RankExit | None = None) -> None:
        """Take the rank's record away at once; `exit_record` appears in the same transaction."""
        with self._changed:
            key = self._keys.rank(*rank)
            entry = self._entries.setdefault(key, _Entry(None))
            entry.value = None
            if exit_record is not None:
                self.record_exit(exit_record)
            self._touch()

    def record_exit(self, exit_record: RankExit) -> None:
        """Write, or correct, the exit of a rank slot."""
        with self._changed:
            self._exits[self._keys.exit(exit_record.rank)] = encode(exit_record)
            self._touch()

    def note(self, key: str, record: Record, beside: str) -> None:
        """Write `record` once, under the lease of the record at `beside`. If the store is away it is not written."""
        with self._changed:
            if self._reachable:
                self._notes[key] = (beside, encode(record))
                self._touch()

    @property
    def settled(self) -> bool:
        """Whether the store holds what it should, as far as we know."""
        with self._changed:
            return not self._dirty and not self._exits

    def close(self) -> None:
        """Give up all leases, and with them the records. What an unreachable store keeps runs out by itself."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread.ident is not None:
            self._thread.join(CLOSE_TIMEOUT_S)
        if self._thread.is_alive():
            raise WaitTimeout("the registrar did not stop: a store call outlived its deadline")
        try:
            for entry in self._entries.values():
                if entry.lease:
                    self._store.revoke(entry.lease)
        except StoreError as error:
            log.warning("leases_left_to_expire", error=str(error))

    def unassign(self, agent: AgentRecord) -> None:
        """Take the assignment of an agent that has ended its ranks. One that is left says that they may still run."""
        key = self._keys.assign(agent.node)
        try:
            found = self._store.get(key)
            if found is not None and decode(found.value, Assignment).agent_started == agent.started:
                noted = Put(self._keys.unassigned, agent.node.encode())  # a key that is gone has no revision
                self._store.txn([Compare(key, "mod", "=", found.mod_revision)], [Delete(key), noted])
        except StoreError as error:
            log.warning("assignment_left", error=str(error))

    def _touch(self) -> None:
        self._dirty = True
        self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._dirty or self._closing, self._idle_s())
                if self._closing:
                    return
            try:
                done = self._attempts.run(self.turn)
            except StoreReplaced as replaced:  # the ranks run on
                log.error("records_frozen", error=str(replaced), hint=replaced.hint)
                return
            if not done:
                with self._changed:
                    self._dirty = True
            if not done or not self._reachable:
                with self._changed:
                    self._changed.wait_for(lambda: self._closing, RETRY_S)

    def turn(self) -> bool:
        """Write and renew what is due; whether the store could be reached. StoreReplaced ends it."""
        with self._changed:
            self._dirty = False
        try:
            self._sync()
        except StoreUnavailable as error:
            self._note_reachable(False, str(error))
            with self._changed:
                self._dirty = True
            return False
        self._note_reachable(True)
        return True

    def _note_reachable(self, reachable: bool, error: str = "") -> None:
        if reachable != self._reachable:
            self._reachable = reachable
            log.info("store_back") if reachable else log.warning("store_unreachable", error=error)

    @property
    def due(self) -> bool:
        """Whether a turn would find something to do."""
        return self._dirty or self._idle_s() <= 0

    def _idle_s(self) -> float:
        now = self._clock()
        due = (max(0.0, e.renew_at - now) for e in self._entries.values() if e.renewing and e.value is not None)
        return min(due, default=self._ttl_s)

    def _sync(self) -> None:
        with self._changed:
            entries = [(key, entry, entry.value) for key, entry in self._entries.items()]
        going = [(key, entry) for key, entry, value in entries if value is None]
        if going or self._exits:
            self._sync_ends(going)
        for key, entry, value in entries:
            if value is not None and entry.renewing:
                self._sync_entry(key, entry, value)
        with self._changed:
            notes, self._notes = self._notes, {}
        for key, (beside, noted) in notes.items():
            self._write_note(key, self._entries.get(beside), noted)

    def _sync_ends(self, going: list[tuple[str, _Entry]]) -> None:
        """Records that must go, and exits, in one transaction: where a record is missing, the reason is there."""
        with self._changed:
            exits = dict(self._exits)
        operations: list[Op] = [Delete(key) for key, _ in going]
        operations += [Put(key, value) for key, value in exits.items()]
        failpoints.hit("agent.before.withdraw")
        self._store.txn((), operations)
        with self._changed:
            for key, value in exits.items():
                if self._exits.get(key) == value:
                    del self._exits[key]
            for key, entry in going:
                if entry.value is None:
                    del self._entries[key]
        for _, entry in going:
            if entry.lease:
                self._store.revoke(entry.lease)

    def _sync_entry(self, key: str, entry: _Entry, value: bytes) -> None:
        try:
            if not entry.lease:
                begun = self._clock()
                failpoints.hit("agent.before.grant")
                entry.lease = self._store.grant(self._ttl_s)
                entry.renew_at = begun + self._ttl_s / 3
            elif self._clock() >= entry.renew_at:
                begun = self._clock()
                self._store.keepalive(entry.lease, timeout_s=self._ttl_s / 3)
                entry.renew_at = begun + self._ttl_s / 3
            if entry.written != value:
                entry.written = None  # if the write's outcome stays unknown, it is written again
                failpoints.hit("agent.before.publish")
                self._store.put(key, value, entry.lease)
                entry.written = value
        except LeaseLost:
            self._lease_lost(key, entry)

    def _write_note(self, key: str, beside: _Entry | None, value: bytes) -> None:
        if beside is None or not beside.lease:
            return
        try:
            self._store.put(key, value, beside.lease)
        except LeaseLost:
            self._lease_lost(key, beside)

    def _lease_lost(self, key: str, entry: _Entry) -> None:
        log.warning("lease_lost", key=key)
        entry.lease, entry.written, entry.renew_at = 0, None, 0.0
        with self._changed:
            self._dirty = True
