"""What somebody asks of the cluster, what that makes desired, and how it is taken back. Pure.

A drained slot is *cordoned*: it belongs to nobody's count and no rank is started in it until it is undrained.
"""

from __future__ import annotations

from typing import Literal

import msgspec
from msgspec.structs import replace

from membership.planning.cluster_facts import scale_refusal
from membership.store.records import ClusterConfig, ClusterState, Desired, Operation

Kind = Literal["scale", "drain", "undrain"]


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """`scale` to `target` ranks; `drain` these `ranks`, or `undrain` them."""

    kind: Kind = "scale"
    target: int = 0
    ranks: tuple[int, ...] = ()

    def __str__(self) -> str:
        return describe_change(self)


def describe_change(change: Change | Operation) -> str:
    """The change, or the operation made of it, in words."""
    named = ", ".join(map(str, change.ranks))
    return f"{change.kind} of rank {named}" if named else f"{change.kind} to {change.target}"


def scale(target: int) -> Change:
    """So many ranks."""
    return Change(target=target)


def drain(*ranks: int) -> Change:
    """These ranks leave; their slots stay empty."""
    return Change(kind="drain", ranks=tuple(sorted(set(ranks))))


def undrain(*ranks: int) -> Change:
    """These slots are filled again."""
    return Change(kind="undrain", ranks=tuple(sorted(set(ranks))))


def desired_by(change: Change, before: Desired) -> Desired:
    """What is desired once the change is granted."""
    if change.kind == "drain":
        cordoned = tuple(sorted({*before.cordoned, *change.ranks}))
        return replace(before, ranks=before.ranks - len(change.ranks), cordoned=cordoned)
    if change.kind == "undrain":
        cordoned = tuple(slot for slot in before.cordoned if slot not in change.ranks)
        return replace(before, ranks=before.ranks + len(change.ranks), cordoned=cordoned)
    return replace(before, ranks=change.target)


def refusal(change: Change, state: ClusterState, config: ClusterConfig) -> str:
    """Return why this cannot be granted in this state, or "" if it can."""
    before = state.desired or Desired(ranks=0)
    if change.kind == "scale" and config.follow_agents:
        return f"the size follows the agents, {config.follow_agents} ranks for each: start or stop one (elastic agent)"
    if change.kind == "scale" and change.target + len(before.cordoned) > config.max_ranks and before.cordoned:
        return (
            f"{change.target} ranks and {len(before.cordoned)} drained slots are more than the "
            f"{config.max_ranks} slots that the cluster was started for (--max-ranks): "
            "undrain some, or have fewer ranks"
        )
    if change.kind == "scale":
        return scale_refusal(config, change.target)
    if not change.ranks:
        return "no rank is named"
    for rank in change.ranks:
        if trouble := _trouble(change, rank, state, before):
            return trouble
    if change.kind == "drain" and len(change.ranks) >= before.ranks:
        return f"nobody would be left: the cluster has {before.ranks} ranks"
    return scale_refusal(config, desired_by(change, before).ranks)


def _trouble(change: Change, rank: int, state: ClusterState, before: Desired) -> str:
    drained = rank in before.cordoned
    if change.kind == "drain":
        known = before.slots or (state.view.ranks if state.view else ())
        return f"rank {rank} is drained already" if drained else "" if rank in known else f"there is no rank {rank}"
    last = state.exits.get(rank)
    if drained and last is not None and last.quarantined:
        return f"rank {rank} is in quarantine: first, elastic unquarantine {rank}"
    return "" if drained else f"rank {rank} is not drained"
