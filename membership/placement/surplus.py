"""What ranks drop before missing replicas are placed: replicas above the planned number, experts above a capacity.

Pure. Layers do not depend on each other: each step is made in all of them at once, because numpy's cost is per call.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from membership.placement.tally import Bools, Held, Ints, Tally


@dataclass(frozen=True)
class Surplus:
    """`holds` [layer, row, expert] is changed in place, and with it `now`, save for the loads."""

    holds: Bools
    now: Tally
    replicas: Ints  # [layer, expert], planned
    capacity: Ints  # [layer, row], planned
    levels: tuple[Ints, ...]  # of failure domains: [row] each

    def drop(self, found: Held) -> None:
        """Drop what is too many. `found`: what is held."""
        order = np.lexsort((found.row, found.layer, found.expert))
        layer, row, expert = (each[order] for each in found)
        for each in np.flatnonzero((self.now.total > self.replicas).any(axis=0)).tolist():
            mine = slice(*np.searchsorted(expert, (each, each + 1)).tolist())
            self._drop_replicas(each, layer[mine], row[mine])
        for each in np.flatnonzero((self.now.size > self.capacity).any(axis=0)).tolist():
            self._shrink(each)

    def _drop_replicas(self, expert: int, layer: Ints, row: Ints) -> None:
        """Drop an expert from its fullest holders, first where it is not alone in its zone, then on its machine."""
        while (over := self.now.total[layer, expert] > self.replicas[layer, expert]).any():
            layer, row = layer[over], row[over]
            alone = self._alone(layer, row, expert)
            spare = self.capacity[layer, row] - self.now.size[layer, row]
            order = np.lexsort((row, spare, alone, layer))
            first = order[np.unique(layer, return_index=True)[1]]
            self._drop(layer[first], row[first], np.full(first.size, expert))
            layer, row = np.delete(layer, first), np.delete(row, first)

    def _shrink(self, row: int) -> None:
        """Drop a rank's experts above its capacity: those with the most replicas left."""
        excess = self.now.size[:, row] - self.capacity[:, row]
        over = np.flatnonzero(excess > 0)
        at, expert = np.nonzero(self.holds[over, row])
        layer = over[at]
        left = self.now.total[layer, expert] - self.replicas[layer, expert]
        alone = self._alone(layer, np.full(layer.size, row), expert)
        order = np.lexsort((alone, -left, layer))
        place = np.arange(at.size) - np.searchsorted(at, at)
        chosen = order[place < excess[layer]]
        self._drop(layer[chosen], np.full(chosen.size, row), expert[chosen])

    def _alone(self, layer: Ints, row: Ints, expert: Ints | int) -> Ints:
        """In how many of its failure domains each replica is the only one: who is so in a zone is so on its machine."""
        only = [has[layer, of[row], expert] == 1 for has, of in zip(self.now.within, self.levels, strict=True)]
        number: Ints = np.sum(only, axis=0, dtype=np.int64)
        return number

    def _drop(self, layer: Ints, row: Ints, expert: Ints) -> None:
        """Drop these; no expert twice in a layer."""
        self.holds[layer, row, expert] = False
        self.now.total[layer, expert] -= 1
        for has, of in zip(self.now.within, self.levels, strict=True):
            has[layer, of[row], expert] -= 1
        np.subtract.at(self.now.size, (layer, row), 1)
