"""Replicas of an expert are in two zones where there is room, else on two machines; and what a placement survives."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from membership.placement.balance import balanced
from membership.placement.plan import moves, plan
from membership.placement.survivability import describe_survivability, needed_redundancy, survivability
from membership.placement.tally import Domain
from membership.store.records import Placement

pytestmark = pytest.mark.unit

EXPERTS = 12


def spread(placement: Placement, nodes: dict[int, Domain], layer: int, expert: int) -> tuple[int, int]:
    """In how many zones and on how many machines an expert is."""
    there = {nodes[rank] for rank, held in placement.items() if expert in held[layer]}
    return len({each.zone for each in there}), len(there)


@st.composite
def clusters(draw: st.DrawFn) -> dict[int, Domain]:
    """Up to three zones, of one to three machines with one to three ranks each."""
    zones = draw(st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=3), min_size=1, max_size=3))
    domains = [
        Domain(f"zone-{at}", f"machine-{at}-{number}")
        for at, machines in enumerate(zones)
        for number, ranks in enumerate(machines)
        for _ in range(ranks)
    ]
    return dict(enumerate(draw(st.permutations(domains))))


def zone_of_most(nodes: dict[int, Domain]) -> int:
    zones = [each.zone for each in nodes.values()]
    return max(map(zones.count, zones))


@settings(max_examples=200, deadline=None)
@given(clusters(), st.data())
def test_two_replicas_are_in_two_zones_or_else_on_two_machines(nodes: dict[int, Domain], data: st.DataObject) -> None:
    """From any earlier placement: where no zone has more than half of the ranks, and each as many slots, all are."""
    before = {rank: nodes[rank] for rank in nodes if data.draw(st.booleans())}
    current = plan(2, EXPERTS, before, 2.0, nodes=before) if len(before) > 1 else {}
    placement = plan(2, EXPERTS, nodes, 2.0, current, nodes=nodes)
    zones, machines = {each.zone for each in nodes.values()}, set(nodes.values())
    found = [spread(placement, nodes, layer, expert) for layer in range(2) for expert in range(EXPERTS)]
    if len(nodes) > 1 and EXPERTS * 2 % len(nodes) == 0 and zone_of_most(nodes) * 2 <= len(nodes):
        assert all(each == (2, 2) for each in found)
    assert plan(2, EXPERTS, nodes, 2.0, placement, nodes=nodes) == placement, "and then it is stable"
    if len(zones) == 1:
        by_name = {rank: each.machine for rank, each in nodes.items()}
        assert placement == plan(2, EXPERTS, nodes, 2.0, plan_by_name(before, current), nodes=by_name)
    assert max(number for _, number in found) <= len(machines)


def plan_by_name(before: dict[int, Domain], current: Placement) -> Placement:
    """The same earlier placement: one zone is as none."""
    by_name = {rank: each.machine for rank, each in before.items()}
    return plan(2, EXPERTS, before, 2.0, nodes=by_name) if current else current


def test_what_has_no_room_in_a_second_zone_is_on_a_second_machine() -> None:
    """Three of four ranks are in one zone: half of the experts can be in the other, and the rest are apart."""
    nodes = {0: Domain("a", "m"), 1: Domain("a", "n"), 2: Domain("a", "o"), 3: Domain("b", "p")}
    placement = plan(3, 8, nodes, 2.0, nodes=nodes)
    found = [spread(placement, nodes, layer, expert) for layer in range(3) for expert in range(8)]
    assert sorted(found) == [(1, 2)] * 12 + [(2, 2)] * 12
    said = survivability(placement, nodes, 3, 8)
    assert (said.vital_ranks, said.vital_hosts, said.vital_zones) == ((), (), ("a",))
    assert (said.after_host_loss, said.after_zone_loss) == (1, 0)
    assert describe_survivability(said) == (
        "any one rank may die (every expert keeps 1 or more replicas); any one host may die (1 or more); "
        "the loss of zone a leaves experts without a replica"
    )


def test_agents_of_one_machine_are_one_failure_domain() -> None:
    """Four nodes on two machines: as if each machine were one node."""
    pods = {0: "a-0", 1: "a-1", 2: "a-2", 3: "a-3"}
    machines = {rank: Domain("", "mmnn"[rank]) for rank in pods}
    placement = plan(2, 8, machines, 2.0, nodes=machines)
    assert survivability(placement, machines, 2, 8).vital_hosts == ()
    assert {spread(placement, machines, layer, e) for layer in range(2) for e in range(8)} == {(1, 2)}
    together = {rank: ((0, 1, 2, 3),) if rank < 2 else ((4, 5, 6, 7),) for rank in pods}
    assert survivability(together, pods, 1, 8).vital_hosts == (), "as nodes they would be apart"
    assert survivability(together, machines, 1, 8).vital_hosts == ("m", "n")
    assert needed_redundancy(dict.fromkeys(pods, Domain("", "m")), 8, hosts=True) is None


def test_a_zone_that_joins_takes_a_replica_of_each_expert() -> None:
    old = {0: Domain("a", "m"), 1: Domain("a", "n")}
    both = {**old, 2: Domain("b", "o"), 3: Domain("b", "p")}
    current = plan(2, 8, old, 2.0, nodes=old)
    placement = plan(2, 8, both, 2.0, current, nodes=both)
    assert survivability(placement, both, 2, 8).vital_zones == ()
    assert len(moves(current, placement)) == 2 * 8, "what is to be in the new zone, and nothing else"


@settings(max_examples=50, deadline=None)
@given(clusters(), st.integers(0, 100))
def test_balancing_keeps_replicas_apart(nodes: dict[int, Domain], seed: int) -> None:
    loads = [[1 + (expert * expert * 7 + layer + seed) % 41 for expert in range(EXPERTS)] for layer in range(2)]
    before = plan(2, EXPERTS, nodes, 2.5 if len(nodes) > 2 else 2.0, nodes=nodes)
    after = balanced(before, loads, nodes, 2.0, 20)
    for layer in range(2):
        for expert in range(EXPERTS):
            was, now = (spread(each, nodes, layer, expert) for each in (before, after))
            assert all(b >= min(a, 2) for a, b in zip(was, now, strict=True)), (layer, expert, was, now)


@pytest.mark.parametrize("zones", ["aaaaaa", "aaaabb", "aabbaa", "aabbcc"])
def test_agents_that_name_their_zone_one_by_one_move_nothing_before_the_last(zones: str) -> None:
    """A rolling upgrade: what is not known is no zone of its own."""
    named = {rank: Domain(zone, f"machine-{rank // 2}") for rank, zone in enumerate(zones)}
    nodes = {rank: Domain("", each.machine) for rank, each in named.items()}
    began = placement = plan(2, EXPERTS, nodes, 2.0, nodes=nodes)
    for rank in sorted(named)[:-2]:  # the last machine's two are not known
        nodes[rank] = named[rank]
        placement = plan(2, EXPERTS, nodes, 2.0, placement, nodes=nodes)
        assert placement == began
        found = survivability(placement, nodes, 2, EXPERTS)
        assert (found.after_zone_loss, found.vital_zones) == (None, ())
        assert "zone" not in describe_survivability(found)
    after = plan(2, EXPERTS, named, 2.0, placement, nodes=named)
    if len(set(zones)) == 1:
        assert after == began
    else:
        assert survivability(after, named, 2, EXPERTS).after_zone_loss is not None


@pytest.mark.parametrize("said", [("a", ""), ("", "a"), ("a", "b")])
def test_a_machine_whose_agents_disagree_about_its_zone_is_one_machine(said: tuple[str, str]) -> None:
    """To the planner as to what is promised."""
    nodes = {0: Domain(said[0], "m"), 1: Domain(said[1], "m"), 2: Domain("c", "n"), 3: Domain("c", "n")}
    placement = plan(2, 8, nodes, 2.0, nodes=nodes)
    machines = {rank: each.machine for rank, each in nodes.items()}
    assert placement == plan(2, 8, machines, 2.0, nodes=machines)
    assert survivability(placement, nodes, 2, 8).vital_hosts == ()
    assert survivability(placement, nodes, 2, 8).after_zone_loss == 1
    assert needed_redundancy({rank: nodes[rank] for rank in (0, 1)}, 8, hosts=True) is None
