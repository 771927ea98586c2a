"""Load balance: the imbalance of a placement, and a better placement. Pure and deterministic.

Each replica is assumed to get an equal part of its expert's load, as `workers/exchange/router.py` distributes it. A
layer is as slow as its busiest rank, so imbalance is the busiest rank's load over the mean, averaged over the layers.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from membership.placement.local_search import LocalSearch
from membership.placement.plan import Loads, held_by, host_numbers, placement_of
from membership.store.records import Placement

PRIOR = 0.02  # each expert counts for at least this part of the mean load: an idle one may become busy


def imbalance(placement: Placement, loads: Loads) -> float:
    """Return the busiest rank's load over the mean rank's, averaged over the layers; 1.0 is perfect."""
    weights = _weights(loads)
    holds = held_by(weights.shape[0], weights.shape[1], sorted(placement), placement)
    return float(_uneven(holds, weights).mean()) if holds.size else 1.0


def balanced(
    placement: Placement, loads: Loads, nodes: Mapping[int, str], redundancy: float, most_moves: int
) -> Placement:
    """Return a better placement within `most_moves` expert loads; the same placement if there is none.

    Ranks swap experts, and replicas beyond the redundancy's whole part go from cold experts to hot ones. No rank's
    number of slots changes, and no expert ends on fewer than two hosts (or fewer than it has now).
    """
    order = sorted(placement)
    weights = _weights(loads)
    holds = held_by(weights.shape[0], weights.shape[1], order, placement)
    hosts = host_numbers(order, nodes)
    floor = min(int(redundancy), len(order))
    worst_first = np.argsort(-_uneven(holds, weights), kind="stable").tolist()
    steps = list(LocalSearch(holds, weights, hosts, floor, exchanges=most_moves > 1).steps())
    left = most_moves
    for layer in worst_first:
        for step in steps:
            mine = step.layer == layer
            if not mine.any():
                break
            left -= int(mine.sum())
            if left < 0:
                return placement_of(holds, order)
            for row, old, new in zip(step.row[mine], step.old[mine], step.new[mine], strict=True):
                holds[layer, row, old], holds[layer, row, new] = False, True
    return placement_of(holds, order)


def _weights(loads: Loads) -> NDArray[np.float64]:
    weights = np.asarray(loads, dtype=np.float64)
    mean = weights.mean(axis=1, keepdims=True)
    return weights + np.where(mean > 0, PRIOR * mean, 1.0)


def _uneven(holds: NDArray[np.bool_], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Per layer the busiest rank's load over the mean rank's."""
    share = weights / np.maximum(holds.sum(axis=1), 1)
    load = np.einsum("lre,le->lr", holds, share)
    uneven: NDArray[np.float64] = load.max(axis=1) / load.mean(axis=1)
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
