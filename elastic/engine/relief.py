"""Whether lost experts may be on their way back, so that requests that wait for them are not given up.

A model may load for minutes. What loads is ended by its agent once it makes no progress, what starts by the controller
once it is late: while there is any, the wait has an end. A slot whose rank has died, or could not prepare a view, since
the last view is not counted on again, with no view that it is in: it may fail for ever. A rank that serves is in every
view: where it cannot prepare one, that view alone is not counted on.
"""

from __future__ import annotations

from membership.base.timing import STORE_SILENCE_S
from membership.planning.cluster_facts import ClusterFacts
from membership.store.records import ClusterState


class Relief:
    """What is remembered while one view is in use: a process that cannot prepare another one leaves no trace."""

    def __init__(self) -> None:
        self._epoch = 0
        self._unable: set[int] = set()  # slots whose newcomer could not prepare a view

    def is_near(self, state: ClusterState, epoch: int, now: float, silent_s: float = 0.0) -> bool:
        """`epoch`: of the view in use. Whether a newer one is there or is prepared, or a rank starts that may join one.
        Nothing can join while the store is away; `silent_s`: for how long."""
        if epoch != self._epoch:
            self._epoch, self._unable = epoch, set()
        facts = ClusterFacts(state, now)
        if facts.view.epoch > epoch:
            return True
        if silent_s >= STORE_SILENCE_S:
            return False
        staged = frozenset(state.next.members) if state.next is not None else frozenset()
        self._unable |= {member.rank for member in facts.failed if member not in facts.members}
        untried = state.next is not None and not state.next.attempt and not facts.failed
        if untried and self._unable.isdisjoint(member.rank for member in staged):
            return True
        newest = max((member.incarnation for member in facts.members), default=0)
        out = self._unable | {rank for rank, last in state.exits.items() if last.incarnation > newest}
        return any(not n.trouble and n.member not in staged for rank, n in facts.newcomers.items() if rank not in out)
