"""Placement over hosts: what any one death leaves, what a repair loads, and what a placement says of itself."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from membership.placement.balance import imbalance
from membership.placement.plan import coverage, max_ranks_allowed, moves, plan, repair
from membership.placement.survivability import describe_survivability, needed_redundancy, needed_slots, survivability
from membership.store.records import Placement
from tests.unit.membership.placement.test_placement import check

pytestmark = pytest.mark.unit


@st.composite
def clusters(draw: st.DrawFn) -> tuple[int, int, float, dict[int, str]]:
    """(layers, experts, redundancy, rank -> host)"""
    experts = draw(st.integers(2, 16))
    redundancy = draw(st.sampled_from([2.0, 2.5, 3.0, 4.0]))
    most = min(8, max_ranks_allowed(experts, redundancy))
    ranks = draw(st.sets(st.integers(0, 20), min_size=2, max_size=most))
    return draw(st.integers(1, 3)), experts, redundancy, {r: draw(st.sampled_from("abc")) for r in sorted(ranks)}


def enough(placement: Placement, nodes: dict[int, str], layer: int, experts: int) -> bool:
    """Whether the hosts' slots suffice to have every expert of the layer on two of them."""
    slots: dict[str, int] = {}
    for rank, held in placement.items():
        slots[nodes[rank]] = slots.get(nodes[rank], 0) + len(held[layer])
    return sum(min(number, experts) for number in slots.values()) >= 2 * experts


@settings(max_examples=200, deadline=None)
@given(clusters(), st.data())
def test_any_one_death_leaves_every_expert_alive_where_slots_are_enough(
    cluster: tuple[int, int, float, dict[int, str]], data: st.DataObject
) -> None:
    layers, experts, redundancy, nodes = cluster
    before = {rank: nodes[rank] for rank in nodes if data.draw(st.booleans())}
    current = plan(layers, experts, before, redundancy, nodes=before) if before else {}
    placement = plan(layers, experts, nodes, redundancy, current, nodes=nodes)
    found = survivability(placement, nodes, layers, experts)
    assert found.after_rank_loss >= 1
    assert found.vital_ranks == ()
    for rank in nodes:
        assert coverage(placement, nodes.keys() - {rank}, experts).min_live_replicas >= 1
    for host in set(nodes.values()):
        left = [rank for rank in nodes if nodes[rank] != host]
        lost = {layer for layer, _ in coverage(placement, left, experts).uncovered}
        assert [layer for layer in lost if enough(placement, nodes, layer, experts)] == []
        assert (host in found.vital_hosts) == (bool(lost) and len(set(nodes.values())) > 1)
    assert plan(layers, experts, nodes, redundancy, placement, nodes=nodes) == placement, "and then it is stable"


def test_an_expert_leaves_its_host_from_whichever_holder_can_exchange_it() -> None:
    nodes = {0: "a", 1: "c", 2: "c", 3: "c", 4: "b"}
    current = plan(1, 2, {3: "c"}, 3.0, nodes={3: "c"})
    placement = plan(1, 2, nodes, 3.0, current, nodes=nodes)
    assert survivability(placement, nodes, 1, 2).vital_hosts == ()


def test_an_exchange_that_helps_another_expert_too_is_not_undone() -> None:
    nodes = {0: "a", 1: "b", 2: "b", 3: "a", 4: "b", 5: "a"}
    before = {rank: nodes[rank] for rank in (0, 3, 4, 5)}
    current = plan(2, 3, before, 2.5, nodes=before)
    placement = plan(2, 3, nodes, 2.5, current, nodes=nodes)
    found = survivability(placement, nodes, 2, 3)
    assert (found.min_replicas, found.vital_ranks, found.vital_hosts) == (2, (), ())


