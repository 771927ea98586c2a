"""Minutes of a gateway's /metrics, scraped on a clock of our own while a cluster is as a test says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from msgspec.structs import replace
from prometheus_client.parser import text_string_to_metric_families

from elastic.gateway.key_ring import KeyRing
from elastic.gateway.metrics import GatewayMetrics
from membership.base.events import EventLog
from membership.store.records import (
    ClusterState,
    EngineStatus,
    ExpertLoad,
    GpuUse,
    HostLink,
    Operation,
    Phase,
    RankExit,
)
from tests.support.cluster_states import healthy
from tests.support.promql import Labels

EVERY_S = 60.0
SCRAPED = {"namespace": "default", "job": "demo", "pod": "demo-gateway-1", "instance": "10.0.0.7:8000"}  # by Prometheus
UP = HostLink(links=4, up=4, rtt_s=0.001, sent_bytes=1)
GPU = GpuUse(index=0, uuid="GPU-0", free=60 << 30, total=139 << 30, graphs=4, exchange="cuda")


class Link:
    """The engine link as the metrics see it."""

    ready = True
    open_requests = 5
    age_s = 0.2

    def token_age_s(self) -> float:
        return self.age_s


class Recorder:
    """A gateway whose cluster is well and busy; a test changes that before each scrape."""

    def __init__(self, folder: Path) -> None:
        self.now = 0.0
        self.link = Link()
        self.state: ClusterState | None = busy()
        self.log = EventLog(folder / "events.jsonl", "test", "c", clock=lambda: self.now)
        self.keys = KeyRing(["secret"])
        self.metrics = GatewayMetrics(
            lambda: self.state or ClusterState(revision=1), folder / "events.jsonl", "c", self.keys, lambda: self.now
        )
        self.metrics.follow_load(self.link)
        self.recording: dict[tuple[str, Labels], list[tuple[float, float]]] = {}

    def record(self, minutes: int, change: Callable[[Recorder], None]) -> list[float]:
        """When it was scraped; `change` is called before each scrape."""
        times = []
        for _ in range(minutes):
            self.now += EVERY_S
            change(self)
            times.append(self.now)
            if self.state is not None:
                self._scrape()
        return times

    def answer(self, reason: str = "stop", first_token_s: float = 0.2) -> None:
        """Serve a request of two tokens."""
        began, timer = self.now, self.metrics.timer()
        for wait_s in (first_token_s, 0.05):
            self.now += wait_s
            timer.tokens(1)
        timer.end(reason)
        self.now = began

    def status(self, **changes: object) -> None:
        """Change what the engine says of itself."""
        assert self.state is not None
        assert self.state.engine_status is not None
        self.state = replace(self.state, engine_status=replace(self.state.engine_status, **changes))

    def past(self) -> None:
        """Something of each kind that metrics count has happened, and a request with a key was answered."""
        self.log.emit("rank_masked", rank=1, incarnation=1, source="stopped", ms=0.5, silent_ms=0.0, requests=3)
        self.log.emit("rank_recovered", rank=1, ms=12.0, requests=3)
        for kind in ("epoch_staged", "epoch_committed", "epoch_adopted"):
            adopted = {"requests": 0, "trigger": "start", "committed_ms": 5.0}
            self.log.emit(kind, epoch=1, ranks=[0], weight_bytes=1, **adopted)
        self.log.emit("weights_held", node="n", bytes=1)
        account = self.keys.account("Bearer secret")
        assert account is not None
        account.answers[200] += 1

    def _scrape(self) -> None:
        for family in text_string_to_metric_families(self.metrics.exposition().decode()):
            for sample in family.samples:
                labels = frozenset((sample.labels | SCRAPED).items())
                self.recording.setdefault((sample.name, labels), []).append((self.now, sample.value))


def busy() -> ClusterState:
    """Two hosts with links and GPUs, requests, loads, deaths long ago, and a scale that is done."""
    state = healthy()
    assert state.config is not None
    status = EngineStatus(
        token=state.engine_token, epoch=3, running=5, kv_usage=0.6, shed={"wait": 3}, steps={"ok": 100}, links={"m": UP}
    )
    done = Operation(id="op", kind="scale", target=4, phase=Phase.DONE, phase_times={"proposed": 1.0, "done": 2.0})
    return replace(
        state,
        config=replace(state.config, prefix_cache=True),
        engine_status=status,
        heartbeats={
            node: replace(beats, links={"m": UP}, gpus=dict.fromkeys(beats.beats, GPU))
            for node, beats in state.heartbeats.items()
        },
        expert_load=ExpertLoad(at=0.0, loads=((16, 16, 16, 16), (16, 16, 16, 16))),
        operations={"op": done},
        exits={3: RankExit(rank=3, incarnation=1, reason="killed", at=1.0, restarts=2)},
    )


def names(recording: Mapping[tuple[str, Labels], object]) -> dict[str, set[str]]:
    """Each sample's name with the labels that it has."""
    found: dict[str, set[str]] = {}
    for name, labels in recording:
        found.setdefault(name, set()).update(label for label, _ in labels)
    return found
