"""The controller takes zones and machines from the agents' records: where ranks start, and what experts they hold."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from membership.placement.survivability import survivability
from membership.placement.tally import Domain
from membership.planning.cluster_facts import ClusterFacts
from membership.planning.node_selection import choose_nodes
from membership.store.records import AgentRecord, Assignment, RankSpec
from tests.support.cluster_states import CONFIG
from tests.support.world import World

pytestmark = pytest.mark.unit

ZONES = {"a": Domain("east", "m"), "b": Domain("east", "m"), "c": Domain("east", "n"), "d": Domain("west", "o")}
WHOLE = replace(CONFIG, redundancy=2.0)


def agents(domains: dict[str, Domain], capacity: int) -> World:
    return World(nodes=tuple(domains), domains=domains, capacity=capacity, desired=1, config=WHOLE)


def chosen(world: World, number: int) -> list[str]:
    return list(choose_nodes(ClusterFacts(replace(world.state, assignments={}), 0.0), range(number)).values())


def test_a_rank_starts_in_the_zone_and_on_the_machine_with_the_fewest_of_the_nodes_with_the_fewest() -> None:
    assert chosen(agents(ZONES, capacity=2), 6) == ["a", "d", "c", "b", "d", "c"]
    named = {node: Domain("", "m" if node in "ab" else node) for node in "abc"}
    assert chosen(agents(named, capacity=1), 3) == ["a", "c", "b"], "a and b are one machine"
    assert chosen(agents({node: Domain("", "") for node in "abc"}, capacity=2), 4) == ["a", "b", "c", "a"]


def test_a_zone_that_is_not_known_is_no_other_zone() -> None:
    """Neither that of an agent that names none, nor that of one that is gone."""
    half = {"a": Domain("east", ""), "b": Domain("east", ""), "c": Domain("", "")}
    assert chosen(agents(half, capacity=1), 3) == ["a", "b", "c"], "as if none were known: c is not preferred"
    world = agents({**half, "c": Domain("south", ""), "d": Domain("west", "")}, capacity=1)
    state, ranks = world.state, (RankSpec(rank=0, incarnation=1),)
    lost = {node: record for node, record in state.agents.items() if node != "c"}
    state = replace(state, agents=lost, assignments={"c": Assignment(node="c", ranks=ranks)})
    assert list(choose_nodes(ClusterFacts(state, 0.0), (1, 2)).values()) == ["a", "d"], "those of the others count"


def test_no_zone_and_no_machine_holds_both_replicas_of_an_expert() -> None:
    domains = {"a": Domain("east", "m"), "b": Domain("east", "m"), "c": Domain("west", "n"), "d": Domain("west", "n")}
    world = World(nodes=tuple(domains), domains=domains, capacity=1, desired=4, config=WHOLE)
    world.settle()
    view = world.state.view
    assert view is not None
    assert view.ranks == (0, 1, 2, 3)
    where = ClusterFacts(world.state, world.now).domains(view.members)
    assert set(where.values()) == {Domain("east", "m"), Domain("west", "n")}
    found = survivability(view.placement, where, CONFIG.moe_layers, CONFIG.experts)
    assert (found.vital_zones, found.vital_hosts) == ((), ())


def test_agents_that_become_known_as_one_machine_are_parted_and_one_whose_record_lapsed_moves_nothing() -> None:
    world = World(nodes=("a", "b", "c", "d"), capacity=1, desired=4, config=replace(WHOLE, rebalance_bytes=1 << 40))
    world.settle()
    view = world.state.view
    assert view is not None
    expert = view.placement[0][0][0]
    twins = {member.node for member in view.members if expert in view.placement[member.rank][0]}
    known = world.state.agents
    for node in twins:
        world.put(world.keys.agent(node), replace(known[node], machine="m"))
    other = next(node for node in known if node not in twins)
    world.store.delete(world.keys.agent(other))
    world.now += 1000.0
    world.settle()
    assert world.epochs == [1], "what that one ends with is not known now"
    record: AgentRecord = known[other]
    world.put(world.keys.agent(other), record)
    world.settle()
    assert world.epochs == [1, 2]
    after = world.state.view
    assert after is not None
    where = ClusterFacts(world.state, world.now).domains(after.members)
    assert survivability(after.placement, where, CONFIG.moe_layers, CONFIG.experts).vital_hosts == ()