@pytest.mark.parametrize("redundancy", [1.25, 2.0, 3.1])
@pytest.mark.parametrize(("ranks", "hosts"), [(32, "abc"), (31, "abc"), (31, "a")])
def test_many_experts_placed_by_bulk_fill_are_as_safe(
    redundancy: float, ranks: int, hosts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("membership.placement.plan.MANY", 100)
    layers, experts = 12, 64
    nodes = {rank: hosts[rank % 7 % len(hosts)] for rank in range(ranks)}
    loads = [[float(1 + (e * e + layer) % 97) for e in range(experts)] for layer in range(layers)]
    half = {rank: nodes[rank] for rank in range(ranks // 2)}
    current = plan(layers, experts, half, redundancy, loads=loads, nodes=half)
    for kept in ({}, current):
        placement = plan(layers, experts, nodes, redundancy, kept, loads, nodes)
        check(placement, layers, experts, redundancy)
        found = survivability(placement, nodes, layers, experts)
        assert redundancy < 2 or (found.vital_ranks, found.vital_hosts) == ((), ())
        assert imbalance(placement, loads) < 1.7
        assert plan(layers, experts, nodes, redundancy, kept, loads, nodes) == placement


@settings(max_examples=100, deadline=None)
@given(clusters(), st.data())
def test_a_repair_loads_each_orphan_once_and_nothing_else(
    cluster: tuple[int, int, float, dict[int, str]], data: st.DataObject
) -> None:
    layers, experts, redundancy, nodes = cluster
    placement = plan(layers, experts, nodes, redundancy, nodes=nodes)
    kept = data.draw(st.sets(st.sampled_from(sorted(nodes)), min_size=1))
    left = {rank: placement[rank] for rank in kept}
    orphans = set(coverage(left, left, experts).uncovered)
    after = repair(layers, experts, left)
    loaded = [(move.layer, move.expert) for move in moves(left, after)]
    assert len(loaded) == len(orphans)
    assert set(loaded) == orphans
    assert moves(after, left) == [], "no rank drops anything"
    assert coverage(after, after, experts).min_live_replicas >= 1


def test_one_loss_with_redundancy_loads_nothing() -> None:
    placement = plan(4, 64, range(8), 2.0)
    left = {rank: held for rank, held in placement.items() if rank != 3}
    assert repair(4, 64, left) == left


def test_a_second_host_takes_one_replica_of_every_expert() -> None:
    alone = plan(2, 8, range(2), 2.0, nodes={0: "a", 1: "a"})
    nodes = {0: "a", 1: "a", 2: "b", 3: "b"}
    placement = plan(2, 8, nodes, 2.0, alone, nodes=nodes)
    assert survivability(placement, nodes, 2, 8).vital_hosts == ()
    assert {move.rank for move in moves(alone, placement)} <= {2, 3}, "the earlier ranks load nothing"


def test_what_it_would_take_is_said() -> None:
    uneven = {0: "a", 1: "a", 2: "a", 3: "b"}
    placement = plan(1, 8, uneven, 2.0, nodes=uneven)
    found = survivability(placement, uneven, 1, 8)
    assert found.vital_ranks == ()
    assert found.vital_hosts == ("a",), "host b has slots for half of the experts only"
    assert needed_redundancy(uneven, 8) == 2.0
    assert needed_redundancy(uneven, 8, hosts=True) == 4.0
    assert needed_redundancy({0: "a"}, 8) is None
    assert needed_redundancy({0: "a", 1: "a"}, 8, hosts=True) is None
    line = "any one rank may die (every expert keeps 1 or more replicas); the death of host a leaves experts"
    assert describe_survivability(found) == f"{line} without a replica"
    three = survivability(plan(1, 8, range(3), 2.0), {}, 1, 8)
    kept = "every expert keeps 1 or more replicas"
    assert describe_survivability(three) == f"any one rank may die ({kept}); all ranks are on one host"
    assert (needed_slots(uneven, 3, 8), needed_slots(uneven, 3, 8, hosts=True)) == (48, 96)
    assert needed_slots({0: "a"}, 3, 8) is None
