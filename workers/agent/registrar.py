"""Keeps this node's keys in the store: the agent's own record, its ranks' records, their exits.

Level-triggered: the agent says what should be there; one thread compares that with what it has written, and renews the
leases. So an outage needs no special case: what could not be written is written after it, under new leases if the old
ones have expired. The agent itself never waits for the store. A key is changed only if what stands there is what we
know: a write whose answer did not come may take effect after newer ones (`membership/store/ordered.py`), and must not
undo them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import structlog

from membership.base import failpoints
from membership.base.attempts import Attempts
from membership.base.errors import (
    Fenced,
    LeaseLost,
    SchemaError,
    StoreError,
    StoreReplaced,
    StoreUnavailable,
    WaitTimeout,
)
from membership.base.rank_id import RankId
from membership.store.codec import decode, encode
from membership.store.interface import Compare, Delete, Get, KeyValue, Put, Store
from membership.store.keys import Keys
from membership.store.ordered import ATTEMPTS
from membership.store.pace import fitting_ttl_s, renewal_timeout_s
from membership.store.records import AgentRecord, Assignment, RankExit, Record

RETRY_S = 0.25
CLOSE_TIMEOUT_S = 10.0
MOST_KEYS = 100  # of one transaction: etcd takes 128 by default
MOST_RENEWALS = 64  # in one exchange
MOST_SLOTS = 40  # whose ends are in one: each has an exit, and one or two records that go
MOST_BYTES = 1 << 19  # of one, if it has several keys: etcd takes 1.5 MB

log = structlog.get_logger(__name__)


@dataclass
class _Entry:
    """One key under its own lease. `value` None: it must go."""

    value: bytes | None
    renewing: bool = True
    written: bytes | None = None  # None: unknown, or nothing
    lease: int = 0
    ttl_s: float = 0.0  # of the lease
    renew_at: float = 0.0


class _Wanted(NamedTuple):
    """What is to stand at a key now."""

    key: str
    entry: _Entry
    value: bytes


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
        self._revisions: dict[str, int] = {}  # of keys, as far as we know; what is not in it is not there
        self._notes: dict[str, tuple[str, bytes]] = {}
        self._dirty = False
        self._closing = False
        self._reachable = True
        self._unanswered = 0  # renewals, since one that was answered
        self._fenced = ""  # why nothing is written any more
        self._attempts = Attempts("registrar", clock=clock)
        self._thread = threading.Thread(target=self._run, name="registrar", daemon=True)
        if background:
            self._thread.start()

    def publish(self, key: str, record: Record) -> None:
        """Keep `record` at `key`, under a lease of its own, from now on."""
        self.publish_all({key: record})

    def publish_all(self, records: Mapping[str, Record]) -> None:
        """The same for several records, which are written together."""
        values = {key: encode(record) for key, record in records.items()}
        with self._changed:
            for key, value in values.items():
                entry = self._entries.setdefault(key, _Entry(None))
                if entry.value != value:
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

    def require_name(self) -> None:
        """Fenced once another agent of this node's name stands in the store: its pod was started anew while we were cut
        off, say. Each would take the other's assignment away."""
        if self._fenced:
            raise Fenced(self._fenced, hint="give each host its own --node name")

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
            if self._fenced:
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
        except Fenced as error:
            self._fenced = str(error)
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
        return not self._fenced and (self._dirty or self._idle_s() <= 0)

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
        kept = [_Wanted(key, entry, value) for key, entry, value in entries if value is not None and entry.renewing]
        self._hold_leases(kept)
        self._fit(kept)
        changed = [each for each in kept if each.entry.lease and each.entry.written != each.value]
        for together in _portions(changed):
            self._write(together)
        with self._changed:
            notes, self._notes = self._notes, {}
        for key, (beside, noted) in notes.items():
            self._write_note(key, self._entries.get(beside), noted)

    def _sync_ends(self, going: list[tuple[str, _Entry]]) -> None:
        """Records that must go, and exits, in one transaction: where a record is missing, the reason is there.

        Of very many ranks, some at a time.
        """
        with self._changed:
            exits = dict(self._exits)
        operations: list[Put | Delete] = [Delete(key) for key, _ in going]
        operations += [Put(key, value) for key, value in exits.items()]
        slots = sorted({self._slot(op) for op in operations})
        for start in range(0, len(slots), MOST_SLOTS):
            some = set(slots[start : start + MOST_SLOTS])
            failpoints.hit("agent.before.withdraw")
            self._end([op for op in operations if self._slot(op) in some])
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

    def _end(self, together: list[Put | Delete]) -> None:
        """Do these in one transaction, but leave a later rank's exit: its host may have been quicker than we."""
        for _ in range(ATTEMPTS):
            found = self._change(together) if together else None
            if found is None:
                return
            together = [op for op in together if isinstance(op, Delete) or not _later(found[op.key], op.value)]
        raise StoreUnavailable(
            f"{', '.join(op.key for op in together)}: changed {ATTEMPTS} times while we wrote: others write there, too"
        )

    def _change(self, together: Sequence[Put | Delete]) -> dict[str, KeyValue | None] | None:
        """Do these over what we know, and return None. If a key is not as we knew it, none is done: what there is."""
        known = [Compare(op.key, "mod", "=", self._revisions.get(op.key, 0)) for op in together]
        outcome = self._store.txn(known, together, [Get(op.key) for op in together])
        if outcome.succeeded:
            for op in together:
                self._know(op.key, outcome.revision if isinstance(op, Put) else 0)
            return None
        found: dict[str, KeyValue | None] = {}
        for op, there in zip(together, outcome.responses, strict=True):
            found[op.key] = kv = there[0] if isinstance(there, tuple) and there else None
            self._know(op.key, kv.mod_revision if kv is not None else 0)
        return found

    def _know(self, key: str, revision: int) -> None:
        if revision:
            self._revisions[key] = revision
        else:
            self._revisions.pop(key, None)

    def _slot(self, op: Put | Delete) -> str:
        """The rank slot that a record, or an exit, is of."""
        return op.key.removeprefix(self._keys.prefix).split("/")[1]

    def _hold_leases(self, kept: list[_Wanted]) -> None:
        """A lease for each record. Those that there are do not wait for those of many new ranks."""
        self._renew(kept)
        for _, entry, _ in kept:
            if not entry.lease:
                failpoints.hit("agent.before.grant")
                self._grant(entry, fitting_ttl_s(self._ttl_s, self._store.pace_s))
                self._renew(kept)

    def _grant(self, entry: _Entry, ttl_s: float) -> None:
        begun = self._clock()
        entry.lease, entry.ttl_s = self._store.grant(ttl_s), ttl_s
        entry.renew_at = begun + ttl_s / 3

    def _fit(self, kept: list[_Wanted]) -> None:
        """Give one record, of those that need it, a lease that fits the store's pace. It is written again under that;
        the one before ends without a key. One at a time: none is without a renewal while the others' are granted.
        """
        fits = {each.key: fitting_ttl_s(self._ttl_s, self._store.pace_s, each.entry.ttl_s) for each in kept}
        unfit = [each for each in kept if each.entry.lease and each.entry.ttl_s != fits[each.key]]
        if unfit:
            entry = unfit[0].entry
            self._grant(entry, fits[unfit[0].key])
            entry.written = None
            with self._changed:
                self._dirty = True

    def _renew(self, kept: list[_Wanted]) -> None:
        """Once a lease is due, all are renewed, in few exchanges per agent, however many ranks.

        Where the store is slow, an exchange that is cut short counts for none of its leases: so one has a bound,
        and those that have waited longest go first.
        """
        now = self._clock()
        held = sorted((each for each in kept if each.entry.lease and each.entry.renewing), key=_renewed_at)
        if not held or now < held[0].entry.renew_at:
            return
        for first in range(0, len(held), MOST_RENEWALS):
            some, begun = held[first : first + MOST_RENEWALS], self._clock()
            timeout_s = renewal_timeout_s(min(each.entry.ttl_s for each in some), self._unanswered)
            self._unanswered += 1
            left = self._store.keepalives([each.entry.lease for each in some], timeout_s=timeout_s)
            self._unanswered = 0
            for key, entry, _ in some:
                entry.renew_at = begun + entry.ttl_s / 3
                if entry.lease not in left:
                    self._lease_lost(key, entry)

    def _write(self, together: list[_Wanted]) -> None:
        """Write what has changed in one transaction: each of them wakes all readers of the cluster."""
        for _, entry, _ in together:
            entry.written = None  # if the write's outcome stays unknown, it is written again
        failpoints.hit("agent.before.publish")
        try:
            if not (self._put(together) or self._put(together)):  # the first one learns what stands there
                with self._changed:
                    self._dirty = True
        except LeaseLost:
            if len(together) == 1:
                self._lease_lost(together[0].key, together[0].entry)
            else:  # find out whose
                for each in together:
                    self._write([each])

    def _put(self, together: list[_Wanted]) -> bool:
        """Write them over what we know of. If one is not as we knew it, none is written, and we know it then; Fenced if
        that is another agent of our name."""
        found = self._change([Put(key, value, entry.lease) for key, entry, value in together])
        if found is not None:
            for key, _, value in together:
                if key.startswith(self._keys.agents):
                    _require_ours(found[key], value)
            return False
        for _, entry, value in together:
            entry.written = value
        return True

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


