"""What must hold whatever happens. A broken promise is a `Violation`; looked for at commits, steps, tokens."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from chaos.simulation import promises
from membership.base.errors import ElasticError
from membership.base.rank_id import RankId
from membership.placement.plan import coverage
from membership.store.records import ClusterConfig, ClusterState

Rank = RankId
"""(rank, incarnation)"""


class Violation(ElasticError):
    """A promise is broken, or the model of the world is."""


def require(holds: object, what: str) -> None:
    """Violation unless it holds."""
    if not holds:
        raise Violation(what)


@dataclass
class Laws:
    """The promises about membership, and what of the past they depend on."""

    config: ClusterConfig
    epochs: list[int] = field(default_factory=list)
    evicted: set[Rank] = field(default_factory=set)
    members: dict[int, set[Rank]] = field(default_factory=dict)  # by committed epoch

    def changed(self, before: ClusterState, after: ClusterState) -> bool:
        """Check what follows from a controller's transaction; whether it committed a view."""
        keep(promises.broken(before, after))
        for state in (before, after):
            self.evicted |= left(state)
        active = [op for op in after.operations.values() if op.active]
        require(len(active) <= 1, f"two operations at once: {active}")
        placed = [s.id for a in after.assignments.values() for s in a.ranks]
        require(len({rank for rank, _ in placed}) == len(placed), f"two incarnations of a slot: {placed}")
        view = after.view
        if view is None or view == before.view:
            return False
        require(view.epoch == (before.view.epoch if before.view else 0) + 1, f"epoch {view.epoch} follows another")
        require(after.next is None, "a view is committed, and still staged")
        self.epochs.append(view.epoch)
        self.members[view.epoch] = {member.id for member in view.members}
        covered = coverage(view.placement, view.ranks, self.config.experts).min_live_replicas >= 1
        require(covered, f"epoch {view.epoch} lacks experts")
        require(set(view.placement) == set(view.ranks), f"epoch {view.epoch} places experts on others than its members")
        for member in view.members:
            require(member.id not in self.evicted, f"{member} is back")
        return True

    def whole(self, state: ClusterState, count: int) -> None:
        """The cluster is as asked for, with nothing left over."""
        serving = state.view.ranks if state.view is not None else ()
        require(len(serving) == count, f"{serving} serve, not {count}")
        require(state.next is None, "a view is left staged")
        members = {m.id for m in (state.view.members if state.view else ())}
        assigned = {s.id for a in state.assignments.values() for s in a.ranks}
        require(assigned == members, f"{assigned} are assigned, {members} serve")
        require(set(state.ranks) == members, f"{set(state.ranks)} have records, {members} serve")
        require(state.active is None, f"{state.active} goes on")
        keep(promises.settled(state))
        full = coverage(state.view.placement if state.view else {}, serving, self.config.experts)
        require(full.min_live_replicas == min(2, count), f"{full.min_live_replicas} replicas among {count} ranks")


def keep(broken: Iterable[str]) -> None:
    """Violation if there is anything broken."""
    for promise in broken:
        raise Violation(promise)


def left(state: ClusterState) -> set[Rank]:
    """Members that are out of the assignments: they must never come back."""
    kept = {s.id for a in state.assignments.values() for s in a.ranks}
    members = state.view.members if state.view else ()
    return {m.id for m in members} - kept
