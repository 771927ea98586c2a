"""The state of scaling as an operator of Kubernetes reads it: which operation, how far, which ranks may be ended. Pure.

The shape is what Dynamo asks of engines with elastic expert parallelism. A controller that lost its connection, or was
started anew, finds its operation here by id, and needs not guess from the state of pods.
"""

from __future__ import annotations

import msgspec

from membership.planning.cluster_facts import ClusterFacts
from membership.store.records import ClusterState, Operation

IDLE = "idle"


class ScalingStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The last operation, active or ended, and the sizes and ranks. Of the ranks, each is in one list at most."""

    instance_id: str  # another one once another engine has taken over; operations go on all the same
    operation_id: str  # "" if there was none
    kind: str
    phase: str  # idle (no operation yet), or an operation's phase; it ends as done or aborted
    requested_size: int
    effective_size: int  # of the committed view
    pending_size: int | None  # what the active operation leads to; null: none is active
    epoch: int
    active_ranks: tuple[int, ...]  # of the committed view, and alive
    unavailable_ranks: tuple[int, ...]  # of the committed view, and dead: their successors are on their way
    joining_ranks: tuple[int, ...]  # started, and not in the view yet
    retiring_ranks: tuple[int, ...]  # out of the view, and their processes have not ended yet
    safe_to_terminate_ranks: tuple[int, ...]  # slots that hold nothing, and that nothing is on its way to
    safe_to_terminate_nodes: tuple[str, ...]  # hosts of which that is true altogether
    last_error: str  # of that operation
    trouble: str  # why all this may be out of date; then nothing is safe


def scaling_status(state: ClusterState, now: float, trouble: str = "") -> ScalingStatus:
    """Describe it. `trouble`: of the mirror. ConfigError: there is no cluster yet."""
    facts = ClusterFacts(state, now)
    config, operation = facts.config, _last(state)
    members, alive = {m.rank for m in facts.members}, {m.rank for m in facts.alive}
    joining = facts.newcomers.keys() - members
    retiring = {rank.rank for rank in facts.lingering} - members - joining
    certain = not trouble and _settled(facts)
    used = members | joining | retiring | set(facts.desired.slots) | set(state.next.ranks if state.next else ())
    return ScalingStatus(
        instance_id=f"{config.cluster}-{state.engine_token}",
        operation_id=operation.id if operation else "",
        kind=operation.kind if operation else "",
        phase=operation.phase if operation else IDLE,
        requested_size=facts.desired.ranks,
        effective_size=len(members),
        pending_size=operation.target if operation and operation.active else None,
        epoch=facts.view.epoch,
        active_ranks=tuple(sorted(alive)),
        unavailable_ranks=tuple(sorted(members - alive)),
        joining_ranks=tuple(sorted(joining)),
        retiring_ranks=tuple(sorted(retiring)),
        safe_to_terminate_ranks=tuple(sorted(set(range(config.max_ranks)) - used)) if certain else (),
        safe_to_terminate_nodes=_empty_nodes(facts) if certain else (),
        last_error=operation.error if operation else "",
        trouble=trouble,
    )


def _last(state: ClusterState) -> Operation | None:
    return state.active or next(reversed(state.history), None)


def _settled(facts: ClusterFacts) -> bool:
    """Whether the wanted slots are chosen, and the engine uses the committed view. Until then none is safe."""
    status = facts.state.engine_status
    current = status is not None and status.token == facts.state.engine_token and status.epoch == facts.view.epoch
    return current and bool(facts.members) and len(facts.desired.slots) == facts.desired.ranks


def _empty_nodes(facts: ClusterFacts) -> tuple[str, ...]:
    busy = {m.node for m in facts.members} | {node for node, _ in facts.assigned.values()}
    busy |= {facts.state.ranks[rank].node for rank in facts.lingering} | facts.offices
    return tuple(sorted(facts.state.agents.keys() - busy))
