"""Metrics of what has happened to the cluster: read off its event history and its operations, at each scrape.

All gateways that read the history count the same, also after a restart: the history is the only memory.
Each duration was measured where it happened (engine, controller); nothing is timed here. Roles with state directories
of their own write separate histories: there each gateway counts its own, and the other roles' probes say theirs
(`RoleMetrics`). The sum is the cluster's.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from membership.base.enums import DetectedBy, Trigger
from membership.base.events import Event, Tail
from membership.store.records import Operation

PREFIX = "elastic_ep_"
MAX_READS = 64  # per scrape, of 64 KiB each: the gateway streams tokens meanwhile; the rest comes with the next scrape
ROLE_READS = 8  # of a role: an engine's steps wait for what is read here, some 3 ms for each
EVICTED = 1024  # remembered, since engine and agent may both say it of one rank, within the time that its end takes
SHORT_S = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 10.0, 30.0)
ALIVE = (DetectedBy.STOPPED, DetectedBy.HUNG, DetectedBy.DEADLINE)  # signs of a rank that is not dead
LONG_S = (0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class HistoryMetrics:
    """Counters and histograms in `registry`, brought up to date by `update`."""

    def __init__(
        self, prefix: str, path: Path, cluster: str, registry: CollectorRegistry, reads: int = MAX_READS
    ) -> None:
        self._tail = Tail(path)
        self._reads = reads
        self._cluster = cluster
        self._staged: dict[int, float] = {}  # epoch -> when it was (last) staged
        self._last: tuple[int, set[int]] = (0, set())  # the last committed epoch and its members
        self._evicted: deque[int] = deque(maxlen=EVICTED)  # the last incarnations that were given up alive
        self._counted: set[str] = set()  # operations that were counted

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(prefix + name, text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(prefix + name, text, labels, buckets=buckets, registry=registry)

        self._phases = histogram(
            "reconfiguration_seconds",
            "How long each phase of a change of membership took (ready and proposed: of operations only).",
            LONG_S,
            "phase",
            "trigger",
        )
        self._changes = counter(
            "reconfigurations",
            "Changes of membership: committed epochs, aborted operations, and views withdrawn before their commit.",
            "outcome",
        )
        self._detection = histogram(
            "detection_seconds",
            "From the first sign of a rank's loss (the kernel's notice, its queue's end, or the question that it left"
            " unanswered) to its mask. What passed before the first sign is not known.",
            SHORT_S,
            "source",
        )
        self._recovery = histogram(
            "recovery_seconds",
            "From the first sign of a rank's loss until every request that lived on it had a new token.",
            SHORT_S,
        )
        self._migrated = counter(
            "requests_migrated",
            "Requests that went on on another rank: with their KV blocks copied, or computed again there.",
            "how",
        )
        for how in ("copied", "replayed"):
            self._migrated.labels(how)
        self._fenced = counter(
            "fenced", "Replaced or evicted processes that were still running and were kept from acting.", "what"
        )
        self._cuts = counter("link_cuts", "Links between ranks that were cut while the engine reached both, by side.")
        self._taken = counter(
            "weight_bytes_moved",
            "Expert weights that members had to get before a view was committed, by what the view was for.",
            "trigger",
        )
        text = "Memory of each host's weight store, counted once."
        self._weights = Gauge(prefix + "weight_store_bytes", text, ["node"], registry=registry)

    def update(self, operations: Iterable[Operation] = ()) -> None:
        """Take in what is new."""
        for _ in range(self._reads):
            events = self._tail.read()
            if events is None:
                break
            for event in events:
                if event.cluster == self._cluster:
                    self._take(event)
        ended = {each.id: each for each in operations if not each.active}
        for operation in (ended[each] for each in ended.keys() - self._counted):
            self._take_operation(operation)
        self._counted = set(ended)

    def _take(self, event: Event) -> None:
        self._take_change(event)
        self._take_loss(event)

    def _take_change(self, event: Event) -> None:
        """Changes of membership, and the requests that they moved."""
        fields = event.fields
        if event.kind == "epoch_staged":
            self._staged[event.epoch] = event.ts
        elif event.kind == "epoch_committed":
            self._take_commit(event)
        elif event.kind == "epoch_adopted":
            self._migrated.labels("replayed").inc(fields.get("requests", 0))
            if fields.get("trigger") not in (None, Trigger.SCALE):
                self._phases.labels("committed", fields["trigger"]).observe(fields["committed_ms"] / 1000)
        elif event.kind == "request_moved":
            self._migrated.labels("copied").inc()
        elif event.kind == "epoch_unstaged" and not fields.get("operation"):
            self._changes.labels("withdrawn").inc()
        elif event.kind == "operation_phase" and fields.get("phase") == "aborted":
            self._changes.labels("aborted").inc()
        elif event.kind == "weights_held":
            self._weights.labels(fields["node"]).set(fields["bytes"])

    def _take_loss(self, event: Event) -> None:
        """Losses of ranks and roles."""
        fields = event.fields
        if event.kind == "rank_masked":
            self._migrated.labels("replayed").inc(fields.get("requests", 0))
            took_ms = fields["ms"] + fields.get("silent_ms", 0.0)
            self._take_eviction(event, alive=fields["source"] in ALIVE)
            self._detection.labels(fields["source"].replace(" ", "_")).observe(took_ms / 1000)
        elif event.kind == "rank_died":
            self._take_eviction(event, alive=fields.get("detected_by") == DetectedBy.HEARTBEAT)
        elif event.kind == "link_lost":
            self._cuts.inc()
        elif event.kind == "engine_stood_down":
            self._fenced.labels("engine").inc()
        elif event.kind == "leader_left" and fields.get("fenced"):
            self._fenced.labels("controller").inc()
        elif event.kind == "rank_recovered":
            self._recovery.observe(fields["ms"] / 1000)

    def _take_eviction(self, event: Event, *, alive: bool) -> None:
        """A rank was given up without being dead: by the engine, by its agent, or by one after the other."""
        incarnation = event.fields.get("incarnation", 0)
        if alive and incarnation not in self._evicted:
            self._evicted.append(incarnation)
            self._fenced.labels("rank").inc()

    def _take_commit(self, event: Event) -> None:
        (last, before), members = self._last, set(event.fields["ranks"])
        self._last = event.epoch, members
        self._changes.labels("committed").inc()
        if event.fields.get("operation"):
            trigger = Trigger.SCALE  # its phases are in its record
        elif event.epoch == 1:
            trigger = Trigger.START
        else:  # another controller's history may have the one before
            trigger = Trigger.between(before, members) if event.epoch == last + 1 else Trigger.UNKNOWN
        self._taken.labels(trigger).inc(event.fields.get("weight_bytes", 0))
        staged = self._staged.get(event.epoch)
        if staged is not None and trigger != Trigger.SCALE:
            self._phases.labels("loading", trigger).observe(max(0.0, event.ts - staged))
        self._staged.clear()

    def _take_operation(self, operation: Operation) -> None:
        entered = sorted(operation.phase_times.items(), key=lambda entry: entry[1])
        for (phase, since), (_, until) in pairwise(entered):
            self._phases.labels(phase, operation.kind).observe(until - since)


class RoleMetrics:
    """The same as a role without an API says them at its probe; operations are the gateways', from their records."""

    def __init__(self, history: Path, cluster: str) -> None:
        self._registry = CollectorRegistry()
        self._history = HistoryMetrics(PREFIX, history, cluster, self._registry, ROLE_READS)
        self._lock = threading.Lock()  # each request has a thread of its own

    def exposition(self) -> bytes:
        """Everything, in Prometheus' text format."""
        with self._lock:
            self._history.update()
            return generate_latest(self._registry)