def _require_ours(found: KeyValue | None, ours: bytes) -> None:
    """Fenced if what stands there is another agent's record. What cannot be read is none."""
    try:
        there, mine = decode(found.value, AgentRecord) if found is not None else None, decode(ours, AgentRecord)
    except SchemaError as error:
        log.warning("unreadable_agent", error=str(error))
        return
    if there is not None and there.started != mine.started:
        where = f" at {there.address}" if there.address else ""
        raise Fenced(f"another agent (pid {there.pid}{where}) runs as node {mine.node} by now")


def _later(found: KeyValue | None, ours: bytes) -> bool:
    """Whether this exit is of a later rank of the slot than ours. What cannot be read is no exit."""
    try:
        return found is not None and decode(found.value, RankExit).incarnation > decode(ours, RankExit).incarnation
    except SchemaError as error:
        log.warning("unreadable_exit", error=str(error))
        return False


def _renewed_at(each: _Wanted) -> float:
    return each.entry.renew_at


def _portions(changed: Iterable[_Wanted]) -> Iterator[list[_Wanted]]:
    """What one transaction takes at a time."""
    portion: list[_Wanted] = []
    size = 0
    for each in changed:
        if portion and (len(portion) == MOST_KEYS or size + len(each.value) > MOST_BYTES):
            yield portion
            portion, size = [], 0
        portion.append(each)
        size += len(each.value)
    if portion:
        yield portion
