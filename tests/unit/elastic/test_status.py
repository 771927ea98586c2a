"""The status document: each state of the cluster and of a rank, from the records alone."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace
from rich.console import Console

from elastic import status as status_module
from elastic.cli.render import console, links_view, nodes_view, status_view
from elastic.gateway.metrics import GatewayMetrics
from elastic.status import ClusterStatus, cluster_status
from membership.base.enums import OperationKind
from membership.base.events import Event
from membership.planning.identity import name_of
from membership.store.records import (
    AgentRecord,
    Assignment,
    Checkpoint,
    ClusterState,
    Desired,
    EngineStatus,
    ExpertLoad,
    GpuUse,
    Heartbeats,
    HostLink,
    Operation,
    Phase,
    RankSpec,
    RankState,
    View,
)
from tests.support.cluster_states import CONFIG, TOKEN, healthy, record, without

pytestmark = pytest.mark.unit


def states(status: ClusterStatus) -> list[str]:
    return [rank.state.value for rank in status.ranks]


def test_the_document_is_exactly_as_promised() -> None:
    document = json.loads(msgspec.json.encode(cluster_status(healthy(), 10.0)))
    assert {key: value for key, value in document.items() if key != "ranks"} == {
        "cluster": "c",
        "state": "serving",
        "epoch": 3,
        "desired": 4,
        "coverage": {"min_live_replicas": 2, "uncovered": 0},
        "operation": None,
        "requests": {"running": 5, "waiting": 1, "waiting_tokens": 0, "shed": 0},
        "spares": {"wanted": 0, "ready": 0},
        "owner": "operator",
        "drained": [],
        "nodes": [{"node": "n", "ranks": 4, "safe_to_delete": False, "sole_experts": 8}],
        "links": [],
        "pause": None,
        "exactness": "invariant",
        "imbalance": None,
        "prefix_cache": {"queried_tokens": 0, "cached_tokens": 0},
        "store": "",
        "model": "",
    }
    assert document["ranks"][1] == {
        "rank": 1,
        "node": "n",
        "pid": 101,
        "incarnation": 2,
        "state": "serving",
        "slots": 4,
        "heartbeat_age_ms": 250.0,
        "restarts": 0,
    }


def test_what_the_end_of_a_host_or_a_rank_would_uncover_is_shown() -> None:
    plain = healthy()
    assert plain.view is not None
    hosts = {node: replace(plain.agents["n"], node=node) for node in ("n", "o")}
    members = tuple(replace(each, node="o") if each.rank > 1 else each for each in plain.view.members)
    records = {key: replace(each, node="o") if each.rank > 1 else each for key, each in plain.ranks.items()}
    specs = plain.assignments["n"].ranks
    placed = {
        node: replace(plain.assignments["n"], node=node, ranks=ranks)
        for node, ranks in (("n", specs[:2]), ("o", specs[2:]))
    }
    state = replace(plain, agents=hosts, assignments=placed, view=replace(plain.view, members=members), ranks=records)
    machine = replace(state, agents={node: replace(agent, machine="m") for node, agent in hosts.items()})
    both = json.loads(msgspec.json.encode(cluster_status(machine, 10.0)))["nodes"]
    assert [node["sole_experts"] for node in both] == [8, 8], "agents that name one machine end together"
    for lost, nodes, ranks in (((), {"n": 0, "o": 0}, [0, 0, 0, 0]), ((1,), {"n": 0, "o": 4}, [0, 0, 4])):
        document = json.loads(msgspec.json.encode(cluster_status(without(state, *lost), 10.0)))
        assert {node["node"]: node.get("sole_experts", 0) for node in document["nodes"]} == nodes, document
        serving = [rank.get("sole_experts", 0) for rank in document["ranks"] if rank["rank"] not in lost]
        assert serving == ranks, document
        console = Console(width=200)
        with console.capture() as text:
            console.print(status_view(document))
            console.print(nodes_view(document))
        assert ("on node o (4 of them); on rank 3 (4 of them)" in text.get()) == bool(lost)
        assert ("4 experts" in text.get()) == bool(lost)


def test_spares_are_counted_over_all_hosts_and_shown_where_there_shall_be_some() -> None:
    hosts = {
        node: AgentRecord(node=node, pid=3, started=1.0, spares_wanted=2, spares=pids)
        for node, pids in (("n", (7, 8)), ("o", (9,)))
    }
    for agents, shown in ((hosts, True), (healthy().agents, False)):
        document = json.loads(msgspec.json.encode(cluster_status(healthy(agents=agents), 10.0)))
        assert document["spares"] == ({"wanted": 4, "ready": 3} if shown else {"wanted": 0, "ready": 0})
        console = Console(width=200)
        with console.capture() as shown_text:
            console.print(status_view(document))
        assert ("spares 3/4" in shown_text.get()) == shown
        assert ("spares" in shown_text.get()) == shown


def test_machines_and_zones_are_shown_where_an_agent_names_them() -> None:
    plain = healthy()
    named = {"n": replace(plain.agents["n"], machine="worker-7", zone="eu-1b")}
    for agents, shown in ((named, True), (plain.agents, False)):
        document = json.loads(msgspec.json.encode(cluster_status(healthy(agents=agents), 10.0)))
        assert ({"machine", "zone"} <= document["nodes"][0].keys()) == shown
        console = Console(width=200)
        with console.capture() as text:
            console.print(status_view(document))
        assert [word in text.get() for word in ("machine", "worker-7", "zone", "eu-1b")] == [shown] * 4


def test_names_of_hosts_are_shown_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    """Rich takes brackets for styles, and for their ends: an error, where none has begun."""
    name = "[/rack] [b]1 :key:"
    agent = replace(healthy().agents["n"], node=name, machine=name)
    document = json.loads(msgspec.json.encode(cluster_status(healthy(agents={name: agent}), 10.0)))
    for rank in document["ranks"]:
        rank["node"] = name
    for view in (status_view(document), nodes_view(document)):
        console().print(view)
        assert name in capsys.readouterr().out


def test_a_heartbeat_ages_from_when_it_was_seen() -> None:
    def ages(now: float, **changes: Any) -> list[float | None]:
        return [rank.heartbeat_age_ms for rank in cluster_status(healthy(2, **changes), now).ranks]

    assert ages(10.0) == [250.0, 250.0]
    assert ages(12.5) == [2750.0, 2750.0], "no heartbeat was published since"
    assert ages(9.0) == [0.0, 0.0], "our clock is behind the agent's"
    assert ages(10.0, heartbeats={}) == [None, None]
    other = Heartbeats(node="n", at=9.9, beats={1: 9.5, 77: 9.9})
    assert ages(10.0, heartbeats={"n": other}) == [500.0, None], "another incarnation's heartbeat is not this one's"


def between_hosts() -> ClusterState:
    """Ranks of "n" have two links with "b", of which one is cut; the engine reaches "b"."""
    link = HostLink(links=2, up=1, rtt_s=0.0123, sent_bytes=4_200_000, retransmits=3, suspects=1, cuts=5)
    beats = Heartbeats(node="n", at=9.9, links={"b": link})
    status = EngineStatus(token=TOKEN, epoch=3, links={"b": HostLink(links=1, up=1, rtt_s=0.001)})
    return healthy(heartbeats={"n": beats}, engine_status=status)


def test_links_between_hosts_are_in_the_document_and_shown_with_those_that_were_cut() -> None:
    document = msgspec.to_builtins(cluster_status(between_hosts(), 10.0))
    assert list(document["links"]) == [
        {
            "role": "ranks", "node": "n", "peer_node": "b",
            "links": 2, "up": 1, "rtt_ms": 12.3, "sent_bytes": 4_200_000, "retransmits": 3, "suspects": 1, "cuts": 5,
        },
        {
            "role": "engine", "node": "n", "peer_node": "b", "links": 1, "up": 1, "rtt_ms": 1.0, "sent_bytes": 0,
            "retransmits": 0, "suspects": 0, "cuts": 0,
        },
    ]  # fmt: skip
    lost = Event(ts=0.0, role="engine", kind="link_lost", rank=0, fields={"peer": 2, "node": "n", "peer_node": "b"})
    shown = Console(width=120, file=io.StringIO())
    shown.print(links_view(document, [lost]))
    assert isinstance(shown.file, io.StringIO)
    text = shown.file.getvalue()
    for part in ("1/2", "12.30 ms", "4.2 MB", "link_lost", "peer_node=b"):
        assert part in text
    alone = Console(width=120, file=io.StringIO())
    alone.print(links_view(msgspec.to_builtins(cluster_status(healthy(), 10.0)), []))
    assert isinstance(alone.file, io.StringIO)
    assert alone.file.getvalue() == "no connections between hosts\n"


def test_links_between_hosts_are_metrics_by_pair(tmp_path: Path) -> None:
    text = GatewayMetrics(between_hosts, tmp_path / "events.jsonl", "c").exposition().decode()
    where = '{node="n",peer_node="b",role="ranks"}'
    for line in (
        f"elastic_ep_links{where} 2.0",
        f"elastic_ep_links_up{where} 1.0",
        f"elastic_ep_link_rtt_seconds{where} 0.0123",
        f"elastic_ep_link_sent_bytes_total{where} 4.2e+06",
        f"elastic_ep_link_retransmits_total{where} 3.0",
        f"elastic_ep_link_suspects_total{where} 1.0",
    ):
        assert line in text.splitlines()


def test_a_slow_rank_is_shown_and_counts_as_serving() -> None:
    state = healthy()
    assert state.engine_status is not None
    status = cluster_status(replace(state, engine_status=replace(state.engine_status, slow=(2,))), 10.0)
    assert status.state == "serving"
    assert [rank.rank for rank in status.ranks if rank.slow] == [2]


def test_starting() -> None:
    assert cluster_status(ClusterState(revision=1), 0.0).state == "starting"
    assert cluster_status(ClusterState(revision=1, config=CONFIG), 0.0).state == "starting"
    assert cluster_status(healthy(view=None), 0.0).state == "starting"


def test_without_an_engine_that_runs_the_view_a_cluster_is_degraded() -> None:
    assert cluster_status(healthy(engine=None, engine_token=0, engine_status=None), 0.0).state == "degraded", "it died"
    assert cluster_status(healthy(engine_status=None), 0.0).state == "degraded", "its successor has just begun"
    young = EngineStatus(token=TOKEN, epoch=0)
    assert cluster_status(healthy(engine_status=young), 0.0).state == "degraded", "and has not yet taken up the view"
    assert cluster_status(healthy(engine_token=TOKEN + 1), 0.0).state == "degraded", "the status is its predecessor's"
    assert cluster_status(without(healthy(engine=None, engine_status=None), 1, 3), 0.0).state == "uncovered"


def test_stopped() -> None:
    assert cluster_status(healthy(engine=None, engine_status=None, agents={}, ranks={}), 0.0).state == "stopped"


def test_a_dead_rank_degrades() -> None:
    status = cluster_status(without(healthy(), 1), 0.0)
    assert (status.state, states(status)) == ("degraded", ["serving", "dead", "serving", "serving"])
    assert (status.coverage.min_live_replicas, status.coverage.uncovered) == (1, 0)
    assert (status.ranks[1].pid, status.ranks[1].restarts) == (0, 2)


def test_experts_without_a_holder() -> None:
    status = cluster_status(without(healthy(), 1, 3), 0.0)
    assert (status.state, status.coverage.min_live_replicas, status.coverage.uncovered) == ("uncovered", 0, 4)


def test_masked_by_the_present_engine_only() -> None:
    masked = EngineStatus(token=TOKEN, epoch=3, masked=(2,))
    assert states(cluster_status(healthy(engine_status=masked), 0.0))[2] == "masked"
    earlier = replace(masked, epoch=2)
    assert states(cluster_status(healthy(engine_status=earlier), 0.0))[2] == "serving"


def test_the_slot_of_a_dead_rank_stays_in_sight_until_it_is_filled() -> None:
    state = without(healthy(), 3)
    view = View(epoch=4, members=healthy(3).view.members, placement=state.view.placement)  # type: ignore[union-attr]
    status = cluster_status(replace(state, view=view), 0.0)
    assert (states(status)[3], status.state) == ("dead", "degraded")
    quarantined = without(healthy(), 3, quarantined=True)
    assert states(cluster_status(replace(quarantined, view=view), 0.0))[3] == "quarantined"
    shrunk = replace(state, view=view, desired=Desired(ranks=3, slots=(0, 1, 2)), assignments=healthy(3).assignments)
    assert len(cluster_status(shrunk, 0.0).ranks) == 3


@pytest.mark.parametrize("state", [RankState.LAUNCHING, RankState.HANDSHAKING, RankState.LOADING, RankState.STANDBY])
def test_ranks_on_their_way_and_the_operation(state: RankState) -> None:
    before = healthy()
    specs = (*before.assignments["n"].ranks, RankSpec(rank=4, incarnation=9), RankSpec(rank=5, incarnation=10))
    operation = Operation(id="op", kind=OperationKind.SCALE, target=6, phase=Phase.LOADING, started=1.0, deadline=60.0)
    status = cluster_status(
        replace(
            before,
            desired=Desired(ranks=6),
            assignments={"n": Assignment(node="n", ranks=specs, agent_started=1.0)},
            ranks=before.ranks | {(4, 9): record(4, state, 9)},
            operations={
                "op": operation,
                "old": Operation(id="old", kind=OperationKind.SCALE, target=4, phase=Phase.DONE),
            },
        ),
        5.0,
    )
    assert states(status)[4:] == [state.value, "launching"]
    assert status.state == "serving", "scaling is no trouble"
    assert (status.ranks[4].slots, status.ranks[4].pid) == (0, 104)
    assert status.operation is not None
    assert (status.operation.id, status.operation.phase, status.operation.target) == ("op", "loading", 6)


def test_ranks_that_leave() -> None:
    before = healthy()
    leaving = replace(
        before,
        desired=Desired(ranks=3),
        next=View(epoch=4, members=healthy(3).view.members),  # type: ignore[union-attr]
        operations={"op": Operation(id="op", kind=OperationKind.SCALE, target=3, phase=Phase.LOADING)},
    )
    assert states(cluster_status(leaving, 0.0))[3] == "draining"
    gone = healthy(3, ranks=before.ranks)
    assert states(cluster_status(gone, 0.0))[3] == "draining", "out of the view, not yet ended"


def test_a_cluster_that_gave_exactness_up_says_so() -> None:
    document = json.loads(msgspec.json.encode(cluster_status(healthy(config=replace(CONFIG, exactness="stock")), 10.0)))
    console = Console(width=200)
    with console.capture() as shown:
        console.print(status_view(document))
    assert "exactness stock" in shown.get()


def test_what_is_served_its_replaced_files_and_refused_slots_are_shown() -> None:
    checkpoint = Checkpoint(parts={"weights": "w"})
    agents = {"n": replace(healthy().agents["n"], trouble="model.safetensors in /m changed")}
    state = replace(without(healthy(agents=agents), 2, quarantined=True, refused=True), checkpoint=checkpoint)
    document = json.loads(msgspec.json.encode(cluster_status(state, 10.0)))
    assert document["model"] == name_of(checkpoint) != ""
    assert document["nodes"][0]["trouble"] == "model.safetensors in /m changed"
    assert [rank.get("reason") for rank in document["ranks"]] == [None, None, "killed", None]
    console = Console(width=200)
    with console.capture() as shown:
        console.print(status_view(document))
    assert "node n: model.safetensors in /m changed" in shown.get()
    assert "rank 2 is set aside: killed" in shown.get()


def test_a_slot_whose_later_incarnation_was_set_aside_is_in_quarantine_before_a_view_says_so() -> None:
    """No view can be committed without the dead rank while no other lives."""
    state = without(healthy(), 0, 1, 2, 3)
    later = {rank: replace(last, incarnation=99, quarantined=True) for rank, last in state.exits.items()}
    ended = {"n": Assignment(node="n", agent_started=1.0)}
    ranks = cluster_status(replace(state, exits=later, assignments=ended), 10.0).ranks
    assert {rank.state for rank in ranks} == {RankState.QUARANTINED}


def test_the_load_of_a_rank_is_shown_in_bytes_while_it_loads() -> None:
    state = healthy()
    loading = {state.view.member(2).incarnation: (1_200_000, 2_800_000)} if state.view else {}  # type: ignore[union-attr]
    status = cluster_status(replace(state, heartbeats={"n": Heartbeats(node="n", at=9.0, loads=loading)}), 10.0)
    document = json.loads(msgspec.json.encode(status))
    assert [rank.get("load") for rank in document["ranks"]] == [
        None,
        None,
        {"bytes": 1_200_000, "total": 2_800_000},
        None,
    ]
    shown = Console(width=200)
    with shown.capture() as captured:
        shown.print(status_view(document))
    assert "1.2 MB of 2.8 MB" in captured.get()


def test_a_ranks_gpu_is_shown_and_measured_where_it_has_one(tmp_path: Path) -> None:
    seen = GpuUse(
        index=1, uuid="GPU-8f", free=120_000_000_000, total=150_750_000_000, graphs=3, graph_rows=(1, 8, 32),
        recorded_at=9.0, exchange="host", exchange_reason="no P2P between GPUs 0 and 1",
    )  # fmt: skip
    plain = healthy(2)
    state = replace(plain, heartbeats={"n": replace(plain.heartbeats["n"], gpus={2: seen})})
    document = json.loads(msgspec.json.encode(cluster_status(state, 10.0)))
    assert "gpu" not in document["ranks"][0]
    assert document["ranks"][1]["gpu"] == {
        "index": 1, "uuid": "GPU-8f", "used_gb": 30.75, "free_gb": 120.0, "total_gb": 150.75, "graphs": 3,
        "graph_rows": [1, 8, 32], "recorded_at": 9.0, "exchange": "host",
        "exchange_reason": "no P2P between GPUs 0 and 1",
    }  # fmt: skip
    shown = Console(width=200)
    with shown.capture() as captured:
        shown.print(status_view(document))
    line = (
        "rank 1: GPU 1, 30.75 of 150.75 GB used; 3 steps recorded of 1, 8, 32 rows; "
        "rows travel by host (no P2P between GPUs 0 and 1)"
    )
    assert line in captured.get()
    assert "rank 0:" not in captured.get()
    scraped = GatewayMetrics(lambda: state, tmp_path / "events.jsonl", "c").exposition().decode()
    where = '{gpu="1",node="n",rank="1",uuid="GPU-8f"}'
    values = {"memory_used_bytes": "3.075e+10", "memory_total_bytes": "1.5075e+11", "graphs": "3.0"}
    for name, value in (values | {"exchange_ready": "0.0"}).items():
        assert re.findall(rf"^elastic_ep_gpu_{name}{re.escape(where)} (\S+)$", scraped, re.MULTILINE) == [value]


def test_where_weights_come_from_is_shown_while_a_rank_takes_them() -> None:
    state = healthy()
    loading = {state.view.member(2).incarnation: (1_200_000, 2_800_000)} if state.view else {}  # type: ignore[union-attr]
    beats = Heartbeats(node="n", at=9.0, loads=loading, weights_from=("b", "c"))
    document = json.loads(msgspec.json.encode(cluster_status(replace(state, heartbeats={"n": beats}), 10.0)))
    assert document["ranks"][2]["load"] == {"bytes": 1_200_000, "total": 2_800_000, "sources": ["b", "c"]}
    shown = Console(width=200)
    with shown.capture() as captured:
        shown.print(status_view(document))
    assert "1.2 MB of 2.8 MB from node b, c" in captured.get()


def test_what_follows_from_a_placement_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes tens of milliseconds with 58 layers of 256 experts, and each probe, scrape and page asks for it."""
    computed: list[str] = []
    for name in ("coverage", "imbalance"):
        real = getattr(status_module, name)

        def counted(*given: Any, name: str = name, real: Any = real) -> Any:
            computed.append(name)
            return real(*given)

        monkeypatch.setattr(status_module, name, counted)
    state = healthy(expert_load=ExpertLoad(at=1.0, loads=((16, 8, 16, 24),) * 2))
    first = cluster_status(state, 10.0)
    assert cluster_status(replace(state, revision=10), 11.0).imbalance == first.imbalance
    assert computed == ["coverage", "imbalance"]
    lost = cluster_status(without(state, 2), 12.0)
    assert (first.coverage.min_live_replicas, lost.coverage.min_live_replicas) == (2, 1)
    busier = replace(state, expert_load=ExpertLoad(at=2.0, loads=((64, 0, 0, 0),) * 2))
    assert cluster_status(busier, 13.0).imbalance != first.imbalance
    assert state.view is not None
    halved = replace(state.view, placement={0: state.view.placement[0], 1: state.view.placement[1]})
    assert cluster_status(replace(state, view=halved), 14.0).coverage.min_live_replicas == 1
    assert computed.count("coverage") == 4, "a death and a new placement; a load of its own changes no coverage"
