"""How evenly measured load falls on ranks, and exchanges of experts that even it out. Pure and deterministic.

A replica is taken to get an equal part of its expert's load: so `workers/exchange/router.py` chooses among holders. A
layer is as slow as its busiest rank, so imbalance is that rank's load over the mean rank's, averaged over the layers.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from membership.placement import Loads, held_by, host_numbers, placement_of
from membership.types import Placement

EVEN = 1.05  # a layer whose busiest rank has so many times the mean is left alone
PARTNERS = 8  # so many of the least busy ranks are tried for an exchange
PRIOR = 0.02  # part of the mean load that every expert is taken to have at least: nothing is for free


def imbalance(placement: Placement, loads: Loads) -> float:
    """Return the busiest rank's load over the mean rank's, averaged over the layers; 1.0 is perfect."""
    weights = _weights(loads)
    holds = held_by(weights.shape[0], weights.shape[1], sorted(placement), placement)
    return float(_uneven(holds, weights).mean()) if holds.size else 1.0


def balanced(
    placement: Placement, loads: Loads, nodes: Mapping[int, str], redundancy: float, most_moves: int
) -> Placement:
    """Return a better placement that `most_moves` loads of one expert lead to; the same one if there is none.

    Experts are exchanged between ranks, and replicas beyond the redundancy's whole part go from cold experts to hot
    ones. No rank's number of slots changes, no expert comes to live on fewer hosts than two (or than it does now).
    """
    order = sorted(placement)
    weights = _weights(loads)
    holds = held_by(weights.shape[0], weights.shape[1], order, placement)
    hosts = host_numbers(order, nodes)
    floor = min(int(redundancy), len(order))
    left = most_moves
    for layer in np.argsort(-_uneven(holds, weights), kind="stable").tolist():
        evening = _Evening(holds[layer], weights[layer], hosts, floor)
        while left > 0 and (moved := evening.step(left)):
            left -= moved
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


class _Evening:
    """One layer being evened out; `holds[row, expert]` is changed in place."""

    def __init__(
        self, holds: NDArray[np.bool_], weights: NDArray[np.float64], hosts: NDArray[np.int64], floor: int
    ) -> None:
        self.holds, self.weights, self.hosts, self.floor = holds, weights, hosts, floor
        self.rows_of = hosts[None, :] == np.arange(int(hosts.max()) + 1)[:, None]  # [host, row]

    def step(self, most_moves: int) -> int:
        """Do what lowers the busiest rank's load most, by at least 1%; return how many experts move, 0 if nothing."""
        now = self._load(self.holds)
        if now.max() <= EVEN * now.mean():
            return 0
        self.on_host = self.rows_of.astype(np.int64) @ self.holds.astype(np.int64)  # [host, expert]: replicas there
        self.spread = (self.on_host > 0).sum(axis=0)
        found = [self._extra_replica(now)] + ([self._exchange(now)] if most_moves >= 2 else [])
        able = [(self._cost(new), moves, new) for moves, new in filter(None, found)]
        best = min(able, key=lambda option: option[:2], default=None)
        if best is None or best[0] > 0.99 * float(now.max()):
            return 0
        self.holds[:] = best[2]
        return best[1]

    def _load(self, holds: NDArray[np.bool_]) -> NDArray[np.float64]:
        load: NDArray[np.float64] = holds @ (self.weights / np.maximum(holds.sum(axis=0), 1))
        return load

    def _cost(self, holds: NDArray[np.bool_]) -> float:
        return float(self._load(holds).max())

    def _exchange(self, load: NDArray[np.float64]) -> tuple[int, NDArray[np.bool_]] | None:
        """The busiest rank gives an expert for a lighter one, such that the two come closest to each other."""
        share = self.weights / self.holds.sum(axis=0)
        busy = int(load.argmax())
        best: tuple[float, int, int, int] | None = None
        for other in np.argsort(load, kind="stable")[:PARTNERS].tolist():
            gap = float(load[busy] - load[other])
            gives = np.flatnonzero(self.holds[busy] & ~self.holds[other] & self._may_go(busy, other))
            takes = np.flatnonzero(self.holds[other] & ~self.holds[busy] & self._may_go(other, busy))
            if gap <= 0 or not gives.size or not takes.size:
                continue
            moved = share[gives][:, None] - share[takes][None, :]
            higher = np.maximum(load[busy] - moved, load[other] + moved)  # of the two, afterwards
            at = int(higher.argmin())
            option = (float(higher.flat[at]), other, int(gives[at // len(takes)]), int(takes[at % len(takes)]))
            best = option if best is None or option < best else best
        if best is None:
            return None
        _, other, given, taken = best
        new = self.holds.copy()
        new[busy, given] = new[other, taken] = False
        new[other, given] = new[busy, taken] = True
        return 2, new

    def _extra_replica(self, load: NDArray[np.float64]) -> tuple[int, NDArray[np.bool_]] | None:
        """The busiest rank's hottest expert gets one more replica, in place of a replica that its expert can spare."""
        replicas = self.holds.sum(axis=0)
        share = self.weights / replicas
        spare = replicas > max(self.floor, 1)
        hot = max(np.flatnonzero(self.holds[int(load.argmax())]).tolist(), key=lambda e: share[e], default=None)
        if hot is None or not spare.any():
            return None
        spare[hot] = False
        options = []
        for row in np.flatnonzero(~self.holds[:, hot]).tolist():
            alone = (self.on_host[self.hosts[row]] == 1) & (self.spread == 2)  # it would be on one host only
            for expert in np.flatnonzero(self.holds[row] & spare & ~alone).tolist():
                new = self.holds.copy()
                new[row, expert], new[row, hot] = False, True
                options.append((self._cost(new), row, expert))
        if not options:
            return None
        _, row, expert = min(options)
        new = self.holds.copy()
        new[row, expert], new[row, hot] = False, True
        return 1, new

    def _may_go(self, row: int, to: int) -> NDArray[np.bool_]:
        """Experts that keep their hosts, or two of them, when `row` gives them to `to`."""
        if self.hosts[row] == self.hosts[to]:
            return np.ones(self.holds.shape[1], dtype=np.bool_)
        after = self.spread - (self.on_host[self.hosts[row]] == 1) + (self.on_host[self.hosts[to]] == 0)
        may: NDArray[np.bool_] = after >= np.minimum(self.spread, 2)
        return may


def cut(current: Placement, wanted: Placement, moe_layers: int, experts: int, most_moves: int) -> Placement:
    """Return how far `most_moves` loads lead from one placement to the other: experts with fewest replicas come first.

    A rank gives an expert up only once that leaves it as many replicas as it is to have; with all loads done, the
    result is `wanted`.
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
