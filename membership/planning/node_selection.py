"""Node selection: a new rank starts on the live node with the fewest ranks. Pure; used by the planner and dry runs.

One that replaces a dead one rather starts where that takes no imports first: a host that has just come back takes long.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable

from membership.planning.cluster_facts import ClusterFacts


def room(facts: ClusterFacts) -> dict[str, int]:
    """node -> free capacity in ranks, for the live agents that have any."""
    running = Counter(node for node, _ in facts.assigned.values())
    staying = {node: agent for node, agent in sorted(facts.state.agents.items()) if not agent.leaving}
    left = {node: agent.capacity - running[node] for node, agent in staying.items()}
    return {node: number for node, number in left.items() if number > 0}


def choose_nodes(facts: ClusterFacts, slots: Iterable[int]) -> dict[int, str]:
    """slot -> node, in the order of the slots, until there is no room left."""
    left, running = room(facts), Counter(node for node, _ in facts.assigned.values())
    wanted = tuple(slots)
    repairs = bool(facts.alive) and not facts.leaving and set(wanted) <= set(facts.desired.slots)
    queue = [(repairs and facts.state.agents[node].importing, running[node], node) for node in left]
    heapq.heapify(queue)
    found: dict[int, str] = {}
    for slot in wanted:
        if not queue:
            break
        slow, number, node = heapq.heappop(queue)
        left[node] -= 1
        if left[node]:
            heapq.heappush(queue, (slow, number + 1, node))
        found[slot] = node
    return found


def homeless(facts: ClusterFacts) -> tuple[int, ...]:
    """Slots to fill that no live agent has room for. One that was set aside waits for an operator instead."""
    if not facts.state.agents:
        return ()
    free = sum(room(facts).values())
    aside = {slot for slot, last in facts.state.exits.items() if last.quarantined}
    wanting = [slot for slot in facts.fill if slot not in facts.assigned and slot not in aside]
    return tuple(wanting[free:])
