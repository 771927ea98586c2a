"""The placement of experts on ranks: coverage first, then balance, then fewest moves. Pure and deterministic.

Each layer has `redundancy` slots per expert, at most one per rank. An expert gets the whole part of the redundancy as
replicas on distinct ranks, in two or more zones where there is room, else on two or more machines; the remaining slots
go to the hottest experts.
Ranks have equal numbers of slots (within one, per layer and in total) and keep what they hold as far as possible: a
rank that joins takes its share, and little else moves. After a loss, `repair` places orphaned experts only; redundancy
and balance come back later (`membership/planning/rebalance.py`).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from membership.base.errors import PlanRefused
from membership.placement.bulk_fill import bulk_fill, replica_counts
from membership.placement.layer_plan import LayerPlan
from membership.placement.surplus import Surplus
from membership.placement.tally import Places, held, held_by, held_in, levels_of, placement_of, replicas_of, tally
from membership.store.records import Placement

Loads = Sequence[Sequence[float]]
"""For each MoE layer, how much work each expert had."""

MANY = 4000  # above this number of missing replicas, bulk fill comes first
_ROUNDING = 1e-9  # 1.1 * 10 slots are 11, whatever the floating point says


class Move(NamedTuple):
    """A rank takes an expert of a layer that it did not hold."""

    rank: int
    layer: int
    expert: int


class Coverage(NamedTuple):
    """How well live ranks cover the experts: the fewest live replicas, and the (layer, expert) pairs with none."""

    min_live_replicas: int
    uncovered: tuple[tuple[int, int], ...]


def max_ranks_allowed(experts: int, redundancy: float) -> int:
    """Return the largest number of ranks that can each hold an expert of each layer."""
    return int(min(experts * redundancy, sys.maxsize) + _ROUNDING)


def refusal(experts: int, redundancy: float, ranks: int) -> str:
    """Return why the experts cannot be placed on this number of ranks, or "" if they can."""
    if experts < 1:
        return f"a model with {experts} experts per layer cannot be placed"
    if not 1 <= redundancy < math.inf:
        return f"redundancy {redundancy:g} would leave experts without a holder; it must be at least 1"
    if ranks < 1:
        return f"{ranks} ranks cannot hold anything; at least 1 is needed"
    most = max_ranks_allowed(experts, redundancy)
    if ranks > most:
        return (
            f"{ranks} ranks are more than the {most} slots per layer ({experts} experts x redundancy {redundancy:g}): "
            "a rank would hold no expert"
        )
    return ""


def thin_spread(redundancy: float, ranks: int) -> str:
    """Return what is less redundant than asked for on this number of ranks, or "": a rank holds an expert once."""
    if redundancy <= ranks:
        return ""
    needed = math.ceil(redundancy)
    return f"--redundancy {redundancy:g} needs {needed} ranks: on {ranks} ranks, each expert has {ranks} replicas"


def plan(
    moe_layers: int,
    experts: int,
    ranks: Collection[int],
    redundancy: float,
    current: Placement | None = None,
    loads: Loads | None = None,
    nodes: Places | None = None,
) -> Placement:
    """Return the placement on `ranks`. `current`: what live ranks hold; a rank that is not in it holds nothing.

    `loads` [layer][expert]: measured load; None: equal. `nodes`: where ranks are; None: all on one machine.
    PlanRefused if the experts cannot be placed.
    """
    reason = refusal(experts, redundancy, len(ranks))
    if reason:
        raise PlanRefused(reason)
    order = sorted(ranks)
    found = held_in(order, current or {})
    holds = held_by(moe_layers, experts, order, found)
    levels = levels_of(order, nodes or {})
    slots = min(max_ranks_allowed(experts, redundancy), experts * len(order))
    weights = np.ones((moe_layers, experts)) if loads is None else np.asarray(loads, dtype=np.float64)
    replicas = replica_counts(slots, weights, replicas_of(found, moe_layers, experts), len(order))
    share = weights / replicas
    now = tally(found, share, levels)
    odd = _OddSlots(slots, now.size)
    capacity = np.array([odd.capacity(layer) for layer in range(moe_layers)])
    if loads is None and not now.total.any() and levels[-1].max() == 0:  # all layers are the same problem
        LayerPlan(0, holds, replicas, share, capacity, levels, now).place()
        for layer in range(1, moe_layers):
            holds[layer] = np.roll(holds[0], layer * (slots % len(order) or 1), axis=0)
        return placement_of(holds, order)
    Surplus(holds, now, replicas, capacity, levels).drop(found)
    for level in levels:  # where zones cannot have equal parts, machines share what is left
        if slots * moe_layers - holds.sum() > MANY:
            bulk_fill(holds, replicas, share, capacity, level)
    now = tally(held(holds), share, levels)
    for layer in range(moe_layers):
        LayerPlan(layer, holds, replicas, share, capacity, levels, now).place()
    return placement_of(holds, order)


def repair(moe_layers: int, experts: int, current: Placement) -> Placement:
    """Return what live ranks hold plus each orphaned expert on the rank that holds least: the smallest full cover."""
    order = sorted(current)
    found = held_in(order, current)
    orphans = np.argwhere(replicas_of(found, moe_layers, experts) == 0).tolist()
    if not orphans:
        return {rank: current[rank] for rank in order}
    holds = held_by(moe_layers, experts, order, found)
    total = holds.sum(axis=(0, 2))
    for layer, expert in orphans:
        row = int(np.lexsort((total, holds[layer].sum(axis=1)))[0])
        holds[layer, row, expert] = True
        total[row] += 1
    return placement_of(holds, order)


class _OddSlots:
    """Assigns the odd slots (slots per layer modulo ranks), so that ranks have equal numbers over all layers.

    Each rank has a budget of odd slots. Within it, a layer prefers ranks that hold an odd slot now. A rank whose budget
    equals the number of layers left gets one in each, so all budgets are spent exactly.
    """

    def __init__(self, slots: int, size: NDArray[np.int64]) -> None:
        self.layers, rows = size.shape
        self.whole, self.odd = divmod(slots, rows)
        self.extra = size > self.whole
        least, rest = divmod(self.layers * self.odd, rows)
        self.budget = np.full(rows, least, dtype=np.int64)
        self.budget[np.argsort(-self.extra.sum(axis=0), kind="stable")[:rest]] += 1

    def capacity(self, layer: int) -> NDArray[np.int64]:
        """Return [row]: each rank's slots in this layer. To be called once per layer, in order."""
        forced = self.budget == self.layers - layer
        order = np.lexsort((-self.budget, ~self.extra[layer], ~forced, self.budget == 0))
        capacity = np.full(self.budget.size, self.whole, dtype=np.int64)
        capacity[order[: self.odd]] += 1
        self.budget[order[: self.odd]] -= 1
        return capacity


def coverage(placement: Placement, live_ranks: Iterable[int], experts: int | None = None) -> Coverage:
    """Return how `live_ranks` cover the experts of `placement`, or of a model with this number of experts per layer."""
    live = set(live_ranks) & placement.keys()
    pairs = {(layer, e) for held in placement.values() for layer, row in enumerate(held) for e in row}
    if experts is not None:
        layers = max((len(held) for held in placement.values()), default=0)
        pairs = {(layer, expert) for layer in range(layers) for expert in range(experts)}
    count = dict.fromkeys(pairs, 0)
    for rank in live:
        for layer, row in enumerate(placement[rank]):
            for expert in row:
                count[layer, expert] += 1
    return Coverage(min(count.values(), default=0), tuple(sorted(pair for pair, n in count.items() if n == 0)))


def moves(before: Mapping[int, tuple[tuple[int, ...], ...]], after: Placement) -> list[Move]:
    """Return the expert loads that lead from one placement to the other, sorted by rank, layer and expert."""
    found: list[Move] = []
    for rank in sorted(after):
        old = before.get(rank, ())
        for layer, row in enumerate(after[rank]):
            had = set(old[layer]) if layer < len(old) else set()
            found += [Move(rank, layer, expert) for expert in row if expert not in had]
    return found
