"""What must hold in every episode. A broken invariant is a `Violation`; checked at commits, steps, tokens, in the end.

`Invariants` remembers what it needs of the past. The functions below it compare two states, and yield what is broken.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from membership.base.errors import ElasticError
from membership.base.rank_id import RankId
from membership.placement.plan import coverage
from membership.store.records import ClusterConfig, ClusterState, Operation, Phase

FORWARD = (Phase.COMMITTED, Phase.RETIRING, Phase.DONE)


class Violation(ElasticError):
    """An invariant of the product is broken, or one of the simulation itself."""


def require(holds: object, what: str) -> None:
    """Violation unless it holds."""
    if not holds:
        raise Violation(what)


def require_none(broken: Iterable[str]) -> None:
    """Violation if anything is broken."""
    for invariant in broken:
        raise Violation(invariant)


@dataclass
class Invariants:
    """The invariants of the membership."""

    config: ClusterConfig
    epochs: list[int] = field(default_factory=list)
    evicted: set[RankId] = field(default_factory=set)
    members: dict[int, set[RankId]] = field(default_factory=dict)  # by committed epoch

    def changed(self, before: ClusterState, after: ClusterState) -> bool:
        """Check a controller's transaction; whether it committed a view."""
        require_none(operations_broken(before, after))
        for state in (before, after):
            self.evicted |= members_of(state) - assigned(state)
        active = [op for op in after.operations.values() if op.active]
        require(len(active) <= 1, f"two operations at once: {active}")
        placed = [s.rank for a in after.assignments.values() for s in a.ranks]
        require(len(set(placed)) == len(placed), f"two incarnations of a slot: {placed}")
        view = after.view
        if view is None or view == before.view:
            return False
        require(view.epoch == (before.view.epoch if before.view else 0) + 1, f"epoch {view.epoch} follows another")
        require(after.next is None, "a view is committed, and still staged")
        self.epochs.append(view.epoch)
        self.members[view.epoch] = members_of(after)
        covered = coverage(view.placement, view.ranks, self.config.experts).min_live_replicas >= 1
        require(covered, f"epoch {view.epoch} lacks experts")
        require(set(view.placement) == set(view.ranks), f"epoch {view.epoch} places experts on others than its members")
        for member in view.members:
            require(member.id not in self.evicted, f"{member} is back")
        return True

    def whole(self, state: ClusterState, count: int) -> None:
        """Violation unless `count` ranks serve, as requested, and nothing is left over."""
        serving = state.view.ranks if state.view is not None else ()
        require(len(serving) == count, f"{serving} serve, not {count}")
        require(state.next is None, "a view is left staged")
        members, placed = members_of(state), assigned(state)
        require(placed == members, f"{placed} are assigned, {members} serve")
        require(set(state.ranks) == members, f"{set(state.ranks)} have records, {members} serve")
        require(state.active is None, f"{state.active} goes on")
        require_none(settled(state))
        full = coverage(state.view.placement if state.view else {}, serving, self.config.experts)
        require(full.min_live_replicas == min(2, count), f"{full.min_live_replicas} replicas among {count} ranks")


def members_of(state: ClusterState) -> set[RankId]:
    """The members of the committed view."""
    return {m.id for m in (state.view.members if state.view else ())}


def assigned(state: ClusterState) -> set[RankId]:
    """The ranks that agents are to run."""
    return {s.id for a in state.assignments.values() for s in a.ranks}


def operations_broken(before: ClusterState, after: ClusterState) -> Iterator[str]:
    """Operations that were committed after their cancellation, or were not rolled back completely."""
    wanted = after.desired.ranks if after.desired is not None else 0
    for operation in after.operations.values():
        was = before.operations.get(operation.id)
        if was is not None and was.phase is not operation.phase:
            yield from _phase_broken(was, operation, wanted)


def _phase_broken(was: Operation, operation: Operation, wanted: int) -> Iterator[str]:
    if was.cancelled and operation.phase in FORWARD and was.phase not in FORWARD:
        yield f"operation {operation.id} was cancelled, and is {operation.phase}"
    if operation.phase is Phase.ABORTED and operation.previous not in (0, wanted):
        yield f"operation {operation.id} was rolled back, and {wanted} ranks are wanted, not {operation.previous}"


def unmasked(before: ClusterState, after: ClusterState) -> Iterator[str]:
    """Ranks that an engine uses again within the epoch in which it had masked them."""
    was, now = before.engine_status, after.engine_status
    if was is not None and now is not None and (was.token, was.epoch) == (now.token, now.epoch):
        for rank in sorted(set(was.masked) - set(now.masked)):
            yield f"rank {rank} was masked in epoch {now.epoch}, and is in use again"


def early(before: ClusterState, after: ClusterState, now: float) -> Iterator[str]:
    """What a controller did too early by its own clock `now`: restarts during a backoff, rebalances during a pause."""
    placed = assigned(before)
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


def idle(state: ClusterState, now: float) -> Iterator[str]:
    """What is broken if a controller finds nothing to do in this state."""
    active = state.active
    if active is not None and active.deadline and now >= active.deadline:
        yield f"operation {active.id} goes on after its deadline"


def settled(state: ClusterState) -> Iterator[str]:
    """What is broken if nothing more happens in this state, although no fault is present."""
    status = state.engine_status
    if status is not None and status.masked:
        yield f"ranks {status.masked} are out of use, and are not replaced"
