"""What /metrics says of a cluster's past and shape: from events, operations and records, nothing else."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from elastic.gateway.event_metrics import EVICTED
from elastic.gateway.metric_aliases import ALIASES, Alias
from elastic.gateway.metrics import GatewayMetrics
from membership.base.enums import OperationKind
from membership.base.events import EventLog
from membership.store.records import ClusterConfig, ClusterState, EngineRecord, EngineStatus, Operation, Phase, RankExit

pytestmark = pytest.mark.unit

OPERATION = Operation(
    id="op", kind=OperationKind.SCALE, target=6, phase=Phase.DONE,
    phase_times={"proposed": 1.0, "spawning": 1.5, "loading": 2.0, "ready": 4.0, "committed": 4.0, "done": 4.5},
)  # fmt: skip

ENGINE = EngineRecord(node="n", pid=1, address="a", broadcast_handle=b"", mask_handle=b"")


class Link:
    """The engine link as the metrics see it."""

    ready = True
    open_requests = 5

    def token_age_s(self) -> float:
        return 1.5


class World:
    """A history to write, a state to set, and what a scrape then says."""

    def __init__(self, folder: Path) -> None:
        self.now = 100.0
        self.path = folder / "events.jsonl"
        self.log = EventLog(self.path, "test", "c", clock=lambda: self.now)
        self.state = ClusterState(revision=1)
        self.link = Link()
        self.metrics = self.gateway()

    def gateway(self, aliased: str = "") -> GatewayMetrics:
        metrics = GatewayMetrics(lambda: self.state, self.path, "c")
        metrics.follow_load(self.link, aliased)
        return metrics

    def scrape(self, metrics: GatewayMetrics | None = None) -> dict[str, float]:
        """`name{label,label}` -> value, without the prefix."""
        text = (metrics or self.metrics).exposition().decode()
        return {
            sample.name.removeprefix("elastic_ep_") + "".join(f"{{{v}}}" for _, v in sorted(sample.labels.items())): (
                sample.value
            )
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    def view(self, epoch: int, ranks: list[int], trigger: str, *, operation: str = "", took_s: float = 2.0) -> None:
        """Staged, committed `took_s` later, adopted 0.5 s after that."""
        self.log.emit("epoch_staged", epoch=epoch, ranks=ranks, operation=operation)
        self.now += took_s
        self.log.emit("epoch_committed", epoch=epoch, ranks=ranks, operation=operation)
        self.now += 0.5
        self.log.emit("epoch_adopted", epoch=epoch, requests=0, trigger=trigger, committed_ms=500.0)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_a_loss_from_its_first_sign_to_the_last_migrated_request(world: World) -> None:
    world.log.emit("rank_masked", rank=1, source="robust futex", ms=0.5, silent_ms=0.0, requests=3)
    world.log.emit("rank_masked", rank=2, source="deadline", ms=0.0, silent_ms=10_000.0, requests=2)
    world.log.emit("rank_recovered", rank=1, ms=12.0, requests=3)
    world.log.emit("request_moved", rank=0, source=3, request_id="r", tokens=40, ms=5.0)
    found = world.scrape()
    assert found["detection_seconds_sum{robust_futex}"] == pytest.approx(0.0005)
    assert found["detection_seconds_sum{deadline}"] == pytest.approx(10.0)
    assert (found["recovery_seconds_count"], found["recovery_seconds_sum"]) == (1, pytest.approx(0.012))
    assert (found["requests_migrated_total{replayed}"], found["requests_migrated_total{copied}"]) == (5, 1)


def test_who_was_given_up_alive_is_counted_once(world: World) -> None:
    world.log.emit("rank_masked", rank=1, incarnation=7, source="stopped", ms=0.5, silent_ms=400.0, requests=0)
    world.log.emit("rank_died", rank=1, incarnation=7, detected_by="heartbeat")
    world.log.emit("rank_masked", rank=2, incarnation=8, source="pidfd", ms=0.5, silent_ms=0.0, requests=0)
    world.log.emit("rank_died", rank=2, incarnation=8, detected_by="pidfd")
    world.log.emit("rank_died", rank=3, incarnation=9, detected_by="heartbeat")
    world.log.emit("leader_left", fenced=False)
    world.log.emit("engine_stood_down", token=3)
    world.log.emit("engine_rekeyed", token=4)  # which is no fencing
    found = world.scrape()
    assert (found["fenced_total{rank}"], found["fenced_total{engine}"]) == (2, 1)
    assert "fenced_total{controller}" not in found
    world.log.emit("leader_left", fenced=True)
    assert world.scrape()["fenced_total{controller}"] == 1


def test_links_that_were_cut_are_counted(world: World) -> None:
    assert world.scrape()["link_cuts_total"] == 0
    world.log.emit("link_lost", rank=1, peer=2, node="a", peer_node="b")
    world.log.emit("link_back", rank=1, peer=2, node="a", peer_node="b")
    assert world.scrape()["link_cuts_total"] == 1


def test_changes_of_membership_by_what_caused_them(world: World) -> None:
    world.view(1, [0, 1, 2], "start", took_s=1.0)
    world.view(2, [0, 2], "loss")
    world.view(3, [0, 1, 2], "join", took_s=3.0)
    world.view(4, [0, 1, 2, 3], "scale", operation="op")
    world.state = ClusterState(revision=2, operations={"op": OPERATION, "on": Operation(id="on", kind="x", target=1)})
    found = world.scrape()
    for trigger, loading_s in (("start", 1.0), ("loss", 2.0), ("join", 3.0)):
        assert found[f"reconfiguration_seconds_sum{{loading}}{{{trigger}}}"] == pytest.approx(loading_s)
        assert found[f"reconfiguration_seconds_sum{{committed}}{{{trigger}}}"] == pytest.approx(0.5)
    phases = {"proposed": 0.5, "spawning": 0.5, "loading": 2.0, "ready": 0.0, "committed": 0.5}
    for phase, took_s in phases.items():
        assert found[f"reconfiguration_seconds_sum{{{phase}}}{{scale}}"] == pytest.approx(took_s)
        assert found[f"reconfiguration_seconds_count{{{phase}}}{{scale}}"] == 1
    assert found["reconfigurations_total{committed}"] == 4
    assert not [name for name in found if "{x}" in name], "an operation under way is not counted"


def test_who_came_and_went_is_known_of_successive_epochs_only(world: World) -> None:
    for epoch, ranks in ((41, [0, 1, 2]), (42, [0, 1]), (50, [0]), (51, [0, 3])):  # 43 to 49: another controller's
        world.log.emit("epoch_staged", epoch=epoch, ranks=ranks, operation="")
        world.log.emit("epoch_committed", epoch=epoch, ranks=ranks, operation="", weight_bytes=epoch)
    found = world.scrape()
    said = {name: value for name, value in found.items() if name.startswith("weight_bytes_moved_total")}
    assert said == {
        f"weight_bytes_moved_total{{{trigger}}}": value
        for trigger, value in (("unknown", 91), ("loss", 42), ("join", 51))
    }


def test_only_the_last_of_those_given_up_are_remembered(world: World) -> None:
    def died(*incarnations: int) -> float:
        for incarnation in incarnations:
            world.log.emit("rank_died", rank=1, incarnation=incarnation, detected_by="heartbeat")
        return world.scrape()["fenced_total{rank}"]

    assert died(*range(EVICTED + 1), EVICTED) == EVICTED + 1
    assert died(0) == EVICTED + 2, "forgotten: nobody says it of a rank so much later"


def test_what_did_not_come_to_be(world: World) -> None:
    world.log.emit("epoch_unstaged", operation="")
    world.log.emit("epoch_unstaged", operation="op")
    world.log.emit("operation_phase", operation="op", phase="aborted")
    world.log.emit("operation_phase", operation="op2", phase="loading")
    found = world.scrape()
    assert (found["reconfigurations_total{withdrawn}"], found["reconfigurations_total{aborted}"]) == (1, 1)


def test_a_successor_that_takes_up_the_epoch_again_ends_no_change(world: World) -> None:
    world.view(1, [0, 1], "start")
    world.now += 100.0
    world.log.emit("epoch_adopted", epoch=1, requests=0, trigger=None, committed_ms=2.0)
    assert world.scrape()["reconfiguration_seconds_count{committed}{start}"] == 1


def test_each_event_counts_once_for_each_gateway_and_other_clusters_never(world: World) -> None:
    world.view(1, [0, 1], "start")
    world.log.emit("rank_recovered", cluster="other", rank=1, ms=1.0)
    world.scrape()
    world.log.emit("rank_recovered", rank=1, ms=12.0)
    assert world.scrape() == world.scrape()
    found, other = world.scrape(), world.scrape(world.gateway())
    same = [name for name in found if not name.endswith("_created") and "_created{" not in name]
    assert {name: found[name] for name in same} == {name: other[name] for name in same}
    assert found["recovery_seconds_count"] == found["reconfigurations_total{committed}"] == 1


def test_counters_that_others_keep(world: World) -> None:
    world.state = ClusterState(
        revision=2,
        engine_status=EngineStatus(
            token=1,
            epoch=1,
            steps={"ok": 40, "coverage_lost": 2},
            running=7,
            waiting=2,
            shed={"requests": 3, "wait": 1},
        ),
        exits={3: RankExit(rank=3, incarnation=4, reason="killed", at=1.0, restarts=2)},
    )
    found = world.scrape()
    assert (found["steps_total{ok}"], found["steps_total{coverage_lost}"]) == (40, 2)
    assert found["worker_restarts_total{3}"] == 2
    assert (found["requests_running"], found["requests_waiting"]) == (7, 2)
    assert (found["requests_shed_total{requests}"], found["requests_shed_total{wait}"]) == (3, 1)


def test_what_is_promised_is_there_from_the_start(world: World) -> None:
    names = {family.name for family in text_string_to_metric_families(world.metrics.exposition().decode())}
    promised = (
        "membership_epoch ranks expert_live_replicas_min experts_uncovered reconfiguration_seconds reconfigurations"
        " detection_seconds recovery_seconds requests_migrated stream_max_gap_seconds steps tokens"
        " time_to_first_token_seconds inter_token_seconds worker_restarts"
        " requests_running requests_waiting requests_shed"
    )
    assert {f"elastic_ep_{name}" for name in promised.split()} <= names


def test_memory_of_the_weight_stores(world: World) -> None:
    for node, size in (("a", 10), ("b", 5), ("a", 20), ("b", 0)):
        world.log.emit("weights_held", node=node, entries=1, bytes=size)
    found = world.scrape()
    assert (found["weight_store_bytes{a}"], found["weight_store_bytes{b}"]) == (20, 0)


def test_the_load_is_the_engines_while_there_is_one(world: World) -> None:
    status = EngineStatus(token=1, epoch=1, running=3, waiting=2, kv_usage=0.25, preemptions=7)
    world.state = ClusterState(revision=2, engine_status=status)
    found = world.scrape()
    names = ("requests_running", "requests_waiting", "requests_open", "kv_usage_ratio", "preemptions_total")
    assert [found[name] for name in names] == [3, 2, 5, 0.25, 7]
    assert found["last_token_age_seconds"] == 1.5
    world.link.ready = False
    found = world.scrape()
    assert (found["requests_running"], found["requests_waiting"], "kv_usage_ratio" in found) == (0, 5, False)


def test_a_request_is_counted_once_by_its_end(world: World) -> None:
    clock = iter([10.0, 11.0, 13.0])
    metrics = GatewayMetrics(lambda: world.state, world.path, "c", clock=lambda: next(clock))
    timer = metrics.timer()
    timer.tokens(2, queued_s=0.5)
    timer.end("stop")
    timer.end("abort")
    found = world.scrape(metrics)
    ends = {reason: found[f"requests_finished_total{{{reason}}}"] for reason in ("stop", "length", "abort", "error")}
    assert ends == {"stop": 1, "length": 0, "abort": 0, "error": 0}
    assert (found["request_seconds_sum"], found["queue_seconds_sum"], found["queue_seconds_count"]) == (3, 0.5, 1)


def test_an_alias_has_the_values_and_labels_of_vllm(world: World) -> None:
    world.metrics = world.gateway("org/m")
    world.metrics.timer().end("length")
    world.state = ClusterState(revision=2, engine_status=EngineStatus(token=1, epoch=1, waiting=2))
    samples = {
        (sample.name, sample.labels.get("finished_reason"), sample.labels.get("le")): (sample.value, sample.labels)
        for family in text_string_to_metric_families(world.metrics.exposition().decode())
        for sample in family.samples
    }
    named = {"model_name": "org/m", "engine": "0"}
    assert samples["vllm:num_requests_waiting", None, None] == (2, named)
    assert samples["vllm:request_success_total", "length", None] == (1, named | {"finished_reason": "length"})
    assert samples["vllm:e2e_request_latency_seconds_bucket", None, "+Inf"] == (1, named | {"le": "+Inf"})
    assert samples["elastic_ep_requests_waiting", None, None] == (2, {})


def test_each_alias_is_of_a_metric_that_there_is(world: World) -> None:
    world.metrics = world.gateway("m")
    status = EngineStatus(token=1, epoch=1, queried_tokens=4, cached_tokens=2)
    config = ClusterConfig(cluster="c", model="/m", served_model_name="m", moe_layers=1, experts=1)
    world.state = ClusterState(revision=2, engine=ENGINE, engine_status=status, config=config)
    shown = {family.name for family in text_string_to_metric_families(world.metrics.exposition().decode())}
    assert {f"vllm:{alias.name}" for alias in ALIASES} - shown == set()


@pytest.mark.parametrize("alias", ALIASES, ids=lambda alias: alias.name)
def test_the_page_of_the_api_has_each_alias_beside_its_metric(alias: Alias) -> None:
    lines = Path("docs/API.md").read_text(encoding="utf-8").partition("## Metrics\n")[2].splitlines()
    rows = [line.split("|")[1:4] for line in lines if line.startswith("| `")]
    theirs = [theirs for ours, _, theirs in rows if re.search(rf"`{alias.ours}(_total)?[`{{]", ours)]
    assert len(theirs) == 1
    same = alias.name == alias.ours and theirs[0].strip() == "the same"
    assert same or re.search(rf"`{alias.name}(_total)?[`{{]", theirs[0])
