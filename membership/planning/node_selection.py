"""Node selection: a new rank starts on the live node with the fewest ranks. Pure; used by the planner and dry runs.

Among equals in the zone with the fewest ranks, then on the machine with the fewest, so that replicas can be apart.

One that replaces a dead one rather starts where that takes no imports first: a host that has just come back takes long.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable

from membership.placement.tally import settled
from membership.planning.cluster_facts import ClusterFacts

Turn = tuple[bool, int, int, str]
"""What comes first: (not slow, few ranks on the node, few on its machine, name)."""


def room(facts: ClusterFacts) -> dict[str, int]:
    """node -> free capacity in ranks, for the live agents that have any."""
    running = Counter(node for node, _ in facts.assigned.values())
    staying = {node: agent for node, agent in sorted(facts.state.agents.items()) if not agent.leaving}
    left = {node: agent.capacity - running[node] for node, agent in staying.items()}
    return {node: number for node, number in left.items() if number > 0}


def choose_nodes(facts: ClusterFacts, slots: Iterable[int]) -> dict[int, str]:
    """slot -> node, in the order of the slots, until there is no room left."""
    left, there = room(facts), Counter(node for node, _ in facts.assigned.values())
    domain = settled({node: facts.domain(node) for node in facts.state.agents})  # where a lost one was is not known
    running = dict.fromkeys(domain, 0) | there
    on_machine, in_zone = dict.fromkeys(domain.values(), 0), {each.zone: 0 for each in domain.values()}
    for node in domain:
        in_zone[domain[node].zone] += running[node]
        on_machine[domain[node]] += running[node]
    wanted = tuple(slots)
    repairs = bool(facts.alive) and not facts.leaving and set(wanted) <= set(facts.desired.slots)

    def turn(node: str) -> Turn:
        return repairs and facts.state.agents[node].importing, running[node], on_machine[domain[node]], node

    queues: dict[str, list[Turn]] = {}
    for node in left:
        queues.setdefault(domain[node].zone, []).append(turn(node))
    for queue in queues.values():
        heapq.heapify(queue)
    found: dict[int, str] = {}
    for slot in wanted:
        if not queues:
            break
        zone = min(queues, key=lambda zone: (*queues[zone][0][:2], in_zone[zone], *queues[zone][0][2:]))
        queue, node = queues[zone], queues[zone][0][-1]
        found[slot] = node
        left[node] -= 1
        running[node] += 1
        in_zone[zone] += 1
        on_machine[domain[node]] += 1
        _ = heapq.heapreplace(queue, turn(node)) if left[node] else heapq.heappop(queue)
        while queue and queue[0] != (now := turn(queue[0][-1])):  # its machine has another rank since
            heapq.heapreplace(queue, now)
        if not queue:
            del queues[zone]
    return found


def homeless(facts: ClusterFacts) -> tuple[int, ...]:
    """Slots to fill that no live agent has room for. One that was set aside waits for an operator instead."""
    if not facts.state.agents:
        return ()
    free = sum(room(facts).values())
    aside = {slot for slot, last in facts.state.exits.items() if last.quarantined}
    wanting = [slot for slot in facts.fill if slot not in facts.assigned and slot not in aside]
    return tuple(wanting[free:])
