"""On which node a new rank starts: the live agent with the fewest ranks. Pure: the planner's, and of plans."""

from __future__ import annotations

from collections.abc import Iterable

from membership.planning.cluster_facts import Census


def room(census: Census) -> dict[str, int]:
    """node -> how many more ranks it takes, for the live agents that take any."""
    running = [node for node, _ in census.assigned.values()]
    staying = {node: agent for node, agent in sorted(census.state.agents.items()) if not agent.leaving}
    left = {node: agent.capacity - running.count(node) for node, agent in staying.items()}
    return {node: number for node, number in left.items() if number > 0}


def seats(census: Census, slots: Iterable[int]) -> dict[int, str]:
    """slot -> node, for as many of the slots as there is room for, in their order."""
    left, running = room(census), [node for node, _ in census.assigned.values()]
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
