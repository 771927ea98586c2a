"""Node selection: the fewest ranks first, then the name; and a boot of many ranks costs little per rank."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from membership.planning.cluster_facts import ClusterFacts
from membership.planning.node_selection import choose_nodes, room
from membership.store.records import AgentRecord, Assignment, ClusterState, Desired, Member, RankSpec, View
from tests.support.cluster_states import CONFIG
from tests.support.helpers import calls_in

pytestmark = pytest.mark.unit


def facts(running: dict[str, int], capacity: int) -> ClusterFacts:
    first, assignments = 1000, dict[str, Assignment]()
    for node, number in running.items():
        specs = tuple(RankSpec(rank=first + at, incarnation=1) for at in range(number))
        assignments[node] = Assignment(node=node, ranks=specs, agent_started=1.0)
        first += number
    agents = {node: AgentRecord(node=node, pid=1, started=1.0, capacity=capacity) for node in running}
    return ClusterFacts(ClusterState(revision=1, config=CONFIG, agents=agents, assignments=assignments), 0.0)


def test_the_node_with_the_fewest_ranks_comes_first_until_there_is_no_room() -> None:
    found = choose_nodes(facts({"b": 1, "a": 1, "c": 3, "d": 0}, capacity=3), range(10))
    assert found == {0: "d", 1: "a", 2: "b", 3: "d", 4: "a", 5: "b", 6: "d"}
    assert room(facts({"a": 3, "b": 1}, capacity=3)) == {"b": 2}
    leaving = facts({"a": 0, "b": 0}, capacity=3)
    agents = {**leaving.state.agents, "a": replace(leaving.state.agents["a"], leaving=True)}
    assert set(choose_nodes(ClusterFacts(replace(leaving.state, agents=agents), 0.0), range(9)).values()) == {"b"}


def importing(on: str, **more: object) -> ClusterFacts:
    """Two nodes with a member each and one without; that one still imports."""
    state = facts({"a": 1, "b": 1, "c": 0}, capacity=2).state
    agents = {**state.agents, on: replace(state.agents[on], importing=True)}
    placed = [(node, spec) for node, given in state.assignments.items() for spec in given.ranks]
    members = tuple(Member(rank=spec.rank, node=node, incarnation=spec.incarnation) for node, spec in placed)
    served = {"view": View(epoch=1, members=members), "desired": Desired(ranks=4, slots=(0, 1, 2, 3))}
    return ClusterFacts(replace(state, agents=agents, **{**served, **more}), 0.0)


def test_a_rank_that_replaces_another_starts_where_it_need_not_wait_for_imports() -> None:
    """Where there is room: else it waits. Otherwise ranks are spread over all nodes as ever."""
    assert choose_nodes(importing("c"), range(4)) == {0: "a", 1: "b", 2: "c", 3: "c"}
    assert choose_nodes(importing("c", view=None), range(1)) == {0: "c"}, "a boot"
    assert choose_nodes(importing("c", view=View(epoch=1)), range(1)) == {0: "c"}, "nobody has outlived a power loss"
    assert choose_nodes(importing("c"), (4,)) == {4: "c"}, "a new slot, as ranks or hosts become more"
    state = importing("c").state
    leaving = {**state.agents, "b": replace(state.agents["b"], leaving=True)}
    assert choose_nodes(ClusterFacts(replace(state, agents=leaving), 0.0), range(1)) == {0: "c"}, "no repair"


def test_a_boot_of_256_ranks_on_256_nodes_looks_at_each_node_a_few_times() -> None:
    many = facts({f"node-{at:03d}": 0 for at in range(256)}, capacity=1)
    with calls_in() as calls:
        found = choose_nodes(many, range(256))
    assert found == {at: f"node-{at:03d}" for at in range(256)}
    assert calls.count < 256 * 20
