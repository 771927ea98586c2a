"""A rebalance on request: what it would move, given the measured loads, and how to request it.

The request is a record that the background rebalance reads. For a minute, or until a view is staged, the rebalance
neither rests nor ignores small imbalances. It moves one budget's worth; the remainder follows in the background.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable

import msgspec
from msgspec.structs import replace

from membership.base.errors import PlanRefused
from membership.operations.pause import paused_words
from membership.placement.balance import imbalance
from membership.placement.plan import moves
from membership.planning.cluster_facts import ClusterFacts
from membership.planning.planner import quiet
from membership.planning.rebalance import loads_of, rebalance
from membership.store.codec import encode
from membership.store.interface import Compare, Put, Store
from membership.store.keys import Keys, state_from
from membership.store.records import ClusterState, RebalanceRequest


class RebalancePlan(msgspec.Struct, frozen=True, kw_only=True):
    """What a rebalance would do now. `refused`: why it would be refused; "" if it would not."""

    epoch: int = 0  # the current one
    reason: str = ""  # redundancy or balance
    layers: dict[int, int] = {}  # MoE layer -> number of experts loaded in it
    loads: dict[int, int] = {}  # rank -> number of experts that it loads
    slots: int = 0  # experts loaded in all
    bytes_moved: int = 0
    imbalance_before: float | None = None  # the busiest rank's load over the mean; None: not measured yet
    imbalance_after: float | None = None
    unfinished: bool = False  # more steps follow: one change's byte budget is too small
    unasked: bool = False  # it is about to happen in the background anyway
    waits: bool = False  # the cluster is not quiet: it starts afterwards
    refused: str = ""

    @property
    def changes(self) -> bool:
        """Whether it would change anything."""
        return not self.refused and self.slots > 0


def plan_rebalance(state: ClusterState, now: float) -> RebalancePlan:
    """Return what a rebalance request would do from this state. Pure; changes nothing."""
    if state.config is None or state.view is None or not state.view.members:
        return RebalancePlan(refused="the cluster is still starting: it has no view yet")
    config, view = state.config, state.view
    loads = loads_of(config, state.expert_load)
    plan = RebalancePlan(epoch=view.epoch, imbalance_before=imbalance(view.placement, loads) if loads else None)
    if not config.rebalance_bytes:
        return replace(plan, refused="this cluster never rebalances (it was started with --rebalance-budget 0)")
    if state.pause is not None and state.paused(now):
        return replace(plan, refused=paused_words(state.pause, now))
    better = rebalance(ClusterFacts(replace(state, rebalance=_request(state, now)), now))
    if better is None:
        return plan
    needed = moves(view.placement, better.placement)
    return replace(
        plan,
        reason=better.reason,
        layers=dict(sorted(Counter(move.layer for move in needed).items())),
        loads=dict(sorted(Counter(move.rank for move in needed).items())),
        slots=len(needed),
        bytes_moved=len(needed) * config.expert_bytes,
        imbalance_after=imbalance(better.placement, loads) if loads else None,
        unfinished=better.unfinished,
        unasked=rebalance(ClusterFacts(replace(state, rebalance=None), now)) is not None,
        waits=not quiet(ClusterFacts(state, now)),
    )


def request_rebalance(
    store: Store, cluster: str, by: str = "", clock: Callable[[], float] = time.time
) -> RebalancePlan:
    """Request a rebalance now; return what it does if nothing changes first. PlanRefused: it is refused."""
    keys, now = Keys(cluster), clock()
    revision, items = store.range(keys.prefix)
    state = state_from(items, revision)
    plan = plan_rebalance(state, now)
    if plan.refused:
        raise PlanRefused(plan.refused)
    if plan.changes:
        request = replace(_request(state, now), by=by)
        store.txn([Compare(keys.config, "mod", ">", 0)], [Put(keys.rebalance, encode(request))])
    return plan


def _request(state: ClusterState, now: float) -> RebalanceRequest:
    """A request with a time later than the view's, even if our clock is behind."""
    return RebalanceRequest(at=max(now, state.view.staged + 0.001) if state.view is not None else now)
