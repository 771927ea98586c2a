"""Records a run: the changes in the store, reads by clients of the store, injected faults, and what API clients saw.

One thread watches the cluster's prefix through the whole run, outages included. After a compaction it lists instead,
and the record names the gap. A few clients with connections of their own read the membership all the time; their reads
are compared with the order of revisions later (`chaos/check/reads.py`).
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from chaos.faults.base import Injected
from chaos.record.record import (
    Answered,
    AnyLine,
    Changed,
    Expected,
    Gap,
    Happened,
    Header,
    InjectedFault,
    Read,
    Verified,
    write,
)
from chaos.target.cluster import Cluster
from chaos.workload.history import RequestRecord
from membership.base.errors import SchemaError, StoreCompacted, StoreReplaced, StoreUnavailable, WaitTimeout
from membership.base.events import Event
from membership.store.interface import Get, KeyValue, Response, Store, WatchBatch
from membership.store.keys import Keys

READERS = 3
READS_PER_S = 20.0  # of all readers together
NEXT_S = 0.5  # one wait for the watch; a stop is noticed this late at most
PAUSE_S = 0.1  # after the store did not answer
DRAIN_S = 5.0  # at the end, for the watch to deliver all that was written
JOIN_S = 15.0  # a thread may have to wait for the store's timeout

_KEPT: dict[str, tuple[str, ...]] = {
    "config": (), "desired": (), "pause": (), "rebalance": (), "view": (), "next": (), "leader": (),
    "incarnation": (), "assign": (), "exits": (), "ops": (),
    "engine": ("node", "pid"),
    "engine-status": ("token", "epoch", "masked", "uncovered"),
    "agents": ("node", "pid", "started", "leaving"),
    "ranks": ("rank", "node", "incarnation", "pid", "state", "started", "prepared_revision", "failed_revision",
              "prepare_error", "engine_token"),
}  # fmt: skip
"""First part of a key's name -> the fields of its record that are kept; (): all. Other keys are kept without value."""


class _Envelope(msgspec.Struct):
    data: dict[str, Any]


class _OfView(msgspec.Struct):
    epoch: int


class _ViewEnvelope(msgspec.Struct):
    data: _OfView


_plain = msgspec.json.Decoder(_Envelope)
_view = msgspec.json.Decoder(_ViewEnvelope)


def kept(name: str, value: bytes) -> dict[str, Any] | None:
    """The fields to keep of a key's value. `name`: the key without the cluster's prefix."""
    fields = _KEPT.get(name.partition("/")[0])
    if fields is None:
        return None
    try:
        data = _plain.decode(value).data
    except msgspec.MsgspecError as error:
        raise SchemaError(f"the record at {name} cannot be read: {error}") from error
    return {field: data[field] for field in fields if field in data} if fields else data


