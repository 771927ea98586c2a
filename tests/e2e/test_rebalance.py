"""What a death and uneven load make ranks load: nothing at once, a bounded part in the background."""

from __future__ import annotations

import json
import os
import signal
import time
from contextlib import closing
from pathlib import Path

import pytest

from chaos.faults import kill
from chaos.target.cluster import ServedCluster
from chaos.workload.history import compare
from chaos.workload.streams import Workload
from membership.base.events import Event
from membership.placement.survivability import survivability
from membership.store.codec import encode
from membership.store.etcd import connect
from membership.store.keys import Keys
from membership.store.records import ExpertLoad
from tests.e2e.conftest import Serve
from tests.support.helpers import eventually
from tests.support.served import CALM, STEADY, command, fault_free, shows, under_load

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]

RANKS = 4


def commits(cluster: ServedCluster, after: int) -> list[Event]:
    return [e for e in cluster.events() if e.kind == "epoch_committed" and e.epoch > after]


def loss_and_next(cluster: ServedCluster, left: list[int]) -> list[Event]:
    """The first view of these ranks, and the one after it. Before it the load may have been balanced."""

    def found() -> list[Event] | None:
        seen = [e for e in cluster.events() if e.kind == "epoch_committed"]
        first = next((number for number, e in enumerate(seen) if e.fields["ranks"] == left), len(seen))
        return seen[first : first + 2] if len(seen) >= first + 2 else None

    return eventually(found, 90.0, f"a view of {left}, then another", interval_s=0.2) or []


def skew(cluster: ServedCluster, hot: int = 160, cold: int = 8) -> None:
    """Claim that what rank 0 holds is asked for 20 times as often as the rest."""
    state = cluster.client().state()
    assert state.config is not None
    assert state.view is not None
    experts = range(state.config.experts)
    loads = tuple(tuple(hot if e in held else cold for e in experts) for held in state.view.placement[0])
    address = cluster.state.address()
    with closing(connect(list(address.etcd))) as store:
        store.put(Keys(address.cluster).expert_load, encode(ExpertLoad(at=time.time(), loads=loads)))


def test_a_death_moves_no_weights_and_the_rest_comes_in_the_background(serve: Serve, demo_model: Path) -> None:
    cluster = serve(demo_model, RANKS)
    before = cluster.wait_serving(RANKS)
    with under_load(cluster, CALM):
        eventually(lambda: cluster.status()["imbalance"], 60.0, "measured expert load", interval_s=0.1)
        shows(cluster, lambda text: "elastic_ep_expert_imbalance_ratio" in text, "the imbalance")
        kill(before["ranks"][1]["pid"])
        loss, joined = loss_and_next(cluster, [0, 2, 3])
        assert (loss.fields["experts_taken"], loss.fields["weight_bytes"]) == (0, 0)
        assert joined.fields["ranks"] == [0, 1, 2, 3]
        assert joined.fields["weight_bytes"] > 0
        cluster.wait_serving(RANKS)

        def evened() -> Event | None:
            found = [e for e in commits(cluster, joined.epoch) if "load is balanced" in str(staging(cluster, e))]
            if not found:
                skew(cluster)
            return found[0] if found else None

        moved = eventually(evened, 90.0, "a rebalance", interval_s=0.2)
        assert moved is not None
        config = cluster.client().state().config
        assert config is not None
        assert 0 < moved.fields["weight_bytes"] <= config.rebalance_bytes
        assert moved.fields["ranks"] == [0, 1, 2, 3]
        taken = 'elastic_ep_weight_bytes_moved_total{trigger="rebalance"}'
        shows(cluster, lambda text: taken in text, "weights that were moved")
    state = cluster.client().state()
    assert state.config is not None
    assert state.view is not None
    nodes = {m.rank: m.node for m in state.view.members}
    found = survivability(state.view.placement, nodes, state.config.moe_layers, state.config.experts)
    assert (found.min_replicas, found.vital_ranks) == (2, ())


def staging(cluster: ServedCluster, committed: Event) -> object:
    """Why the epoch was staged."""
    staged = [e for e in cluster.events() if e.kind == "epoch_staged" and e.epoch == committed.epoch]
    return staged[-1].fields.get("reason") if staged else None


