"""On which node a new rank starts: the live agent with the fewest ranks. Pure: the planner's, and of plans."""

from __future__ import annotations

from collections.abc import Iterable

from membership.planning.cluster_facts import ClusterFacts


def room(facts: ClusterFacts) -> dict[str, int]:
    """node -> how many more ranks it takes, for the live agents that take any."""
    running = [node for node, _ in facts.assigned.values()]
    staying = {node: agent for node, agent in sorted(facts.state.agents.items()) if not agent.leaving}
    left = {node: agent.capacity - running.count(node) for node, agent in staying.items()}
    return {node: number for node, number in left.items() if number > 0}


def choose_nodes(facts: ClusterFacts, slots: Iterable[int]) -> dict[int, str]:
    """slot -> node, for as many of the slots as there is room for, in their order."""
    left, running = room(facts), [node for node, _ in facts.assigned.values()]
    found: dict[int, str] = {}
    for slot in slots:
        if not left:
            break
        node = min(left, key=lambda name: (running.count(name), name))
        running.append(node)
        left[node] -= 1
        if not left[node]:
            del left[node]
        found[slot] = node
    return found
