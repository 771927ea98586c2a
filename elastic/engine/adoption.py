"""When the engine may adopt a newer view, and which of its members it must not use. Pure.

A member is usable once it has proved its queues to this engine. Until each member is usable or gone, the present view
stays in use: it serves well meanwhile. No record in the store is no death: after an outage an agent may be about to
write it again. But a missing record is awaited only as long as that takes: a dead host writes nothing. Unless the view
is of no use without those members: in a long outage of the store agents write nothing either, and a rank that is masked
serves no more.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

from elastic.engine.scheduler import uncovered
from membership.base.enums import Trigger
from membership.base.rank_id import RankId
from membership.planning.cluster_facts import ClusterFacts
from membership.store.records import ClusterState, View


@dataclass(frozen=True)
class Adoption:
    """What to do about the view in the store: adopt it if `waiting_for` is empty."""

    view: View
    masked: tuple[int, ...]
    waiting_for: tuple[int, ...]


def absent(view: View, state: ClusterState) -> set[RankId]:
    """Members without a record in the store. One that has joined is used anyway: its agent may be writing it again."""
    return {member.id for member in view.members} - state.ranks.keys()


def adoption(
    state: ClusterState,
    epoch: int,
    ready: Set[RankId],
    lost: Set[RankId],
    *,
    patient: bool = False,
    overdue: bool = False,
) -> Adoption | None:
    """The newer view in the store, if there is one. A member that is not ready when it is `overdue` counts as lost.

    A member without a record counts as lost sooner: once its end is certain, or when not `patient` any more and the
    others have its experts.
    """
    view = state.view
    if view is None or view.epoch <= epoch:
        return None
    gone = absent(view, state) - ready
    if gone:
        facts = ClusterFacts(state, 0.0)
        ended = {member.id for member in view.members if facts.ended(member)}
        if patient or _experts_missing(state, gone | lost) > _experts_missing(state, ended | lost):
            gone &= ended
    gone |= lost
    missing = [member for member in view.members if member.id not in gone | ready]
    masked = {member.rank for member in view.members if member.id in gone}
    if overdue:
        masked |= {member.rank for member in missing}
        missing = []
    return Adoption(view, tuple(sorted(masked)), tuple(sorted(member.rank for member in missing)))


def _experts_missing(state: ClusterState, without: Set[RankId]) -> int:
    if state.view is None or state.config is None:
        return 0
    return uncovered(state.view, (member.rank for member in state.view.members if member.id in without), state.config)


def leaving(view: View, state: ClusterState) -> tuple[int, ...]:
    """Ranks of the view in use that the next one leaves out: the committed one where that is newer, else the staged."""
    newer = next((v for v in (state.view, state.next) if v is not None and v.epoch > view.epoch), view)
    return tuple(member.rank for member in view.members if member not in newer.members)


def trigger(view: View, state: ClusterState, before: View | None) -> Trigger | None:
    """What the adopted view is for. None: a predecessor may have adopted it before us, which ended the change."""
    status = state.engine_status
    if any(operation.epoch == view.epoch for operation in state.operations.values()):
        return Trigger.SCALE
    if before is not None:
        return Trigger.between(before.ranks, view.ranks)
    return Trigger.START if view.epoch == 1 and not (status and status.epoch) else None
