"""The size of a cluster with `--follow-agents`: N ranks per node. Pure.

A node counts from when its agent first registers until its agent announces that it leaves. An agent that disappears
without that is a fault: its ranks stay desired, and run on other nodes or, once it is back, on its own.
"""

from __future__ import annotations

from msgspec.structs import replace

from membership.planning.cluster_facts import ClusterFacts
from membership.store.records import Desired


def desired_by_agents(facts: ClusterFacts) -> Desired | None:
    """Return the desired state that the registered agents imply, if it differs from the current one."""
    per_agent, agents, before = facts.config.follow_agents, facts.state.agents, facts.desired
    if not per_agent or facts.state.active is not None or facts.state.paused(facts.now):
        return None
    leaving = {node for node, agent in agents.items() if agent.leaving}
    nodes = tuple(sorted({*before.nodes, *agents} - leaving))
    if nodes == before.nodes or not nodes:
        return None
    return replace(before, nodes=nodes, ranks=max(1, per_agent * len(nodes) - len(before.cordoned)))
