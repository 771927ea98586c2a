"""What operations, pauses and the restart policy promise of each change: asked whenever a controller has written."""

from __future__ import annotations

from collections.abc import Iterator

from membership.store.records import ClusterState, Operation, Phase

FORWARD = (Phase.COMMITTED, Phase.RETIRING, Phase.DONE)


def broken(before: ClusterState, after: ClusterState) -> Iterator[str]:
    """What the change from one state to the other breaks, in words."""
    for operation in after.operations.values():
        was = before.operations.get(operation.id)
        if was is not None and was.phase is not operation.phase:
            yield from _of_phase(was, operation, after)


def unmasked(before: ClusterState, after: ClusterState) -> Iterator[str]:
    """Ranks that an engine took back into use within the epoch in which it had given them up."""
    was, now = before.engine_status, after.engine_status
    if was is not None and now is not None and (was.token, was.epoch) == (now.token, now.epoch):
        for rank in sorted(set(was.masked) - set(now.masked)):
            yield f"rank {rank} was masked in epoch {now.epoch}, and is in use again"


def early(before: ClusterState, after: ClusterState, now: float) -> Iterator[str]:
    """What the change breaks if it was made at `now`, by the clock of the controller that made it."""
    placed = {s.id for a in before.assignments.values() for s in a.ranks}
    for spec in (s for a in after.assignments.values() for s in a.ranks if s.id not in placed):
        last = before.exits.get(spec.rank)
        if last is not None and last.quarantined:
            yield f"rank {spec.rank} is started, and its slot is in quarantine"
        if last is not None and last.held_back_s(now):
            yield f"rank {spec.rank} is started {last.held_back_s(now):.3f} s before its slot may be filled again"
    view, staged = after.view, after.next
    rebalances = view is not None and staged is not None and set(staged.members) == set(view.members)
    if before.paused(now) and before.next is None and rebalances:
        yield f"a rebalance is staged during a pause: {staged}"


def _of_phase(was: Operation, operation: Operation, after: ClusterState) -> Iterator[str]:
    if was.cancelled and operation.phase in FORWARD and was.phase not in FORWARD:
        yield f"operation {operation.id} was cancelled, and is {operation.phase}"
    wanted = after.desired.ranks if after.desired is not None else 0
    if operation.phase is Phase.ABORTED and operation.previous not in (0, wanted):
        yield f"operation {operation.id} was rolled back, and {wanted} ranks are wanted, not {operation.previous}"


def idle(state: ClusterState, now: float) -> Iterator[str]:
    """What a controller breaks that has nothing to do in this state."""
    active = state.active
    if active is not None and active.deadline and now >= active.deadline:
        yield f"operation {active.id} goes on after its deadline"


def settled(state: ClusterState) -> Iterator[str]:
    """What is broken when nothing more happens though no fault lasts."""
    status = state.engine_status
    if status is not None and status.masked:
        yield f"ranks {status.masked} are out of use, and nobody replaces them"
