"""All ranks are replaced one by one under streaming load; a rollout that was interrupted is gone on with."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from chaos.target.cluster import ServedCluster
from elastic.cli.rollout import last_incarnation, rollout
from tests.e2e.conftest import Serve
from tests.support.served import elastic, under_load

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]


def test_ranks_are_replaced_one_by_one_with_a_break_in_between(serve: Serve, demo_model: Path) -> None:
    cluster = serve(demo_model, 3)
    cluster.wait_serving(3)
    with under_load(cluster, busy=6):
        last = replaced_with_a_break(cluster)
    status = cluster.wait_serving(3)
    assert all(rank["incarnation"] > last for rank in status["ranks"])
    assert (status["desired"], status["drained"]) == (3, ())
    assert not [event for event in cluster.events() if event.kind == "rank_died"]


def replaced_with_a_break(cluster: ServedCluster) -> int:
    """The last incarnation before."""
    client, stop, seen = cluster.client(), threading.Event(), list[str]()
    last = last_incarnation(client)
    for operation in rollout(client, last, 60.0, stop):
        seen.append(operation.id)
        if operation.kind == "drain" and not operation.active:
            stop.set()  # with a slot empty: the worst moment to give up
    assert seen[-1] == f"rollout-{last}-drain-0"
    assert elastic(cluster, "status")["drained"] == [0]
    elastic(cluster, "rollout", "--before", str(last))
    return last
