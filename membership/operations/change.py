"""A change request: a new size, or ranks to drain or undrain; what it makes desired, and why it is refused. Pure.

A drained slot is *cordoned*: it does not count towards the size, and no rank starts in it until it is undrained.
"""

from __future__ import annotations

import msgspec
from msgspec.structs import replace

from membership.base.enums import OperationKind
from membership.planning.cluster_facts import scale_refusal
from membership.store.records import ClusterConfig, ClusterState, Desired, Operation


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """`scale` to `target` ranks; `drain` these `ranks`, or `undrain` them."""

    kind: OperationKind = OperationKind.SCALE
    target: int = 0
    ranks: tuple[int, ...] = ()

    def __str__(self) -> str:
        return describe_change(self)


def describe_change(change: Change | Operation) -> str:
    """The change, or the operation that carries it, in words."""
    named = ", ".join(map(str, change.ranks))
    return f"{change.kind} of rank {named}" if named else f"{change.kind} to {change.target}"


def scale(target: int) -> Change:
    """Change the size to `target` ranks."""
    return Change(target=target)


def drain(*ranks: int) -> Change:
    """Remove these ranks; their slots stay empty."""
    return Change(kind=OperationKind.DRAIN, ranks=tuple(sorted(set(ranks))))


def undrain(*ranks: int) -> Change:
    """Fill these slots again."""
    return Change(kind=OperationKind.UNDRAIN, ranks=tuple(sorted(set(ranks))))


def desired_by(change: Change, before: Desired) -> Desired:
    """What is desired once the change is accepted."""
    if change.kind is OperationKind.DRAIN:
        cordoned = tuple(sorted({*before.cordoned, *change.ranks}))
        return replace(before, ranks=before.ranks - len(change.ranks), cordoned=cordoned)
    if change.kind is OperationKind.UNDRAIN:
        cordoned = tuple(slot for slot in before.cordoned if slot not in change.ranks)
        return replace(before, ranks=before.ranks + len(change.ranks), cordoned=cordoned)
    return replace(before, ranks=change.target)


def refusal(change: Change, state: ClusterState, config: ClusterConfig) -> str:
    """Return why the change is refused in this state, or "" if it is not."""
    before = state.desired or Desired(ranks=0)
    if change.kind is OperationKind.SCALE:
        drained = len(before.cordoned)
        if config.follow_agents:
            return (
                f"the size follows the agents, {config.follow_agents} ranks for each: start or stop one (elastic agent)"
            )
        if drained and change.target + drained > config.max_ranks:
            return (
                f"{change.target} ranks and {drained} drained slots are more than the {config.max_ranks} slots that "
                "the cluster was started for (--max-ranks): undrain some, or have fewer ranks"
            )
        return scale_refusal(config, change.target)
    if not change.ranks:
        return "no rank is named"
    for rank in change.ranks:
        if trouble := _trouble(change, rank, state, before):
            return trouble
    if change.kind is OperationKind.DRAIN and len(change.ranks) >= before.ranks:
        return f"no rank would be left: the cluster has {before.ranks} ranks"
    return scale_refusal(config, desired_by(change, before).ranks)


def _trouble(change: Change, rank: int, state: ClusterState, before: Desired) -> str:
    drained = rank in before.cordoned
    if change.kind is OperationKind.DRAIN:
        known = before.slots or (state.view.ranks if state.view else ())
        return f"rank {rank} is drained already" if drained else "" if rank in known else f"there is no rank {rank}"
    last = state.exits.get(rank)
    if drained and last is not None and last.quarantined:
        return f"rank {rank} is in quarantine: first, elastic unquarantine {rank}"
    return "" if drained else f"rank {rank} is not drained"
