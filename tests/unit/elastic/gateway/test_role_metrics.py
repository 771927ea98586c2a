"""What each role with a state directory of its own says at its probe: together what one history of all has."""

from __future__ import annotations

import re
from collections import Counter
from functools import partial
from inspect import getsource
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from elastic.gateway import event_metrics
from elastic.gateway.event_metrics import RoleMetrics
from membership.base.events import CHUNK, EventLog

pytestmark = pytest.mark.unit

PAST: tuple[tuple[str, str, int, dict[str, Any]], ...] = (  # role, kind, epoch, fields
    ("controller", "epoch_staged", 1, {}),
    ("agent", "weights_held", 0, {"node": "n", "bytes": 7}),
    ("controller", "epoch_committed", 1, {"ranks": [0, 1], "weight_bytes": 5}),
    ("engine", "epoch_adopted", 1, {"requests": 0, "trigger": "start", "committed_ms": 30.0}),
    ("engine", "rank_masked", 1, {"incarnation": 1, "source": "hung", "ms": 2.0, "silent_ms": 900.0, "requests": 3}),
    ("engine", "request_moved", 1, {}),
    ("engine", "rank_recovered", 1, {"ms": 40.0}),
    ("engine", "link_lost", 1, {}),
    ("agent", "rank_died", 1, {"incarnation": 2, "detected_by": "heartbeat"}),
    ("controller", "epoch_staged", 2, {}),
    ("controller", "epoch_unstaged", 1, {}),
    ("controller", "epoch_staged", 2, {}),
    ("controller", "epoch_committed", 2, {"ranks": [0], "weight_bytes": 9}),
    ("engine", "epoch_adopted", 2, {"requests": 1, "trigger": "loss", "committed_ms": 20.0}),
    ("controller", "operation_phase", 2, {"phase": "aborted"}),
    ("engine", "engine_stood_down", 2, {}),
    ("controller", "leader_left", 2, {"fenced": True}),
)  # fmt: skip


def said(path: Path) -> Counter[str]:
    """Each counter's value, by name and labels."""
    text = RoleMetrics(path, "c").exposition().decode()
    samples = [each for family in text_string_to_metric_families(text) for each in family.samples]
    return Counter(
        {
            f"{each.name}{sorted(each.labels.items())}": each.value
            for each in samples
            if each.value and not each.name.endswith("_created")
        }
    )


def test_the_sum_of_the_roles_is_the_cluster(tmp_path: Path) -> None:
    for second, (role, kind, epoch, fields) in enumerate(PAST):
        for name in (role, "all"):
            history = EventLog(tmp_path / name, role, clock=partial(float, second))
            history.emit(kind, cluster="c", epoch=epoch, **fields)
    parts = [said(tmp_path / role) for role in ("controller", "engine", "agent")]
    assert all(parts), "each role has something to say"
    assert sum(parts, Counter[str]()) == said(tmp_path / "all")
    for change in ("start", "loss"):
        phases = {
            f"elastic_ep_reconfiguration_seconds_count[('phase', '{each}'), ('trigger', '{change}')]"
            for each in ("loading", "committed")
        }
        assert phases <= sum(parts, Counter[str]()).keys()


def test_each_kind_that_is_counted_is_in_this_past() -> None:
    counted = set(re.findall(r'event\.kind == "(\w+)"', getsource(event_metrics)))
    assert counted == {kind for _, kind, _, _ in PAST}


def test_a_scrape_of_a_role_reads_a_part_of_a_long_history(tmp_path: Path) -> None:
    """An engine's steps wait for it; the next scrapes have the rest."""
    history = EventLog(tmp_path / "events", "engine")
    for _ in range(10):
        history.emit("link_lost", cluster="c", padding="x" * (event_metrics.ROLE_READS * CHUNK // 8))
    metrics, found = RoleMetrics(tmp_path / "events", "c"), list[float]()
    for _ in range(3):
        families = text_string_to_metric_families(metrics.exposition().decode())
        found += [each.value for all_ in families for each in all_.samples if each.name == "elastic_ep_link_cuts_total"]
    assert 0 < found[0] < 10
    assert found[1:] == [10, 10]
