"""Kills a rank on request, as a fault would end it: what `helm test` does to see that no request fails by it.

The request names one incarnation, so a late reader never kills the successor. Only an agent whose operator has allowed
it (`--allow-kill`) obeys, and only such a rank's request is written.
"""

from __future__ import annotations

from membership.base.errors import ConfigError, PlanRefused
from membership.store.codec import encode
from membership.store.interface import Compare, Put, Store
from membership.store.keys import Keys, state_from
from membership.store.records import ClusterState, KillRequest


def kill(store: Store, cluster: str, rank: int, by: str = "") -> KillRequest:
    """Have the rank that serves in this slot killed; return whom. ConfigError: none does. PlanRefused: not allowed."""
    keys = Keys(cluster)
    revision, items = store.range(keys.prefix)
    request = killing(state_from(items, revision), rank, by)
    unchanged = [Compare(keys.view, "mod", "<", revision + 1)]
    if not store.txn(unchanged, [Put(keys.kill, encode(request))]).succeeded:
        raise PlanRefused("the cluster's members have just changed", hint="look at the new state, then decide again")
    return request


def killing(state: ClusterState, rank: int, by: str) -> KillRequest:
    """The request, if it may be made in this state."""
    members = state.view.members if state.view is not None else ()
    member = next((each for each in members if each.rank == rank), None)
    record = state.ranks.get(member.id) if member is not None else None
    if member is None or record is None:
        raise ConfigError(f"no rank {rank} serves", hint="see: elastic status")
    agent = state.agents.get(record.node)
    if agent is None or not agent.killable:
        raise PlanRefused(
            f"ranks of node {record.node!r} may not be killed on request", hint="start its agent with --allow-kill"
        )
    return KillRequest(rank=rank, incarnation=member.incarnation, by=by)
