"""Whatever is away, serving goes on: the controller, etcd, its leader, a whole agent with its ranks."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from chaos.faults import kill
from chaos.target.cluster import ServedCluster
from chaos.workload.streams import Workload
from membership.base.errors import ElasticError
from membership.store.etcd import connect
from tests.e2e.conftest import Serve
from tests.support.etcd_members import three_members
from tests.support.helpers import eventually, stopped
from tests.support.served import CALM, another, answered, role_pid, under_load

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]

RANKS = 3
T = 60.0
OUTAGE_S = float(os.environ.get("ELASTIC_TEST_OUTAGE_S", "0"))  # a longer one, by hand


def masks_a_death(cluster: ServedCluster, workload: Workload, rank: int, pid: int) -> None:
    """Kill a rank; requests go on without it."""
    kill(pid)
    cluster.wait_event(lambda e: e.kind == "rank_masked" and e.rank == rank, f"rank {rank} masked", T)
    ended = len(workload.records())
    eventually(lambda: len(workload.records()) > ended + 4, T, "requests ending without it")


def insist(ask: Callable[[], object], what: str) -> None:
    """Ask until there is an answer: a cluster of etcd that is electing a leader may give none."""
    eventually(lambda: answered(lambda: (ask(), True)[1]), T, what)


def seen(cluster: ServedCluster, kind: str) -> list[int | None]:
    """The ranks of the events of a kind."""
    return [event.rank for event in cluster.events() if event.kind == kind]


def test_without_a_controller_steps_go_on_and_a_death_is_masked(serve: Serve, demo_model: Path) -> None:
    cluster = serve(demo_model, RANKS)

    def step() -> int:
        status = cluster.client().state().engine_status
        return status.step if status is not None else 0

    cluster.wait_serving(RANKS)
    with under_load(cluster, CALM) as workload:
        before = cluster.status()
        with stopped(cluster.pid):  # it would start another one
            kill(role_pid(cluster, "controller"))
            eventually(lambda: cluster.client().state().leader_revision == 0, T, "the office to be empty")
            first = step()
            eventually(lambda: step() > first + 50, T, "fifty more steps")
            masks_a_death(cluster, workload, 1, before["ranks"][1]["pid"])
            state = cluster.client().state()
            assert state.leader_revision == 0
            assert state.view is not None
            assert state.view.epoch == before["epoch"]
        eventually(lambda: cluster.status()["epoch"] > before["epoch"], T, "the next controller to commit the loss")
        after = cluster.wait_serving(RANKS)
    pids = [{r["rank"]: r["pid"] for r in status["ranks"]} for status in (before, after)]
    assert [pids[0][rank] == pids[1][rank] for rank in range(RANKS)] == [True, False, True]


def test_an_etcd_stopped_for_long_freezes_membership_and_nothing_else(serve: Serve, demo_model: Path) -> None:
    """All leases run out meanwhile. The ranks that survived it are the same processes afterwards."""
    cluster = serve(demo_model, RANKS)
    cluster.wait_serving(RANKS)
    with under_load(cluster, CALM) as workload:
        before, config = cluster.status(), cluster.client().state().config
        assert config is not None
        until = time.monotonic() + (OUTAGE_S or 3 * config.lease_ttl_s)
        commits = len(seen(cluster, "epoch_committed"))
        with stopped(role_pid(cluster, "etcd")):
            masks_a_death(cluster, workload, 1, before["ranks"][1]["pid"])
            eventually(lambda: time.monotonic() > until, until, "the outage to have lasted", interval_s=0.1)
            ended = len(workload.records())
            eventually(lambda: len(workload.records()) > ended + 4, T, "requests ending all the while")
            assert len(seen(cluster, "epoch_committed")) == commits
        eventually(lambda: answered(lambda: cluster.status()["epoch"] > before["epoch"]), T, "the loss to be committed")
        after = cluster.wait_serving(RANKS)
    pids = [{r["rank"]: r["pid"] for r in status["ranks"]} for status in (before, after)]
    assert [pids[0][rank] == pids[1][rank] for rank in range(RANKS)] == [True, False, True]
    assert set(seen(cluster, "rank_masked")) == {1}


def grown(cluster: ServedCluster, ranks: int) -> bool:
    """Whether a scale went through. One that finds the agent's lease lapsed is rolled back, and is asked again."""
    with suppress(ElasticError):
        cluster.scale(ranks)
    return len(cluster.status()["ranks"]) == ranks


def test_etcd_loses_its_leader(serve: Serve, demo_model: Path, tmp_path: Path) -> None:
    """And then forgets its history, as a compaction does: a watcher goes on where it was."""
    with three_members(tmp_path) as members:
        urls = [member.url for member in members]
        connect(urls, connect_timeout_s=T).close()  # they have a leader
        cluster = serve(demo_model, 2, ("--etcd", ",".join(urls)))
        cluster.wait_serving(2)
        with under_load(cluster, CALM) as workload:
            old = members[0].status().leader
            leader = next(member for member in members if member.status().member_id == old)
            leader.kill()
            left = [member for member in members if member is not leader]
            eventually(lambda: all(m.status().leader not in (0, old) for m in left), T, "another leader")
            with closing(connect([left[0].url], connect_timeout_s=T)) as store:
                insist(lambda: store.compact(store.range("/")[0]), "a compaction")
            ended = len(workload.records())
            eventually(lambda: len(workload.records()) > ended + 4, T, "requests ending")
            eventually(lambda: grown(cluster, 3), 2 * T, "a scale to 3")
            cluster.wait_serving(3)
        assert not seen(cluster, "rank_masked")
        cluster.__exit__()


def test_an_agents_death_takes_its_ranks_and_only_those(serve: Serve, demo_model: Path) -> None:
    cluster = serve(demo_model, 2)
    cluster.wait_serving(2)
    with another(cluster, "agent", "--node", "second") as agent:
        eventually(lambda: "second" in cluster.client().state().agents, T, "the second agent's record")
        cluster.scale(4)
        cluster.wait_serving(4)
        with under_load(cluster):
            before = cluster.status()["ranks"]
            lost = [r for r in before if r["node"] == "second"]
            assert len(lost) == 2, before
            theirs = processes(lost)
            kill(agent.pid)
            _, alive = psutil.wait_procs(theirs, timeout=T)
            assert not alive
            eventually(lambda: placed(cluster, "second") == set(), T, "the lost ranks to be placed elsewhere")
            after = cluster.wait_serving(4)["ranks"]
        kept = {r["rank"]: r["pid"] for r in before if r not in lost}
        assert {r["rank"]: r["pid"] for r in after if r["rank"] in kept} == kept
        assert set(seen(cluster, "rank_masked")) == {r["rank"] for r in lost}


def placed(cluster: ServedCluster, node: str) -> set[int]:
    return {r["rank"] for r in cluster.status()["ranks"] if r["node"] == node}


def processes(ranks: list[dict[str, Any]]) -> list[psutil.Process]:
    """Those that still run."""
    found = []
    for rank in ranks:
        with suppress(psutil.NoSuchProcess):
            found.append(psutil.Process(rank["pid"]))
    return found
