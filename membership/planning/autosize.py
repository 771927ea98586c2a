"""The size of a cluster that follows its agents (`--follow-agents`): so many ranks for each node that joined. Pure.

A node counts from when its agent first registers until its agent says that it leaves. An agent that is merely gone is a
fault: its ranks stay wanted, and somebody else runs them, or it does when it is back.
"""

from __future__ import annotations

from msgspec.structs import replace

from membership.planning.cluster_facts import ClusterFacts
from membership.store.records import Desired


def desired_by_agents(facts: ClusterFacts) -> Desired | None:
    """What the agents make desired, if that is something new."""
    per_agent, agents, before = facts.config.follow_agents, facts.state.agents, facts.desired
    if not per_agent or facts.state.active is not None or facts.state.paused(facts.now):
        return None
    leaving = {node for node, agent in agents.items() if agent.leaving}
    nodes = tuple(sorted({*before.nodes, *agents} - leaving))
    if nodes == before.nodes or not nodes:
        return None
    return replace(before, nodes=nodes, ranks=max(1, per_agent * len(nodes) - len(before.cordoned)))