def test_both_holders_dead_only_orphans_are_loaded_and_every_request_goes_on(serve: Serve, demo_model: Path) -> None:
    cluster = serve(demo_model, RANKS, ("--rebalance-budget", "0"))  # the placement stays as it is read
    before = cluster.wait_serving(RANKS)
    oracle = fault_free(cluster)
    view = cluster.client().state().view
    assert view is not None
    left = [{e for rank in (0, 3) for e in view.placement[rank][layer]} for layer in range(len(view.placement[0]))]
    held = [{e for rank in view.ranks for e in view.placement[rank][layer]} for layer in range(len(left))]
    orphans = sum(len(all_of - kept) for all_of, kept in zip(held, left, strict=True))
    assert orphans, "ranks 1 and 2 alone hold nothing: choose others"
    workload = Workload(cluster.url, cluster.model_name(), STEADY)
    workload.start()
    try:
        eventually(lambda: len(workload.open_streams()) >= 4, 60.0, "four streams under way", interval_s=0.1)
        at = time.time()
        for rank in (1, 2):  # at once: not waiting for the first to be gone
            os.kill(before["ranks"][rank]["pid"], signal.SIGKILL)
        eventually(lambda: [e for e in commits(cluster, view.epoch) if 1 in e.fields["ranks"]], 60.0, "rank 1 again")
        cluster.wait_serving(RANKS)
        ended = len(workload.records())
        eventually(lambda: len(workload.records()) > ended + 4, 60.0, "requests ending again", interval_s=0.1)
    finally:
        history = workload.stop()
    verdict = compare(history, oracle)
    assert verdict.ok, verdict.differences
    masked = [e for e in cluster.events() if e.kind == "rank_masked"]
    assert max(e.fields["uncovered"] for e in masked) == orphans
    losses = [e for e in commits(cluster, view.epoch) if not {1, 2} & set(e.fields["ranks"])]
    assert losses[-1].fields["ranks"] == [0, 3]
    assert (
        sum(e.fields["experts_taken"] for e in commits(cluster, view.epoch) if e.epoch <= losses[-1].epoch) == orphans
    )
    repaired = [
        e for e in cluster.events() if e.kind == "rank_prepared" and e.rank in (0, 3) and at < e.ts <= losses[-1].ts
    ]
    assert sum(e.fields["bytes_mapped"] for e in repaired) > 0
    assert sum(e.fields["bytes_loaded"] for e in repaired) == 0, "the host's store has them all"


def test_where_no_rank_replaces_it_redundancy_is_restored_in_the_background(serve: Serve, demo_model: Path) -> None:
    cluster = serve(demo_model, 3, ("--restart-intensity", "1"))
    before = cluster.wait_serving(3)
    with under_load(cluster, CALM) as workload:
        kill(before["ranks"][1]["pid"])
        loss, restored = loss_and_next(cluster, [0, 2])
        ended = len(workload.records())
        eventually(lambda: len(workload.records()) > ended + 4, 60.0, "requests ending", interval_s=0.1)
    assert loss.fields["weight_bytes"] == 0
    assert restored.fields["ranks"] == [0, 2]
    assert "redundancy is restored" in str(staging(cluster, restored))
    assert restored.fields["weight_bytes"] > 0
    assert cluster.status()["coverage"] == {"min_live_replicas": 2, "uncovered": 0}


def test_who_asks_need_not_wait_for_the_background(serve: Serve, demo_model: Path) -> None:
    flags = ("--rebalance-budget", "12MiB", "--coverage-deadline", "20s", "--load-bandwidth", "1GB/s")
    cluster = serve(demo_model, RANKS, flags)
    cluster.wait_serving(RANKS)
    config = cluster.client().state().config
    assert config is not None
    assert (config.rebalance_bytes, config.coverage_deadline_s, config.load_bytes_per_s) == (12 << 20, 20.0, 10**9)
    before = command(cluster, "rebalance", "--plan")
    assert before.returncode == 0, "nothing is measured yet, nothing is missing"
    skew(cluster, 22, 12)  # the background leaves that alone
    planned = command(cluster, "rebalance", "--plan", "-o", "json")
    assert planned.returncode == 2, planned.stderr
    plan = json.loads(planned.stdout)
    assert plan["bytes_moved"] == plan["slots"] * config.expert_bytes <= config.rebalance_bytes
    assert 1.3 > plan["imbalance_before"] > plan["imbalance_after"]
    assert not plan["unasked"]
    command(cluster, "pause", "--ttl", "1m")
    refused = command(cluster, "rebalance")
    assert (refused.returncode, refused.stderr.count("paused")) == (1, 1)
    command(cluster, "resume")
    asked = command(cluster, "rebalance")
    assert (asked.returncode, "asked for" in asked.stdout) == (0, True), asked.stderr
    (moved,) = eventually(lambda: commits(cluster, plan["epoch"])[:1], 60.0, "a rebalance", interval_s=0.1)
    assert "load is balanced" in str(staging(cluster, moved))
    assert moved.fields["experts_taken"] > 0
