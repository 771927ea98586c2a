"""Load balance: the imbalance of a placement, and a better placement. Pure and deterministic.

Each replica is assumed to get an equal part of its expert's load, as `workers/exchange/router.py` distributes it. A
layer is as slow as its busiest rank, so imbalance is the busiest rank's load over the mean, averaged over the layers.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from membership.placement.local_search import LocalSearch, Swap
from membership.placement.plan import Loads
from membership.placement.tally import (
    Bools,
    Floats,
    Held,
    Ints,
    Places,
    held_by,
    held_in,
    levels_of,
    placement_of,
    replicas_of,
    sums,
)
from membership.store.records import Placement

PRIOR = 0.02  # each expert counts for at least this part of the mean load: an idle one may become busy


def imbalance(placement: Placement, loads: Loads) -> float:
    """Return the busiest rank's load over the mean rank's, averaged over the layers; 1.0 is perfect."""
    weights = _weights(loads)
    uneven = _uneven(held_in(sorted(placement), placement), len(placement), weights)
    return float(uneven.mean()) if uneven.size else 1.0


@dataclass(frozen=True)
class Search:
    """Moves that lower the busiest ranks' load in the searched `layers`, in the order in which they were found: at most
    one per layer in each step."""

    placement: Placement
    holds: Bools
    layers: Ints  # the most uneven one first
    before: float  # imbalance of these layers
    reached: float  # the same after all steps
    steps: tuple[Swap, ...]
    others: Callable[[], bool]  # whether there are moves in layers that were not searched

    @property
    def moves(self) -> int:
        """The number of expert loads in all steps."""
        return sum(step.layer.size for step in self.steps)

    def after(self, most_moves: int) -> Placement:
        """Return the placement after at most this many expert loads, worst layers first."""
        holds, left = self.holds.copy(), most_moves
        for layer in self.layers.tolist():
            for step in self.steps:
                mine = step.layer == layer
                if not mine.any():
                    break
                left -= int(mine.sum())
                if left < 0:
                    return placement_of(holds, sorted(self.placement))
                for row, old, new in zip(step.row[mine], step.old[mine], step.new[mine], strict=True):
                    holds[layer, row, old], holds[layer, row, new] = False, True
        return placement_of(holds, sorted(self.placement))


def search(
    placement: Placement,
    loads: Loads,
    nodes: Places,
    redundancy: float,
    *,
    exchanges: bool = True,
    slots: int = sys.maxsize,
) -> Search:
    """Search for a better placement of the most uneven layers that can be improved, as many as have `slots` slots.

    Ranks swap experts (if `exchanges`), and replicas beyond the redundancy's whole part go from cold experts to hot
    ones. No rank's number of slots changes, and no expert ends in fewer than two zones or on fewer than two
    machines (or fewer than it has now).
    """
    order, weights = sorted(placement), _weights(loads)
    found = held_in(order, placement)
    holds, levels = held_by(len(weights), weights.shape[1], order, found), levels_of(order, nodes)
    floor = min(int(redundancy), len(order))

    def local(layers: Ints) -> LocalSearch:
        return LocalSearch(holds[layers], weights[layers], levels, floor, exchanges=exchanges)

    uneven = _uneven(found, len(order), weights)
    worst = np.argsort(-uneven, kind="stable")
    number = max(1, slots * len(weights) // max(1, found.layer.size))
    steps: tuple[Swap, ...] = ()
    layers, left, reached = worst[:0], worst, 1.0
    while left.size and not steps:
        layers, left = left[:number], left[number:]
        searched = local(layers)
        steps = tuple(step._replace(layer=layers[step.layer]) for step in searched.steps())
        reached = float((searched.load.max(axis=1) / searched.load.mean(axis=1)).mean())
    before = float(uneven[layers].mean()) if layers.size else 1.0

    def others() -> bool:
        parts = (left[at : at + number] for at in range(0, left.size, number))  # the first has some, as a rule
        return any(next(local(part).steps(), None) is not None for part in parts)

    return Search(placement, holds, layers, before, reached, steps, others)


def balanced(placement: Placement, loads: Loads, nodes: Places, redundancy: float, most_moves: int) -> Placement:
    """Return a better placement within `most_moves` expert loads; the same placement if there is none."""
    return search(placement, loads, nodes, redundancy, exchanges=most_moves > 1).after(most_moves)


def _weights(loads: Loads) -> Floats:
    weights = np.asarray(loads, dtype=np.float64)
    mean = weights.mean(axis=1, keepdims=True)
    return weights + np.where(mean > 0, PRIOR * mean, 1.0)


def _uneven(found: Held, rows: int, weights: Floats) -> Floats:
    """Per layer the busiest rank's load over the mean rank's."""
    share = weights / np.maximum(replicas_of(found, len(weights), weights.shape[1]), 1)
    load = sums((len(weights), rows), share[found.layer, found.expert], found.layer, found.row)
    uneven: Floats = load.max(axis=1) / load.mean(axis=1)
    return uneven


def cut(current: Placement, wanted: Placement, moe_layers: int, experts: int, most_moves: int) -> Placement:
    """Return the placement after the first `most_moves` loads from `current` to `wanted`, fewest replicas first.

    A rank drops an expert only if the expert keeps its wanted number of replicas. With enough loads the result is
    `wanted`.
    """
    order = sorted(wanted)
    now = held_by(moe_layers, experts, order, current)
    goal = held_by(moe_layers, experts, order, wanted)
    added = np.argwhere(goal & ~now)
    if len(added) <= most_moves:
        return wanted
    has = now.sum(axis=1)
    first = np.lexsort((added[:, 1], added[:, 2], added[:, 0], has[added[:, 0], added[:, 2]]))[:most_moves]
    after = now.copy()
    after[tuple(added[first].T)] = True
    target = goal.sum(axis=1)
    for layer, row, expert in np.argwhere(now & ~goal).tolist():
        complete = (after[layer, :, expert] >= goal[layer, :, expert]).all()
        if complete and after[layer, :, expert].sum() > target[layer, expert]:
            after[layer, row, expert] = False
    return placement_of(after, order)