class Observed:
    """What was observed of a prefix so far, and the lines for it. Pure: it is given the store's answers."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self.known: dict[str, int] = {}  # key -> mod revision
        self.revision = 0

    def listed(self, revision: int, items: Iterable[KeyValue], at: float, why: str = "") -> list[AnyLine]:
        """The lines for a listing: all changes since the last known state. `why`: the reason for listing again."""
        lines: list[AnyLine] = [Gap(at=at, after=self.revision, until=revision, why=why)] if self.revision else []
        there = {kv.key: kv for kv in items}
        new = [kv for kv in there.values() if self.known.get(kv.key) != kv.mod_revision]
        lines += [self._put(kv, at, listed=True) for kv in sorted(new, key=lambda kv: kv.mod_revision)]
        for key in sorted(self.known.keys() - there.keys()):
            lines.append(Changed(revision=revision, key=key, at=at, deleted=True, listed=True))
        self.known = {key: kv.mod_revision for key, kv in there.items()}
        self.revision = revision
        return lines

    def watched(self, batch: WatchBatch, at: float) -> list[AnyLine]:
        """The lines for a batch of a watch, without known changes (a watch resumes at the last known revision)."""
        lines: list[AnyLine] = []
        for event in batch.events:
            kv = event.kv
            if kv.mod_revision <= self.revision:
                continue
            if event.kind == "delete":
                self.known.pop(kv.key, None)
                lines.append(Changed(revision=kv.mod_revision, key=kv.key, at=at, deleted=True))
            else:
                self.known[kv.key] = kv.mod_revision
                lines.append(self._put(kv, at, listed=False))
        self.revision = max(self.revision, batch.revision)
        return lines

    def has(self, revision: int, items: Iterable[KeyValue]) -> bool:
        """Whether everything in a listing was observed."""
        return self.revision >= revision or self.known == {kv.key: kv.mod_revision for kv in items}

    def _put(self, kv: KeyValue, at: float, *, listed: bool) -> Changed:
        return Changed(
            revision=kv.mod_revision, key=kv.key, at=at, listed=listed, create_revision=kv.create_revision,
            version=kv.version, value=kept(kv.key.removeprefix(self._prefix), kv.value),
        )  # fmt: skip


def look(store: Store, keys: Keys, client: str, clock: Callable[[], float]) -> Read:
    """One linearizable read of the membership: the view, the leader and the staged view as of one revision."""
    began = clock()
    answer = store.txn((), [Get(keys.view), Get(keys.leader), Get(keys.next)])
    ended = clock()
    view, leader, staged = (_only(response) for response in answer.responses)
    return Read(
        client=client, began=began, ended=ended, revision=answer.revision,
        epoch=_epoch(view.value) if view else 0,
        view_revision=view.mod_revision if view else 0,
        leader_revision=leader.create_revision if leader else 0,
        next_revision=staged.mod_revision if staged else 0,
    )  # fmt: skip


def _epoch(value: bytes) -> int:
    try:
        return _view.decode(value).data.epoch
    except msgspec.MsgspecError as error:
        raise SchemaError(f"the record at view cannot be read: {error}") from error


def _only(response: Response) -> KeyValue | None:
    return response[0] if not isinstance(response, int) and response else None


class Recorder:
    """A context manager around a run; then call `lines()` or `write(path)`. Methods may be called from any thread."""

    def __init__(
        self,
        connecting: Callable[[], Store],
        header: Header,
        *,
        events: Callable[[], list[Event]] | None = None,
        readers: int = READERS,
        reads_per_s: float = READS_PER_S,
        clock: Callable[[], float] | None = None,
    ) -> None:
        """`connecting` opens a connection, which the recorder closes; `events`: the cluster's history."""
        self.header = header
        self._connecting, self._events, self._readers = connecting, events, readers
        self._pause_s = readers / reads_per_s
        self._clock = clock or (lambda: header.wall + time.monotonic())
        self._keys = Keys(header.cluster)
        self._observed = Observed(self._keys.prefix)
        self._lock = threading.Condition()
        self._lines: list[AnyLine] = []
        self._faults: dict[Injected, float] = {}  # -> when it was healed
        self._stop, self._stop_reading = threading.Event(), threading.Event()
        self._stores: list[Store] = []
        self._threads: list[threading.Thread] = []
        self._failure: BaseException | None = None
        self.unread = 0  # reads that the store did not answer

    @classmethod
    def of(cls, cluster: Cluster, *, what: str, seed: int, replay: str = "", **options: Any) -> Recorder:
        """The recorder of a serving cluster; call `wait_serving` before."""
        state, address = cluster.client().state(), cluster.state.address()
        header = Header(
            what=what, seed=seed, replay=replay, cluster=address.cluster, started=time.time(),
            wall=time.time() - time.monotonic(), ranks=state.desired.ranks if state.desired else 0,
            model=state.config.served_model_name if state.config else "",
        )  # fmt: skip
        return cls(address.connect, header, events=cluster.events, **options)

    def __enter__(self) -> Recorder:
        try:
            for number in range(self._readers + 1):
                store = self._connecting()
                self._stores.append(store)
                name = f"reader {number}" if number else "watch"
                self._threads.append(threading.Thread(target=self._run, args=(store, name), name=f"recorder {name}"))
            revision, items = self._stores[0].range(self._keys.prefix)
            self._lines += self._observed.listed(revision, items, self._clock())
        except BaseException:
            self._close()
            raise
        for thread in self._threads:
            thread.daemon = True
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        try:
            self._stop_reading.set()
            self._join(self._threads[1:])
            self._drain()
            self._stop.set()
            self._join(self._threads[:1])
        finally:
            self._stop.set()
            self._close()
        if self._events is not None:
            self.happened(self._events())
        if self._failure is not None and kind is None:
            raise self._failure

    # --- lines from the campaign

    def injected(self, fault: Injected) -> None:
        """A fault was seen to happen."""
        with self._lock:
            self._faults[fault] = 0.0

    def healed(self, fault: Injected, at: float | None = None) -> None:
        """It was healed."""
        with self._lock:
            self._faults[fault] = self._clock() if at is None else at

    def expected(self, oracle: Iterable[RequestRecord]) -> None:
        """The fault-free run."""
        self._add(Expected(record=record) for record in oracle)

    def answered(self, requests: Iterable[RequestRecord]) -> None:
        """Requests of the run."""
        self._add(Answered(record=record) for record in requests)

    def happened(self, events: Iterable[Event]) -> None:
        """Events of the cluster's own history, of this run only. Called at the end by itself if `events` was given."""
        self._add(Happened(event=event) for event in events if event.ts >= self.header.started)

    def verified(self, promise: str, ok: bool, said: str) -> None:
        """A promise that the run itself has checked."""
        self._add([Verified(promise=promise, ok=ok, said=said)])

    def lines(self) -> Iterator[AnyLine]:
        """The record so far, the header first."""
        with self._lock:
            lines, faults = list(self._lines), dict(self._faults)
        yield self.header
        yield from (InjectedFault(fault=fault, healed_at=healed_at) for fault, healed_at in faults.items())
        yield from lines

    def write(self, path: Path) -> None:
        """The record as a file."""
        write(path, self.lines())

    def _add(self, lines: Iterable[AnyLine]) -> None:
        with self._lock:
            self._lines += lines
            self._lock.notify_all()

    # --- lines from the store

    def _run(self, store: Store, name: str) -> None:
        try:
            if name == "watch":
                self._watch(store)
            else:
                self._read(store, name)
        except BaseException as error:  # noqa: BLE001 - raised when the run ends
            self._failure = self._failure or error

    def _watch(self, store: Store) -> None:
        """Watch until stopped. As in Mirror, a watch starts at the last known revision, not after it."""
        why = ""
        while not self._stop.is_set():
            try:
                if why:
                    revision, items = store.range(self._keys.prefix)
                    with self._lock:
                        self._add(self._observed.listed(revision, items, self._clock(), why))
                    why = ""
                watch = store.watch(self._keys.prefix, self._observed.revision)
                try:
                    while not self._stop.is_set():
                        batch = watch.next(NEXT_S)
                        if batch is not None:
                            with self._lock:
                                self._add(self._observed.watched(batch, self._clock()))
                finally:
                    watch.close()
            except StoreCompacted as error:
                why = str(error)
            except StoreUnavailable:
                self._stop.wait(PAUSE_S)
            except StoreReplaced as error:  # from now on it is another store's history
                self._add([Gap(at=self._clock(), after=self._observed.revision, why=str(error))])
                return

    def _read(self, store: Store, client: str) -> None:
        """Read at random times until stopped; count the reads that get no answer."""
        chance = random.Random(f"{self.header.seed} {client}")
        while not self._stop_reading.wait(self._pause_s * chance.uniform(0.5, 1.5)):
            try:
                self._add([look(store, self._keys, client, self._clock)])
            except StoreUnavailable:
                self.unread += 1
            except StoreReplaced:
                return

    def _drain(self) -> None:
        """Wait until the watch has delivered everything; record a gap if it does not."""
        if not self._threads[0].is_alive():
            return
        try:
            revision, items = self._stores[0].range(self._keys.prefix)
            with self._lock:
                done = self._lock.wait_for(lambda: self._observed.has(revision, items), timeout=DRAIN_S)
            why = "" if done else f"the watch did not deliver all changes within {DRAIN_S:g} s of the end"
        except (StoreUnavailable, StoreReplaced) as error:
            why = str(error)
        if why:
            self._add([Gap(at=self._clock(), after=self._observed.revision, why=why)])

    def _join(self, threads: Iterable[threading.Thread]) -> None:
        for thread in threads:
            thread.join(JOIN_S)
            if thread.is_alive():
                raise WaitTimeout(f"the {thread.name} did not stop within {JOIN_S:g} s")

    def _close(self) -> None:
        for store in self._stores:
            store.close()
