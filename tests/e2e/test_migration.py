"""A scale-down or drain under load recomputes nothing: requests move with their KV blocks, and no output changes."""

from __future__ import annotations

from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from chaos.target.cluster import ServedCluster
from tests.e2e.conftest import Serve
from tests.support.helpers import eventually
from tests.support.served import elastic, shows, stream_all, texts_of

TOKENS = 250  # of each answer: it outlasts the change
pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]


def migrated(metrics: str) -> dict[str, float]:
    """What `elastic_ep_requests_migrated_total` says, by how."""
    (family,) = [f for f in text_string_to_metric_families(metrics) if f.name == "elastic_ep_requests_migrated"]
    return {sample.labels["how"]: sample.value for sample in family.samples if sample.name.endswith("_total")}


def test_ranks_leave_and_nothing_is_recomputed(serve: Serve, demo_model: Path) -> None:
    cluster = serve(demo_model, 4)
    cluster.wait_serving(4)
    moved = leaves(cluster, ("drain", "0"), {0}, {1, 2, 3})
    elastic(cluster, "undrain", "0")
    moved += leaves(cluster, ("scale", "2", "--wait"), {2, 3}, {0, 1})
    counts = {"copied": moved, "replayed": 0}
    shows(cluster, lambda text: migrated(text) == counts, f"requests moved: {counts}")


def leaves(cluster: ServedCluster, command: tuple[str, ...], leave: set[int], stay: set[int]) -> int:
    """Do it under load: every request on a departing rank moves to one that stays. How many do."""
    model = cluster.model_name()
    expected = texts_of(cluster, model, TOKENS)
    earlier = len(cluster.events())
    streams = stream_all(cluster, model, TOKENS)
    eventually(lambda: elastic(cluster, "status")["requests"]["running"] > 12, 60.0, "streams under way")
    assert elastic(cluster, *command)["phase"] == "done"
    running = elastic(cluster, "status")["requests"]["running"]
    assert [f.result(timeout=180) for f in streams] == expected
    assert running > 0, "the requests ended before the change did"
    moved = [event for event in cluster.events()[earlier:] if event.kind == "request_moved"]
    assert {event.fields["source"] for event in moved} == leave
    assert {event.rank for event in moved} == stay
    return len(moved)
