"""Whether lost experts may be on their way back, so that requests that wait for them are not given up. Pure.

A model may load for minutes. What loads is ended by its agent once it makes no progress, what starts by the controller
once it is late: while there is any, the wait has an end. A slot whose rank has died since the last view is not counted
on again, nor is a view that could not be prepared: they may fail for ever.
"""

from __future__ import annotations

from membership.planning.cluster_facts import ClusterFacts
from membership.store.records import ClusterState


def is_near(state: ClusterState, epoch: int, now: float) -> bool:
    """`epoch`: of the view in use. Whether a newer one is there or is prepared, or a rank starts that may join one."""
    facts = ClusterFacts(state, now)
    if facts.view.epoch > epoch:
        return True
    if state.next is not None and not state.next.attempt and not facts.failed:
        return True
    newest = max((member.incarnation for member in facts.members), default=0)
    died = {rank for rank, last in state.exits.items() if last.incarnation > newest}
    return any(not newcomer.trouble for rank, newcomer in facts.newcomers.items() if rank not in died)
