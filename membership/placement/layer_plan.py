"""One layer's part of a new placement: where each missing replica goes. Pure.

`plan.py` decides how many replicas and slots there are; `surplus.py` has dropped what is too many.
"""

from __future__ import annotations

import numpy as np

from membership.placement.exchange_cycle import shortest_cycle
from membership.placement.tally import Bools, Floats, Ints, Tally


class LayerPlan:
    """One layer being planned. Its part of `holds` and of the counts is changed in place."""

    def __init__(
        self,
        layer: int,
        holds: Bools,
        replicas: Ints,
        share: Floats,
        capacity: Ints,
        levels: tuple[Ints, ...],
        now: Tally,
    ) -> None:
        self.layer = layer
        self.holds = holds[layer]
        self.rows, self.experts = self.holds.shape
        self.replicas = replicas[layer]
        self.share = share[layer]
        self.capacity = capacity[layer]
        self.levels = levels
        self.meets = np.zeros((self.rows, self.rows), dtype=np.int32)  # replicas placed together: spread them evenly
        self.size, self.load, self.total = now.size[layer], now.load[layer], now.total[layer]
        self.within = tuple(each[layer] for each in now.within)  # [domain, expert] for each level
        self._closed: set[tuple[int, int]] = set()  # (level, domain) that no expert may come to from another

    def place(self) -> None:
        """Place missing replicas."""
        missing = self.replicas - self.total
        if missing.any():
            for expert in np.argsort(-self.share, kind="stable").tolist():
                for _ in range(missing[expert]):
                    self._place(expert)
        for level, has in enumerate(self.within):
            if len(has) > 1:
                for expert in np.flatnonzero((has > 0).sum(axis=0) < np.minimum(self.replicas, 2)).tolist():
                    self._spread(level, expert)

    def _place(self, expert: int) -> None:
        """Add a replica: preferably in a zone, then on a machine, without one; then on the rank with most room, least
        load, and fewest experts in common with the other holders."""
        held = self.holds[:, expert]
        room = self.capacity - self.size
        able = (~held & (room > 0)).nonzero()[0]  # methods: numpy's functions around them cost as much again
        if able.size == 0:
            self._swap_in(expert, np.flatnonzero(~held), int(np.argmax(room)))
            return
        for has, of in zip(self.within, self.levels, strict=True):
            if (apart := has[of[able], expert] == 0).any():
                able = able[apart]
        for of_rank in (-room, self.load):
            if able.size > 1:
                value = of_rank[able]
                able = able[value == value[value.argmin()]]
        if able.size > 1:
            shared = self.meets[able[:, None], held.nonzero()[0]].sum(axis=1)
            able = able[shared == shared[shared.argmin()]]
        turn = (able - expert - self.layer) % self.rows
        self._give(int(able[turn.argmin()]), expert)

    def _swap_in(self, expert: int, lacking: Ints, roomy: int) -> None:
        """Only ranks that hold the expert have room: a full rank takes it, and hands another expert to one of them.

        Such an expert always exists: a full rank holds at least as many experts as one with room, and not this one.
        """
        host = int(lacking[np.lexsort((lacking, self.load[lacking]))[0]])
        able = np.flatnonzero(self.holds[host] & ~self.holds[roomy])
        handed = int(able[np.argmin(self.share[able])])
        self._set(host, handed, False)
        self._give(roomy, handed)
        self._give(host, expert)

    def _spread(self, level: int, expert: int) -> None:
        """Move one replica of an expert that is in a single domain to another, from any holder that can."""
        there = np.flatnonzero(self.within[level][:, expert])
        home = int(there[0])
        if there.size > 1 or (level, home) in self._closed:
            return  # another expert's exchange did it, or there is none
        may_go = self._may_go(level, home)
        if not (self.holds & may_go)[self.levels[level] != home].any():
            self._closed.add((level, home))
            return
        for start in np.flatnonzero(self.holds[:, expert])[::-1].tolist():
            cycle = shortest_cycle(self.holds, self.share, self.levels[level], may_go, (start, expert))
            for row, to, handed in cycle:
                self._set(row, handed, False)
                self._give(to, handed)
            if cycle:
                return

    def _may_go(self, level: int, home: int) -> Bools:
        """[row, expert]: whether a rank may hand the expert on, to a rank in domain `home` of this level.

        At each level the expert must stay in two domains, or in as many as it was.
        """
        of = self.levels[level]
        may: Bools = np.ones_like(self.holds)
        for wider in range(level + 1):
            mine, has = self.levels[wider], self.within[wider]
            ends_in = mine[int(np.flatnonzero(of == home)[0])]
            leaves = ~((has == 1) & (has[ends_in] > 0) & ((has > 0).sum(axis=0) == 2))
            leaves[ends_in] = True
            may &= leaves[mine]
        for narrower in range(level + 1, len(self.levels)):  # within `home`: one that is nowhere else stays as it is
            has = self.within[narrower]
            only_here = (self.within[level] > 0).sum(axis=0) == 1
            stays = ~((has == 1) & ((has > 0).sum(axis=0) == 2) & only_here)
            may &= stays[self.levels[narrower]] | (of != home)[:, None]
        return may

    def _give(self, row: int, expert: int) -> None:
        others = self.holds[:, expert].nonzero()[0]
        self.meets[row, others] += 1
        self.meets[others, row] += 1
        self._set(row, expert, True)

    def _set(self, row: int, expert: int, value: bool) -> None:
        change = 1 if value else -1
        self.holds[row, expert] = value
        self.size[row] += change
        self.total[expert] += change
        for has, of in zip(self.within, self.levels, strict=True):
            has[of[row], expert] += change
        self.load[row] += change * self.share[expert]
        self._closed.clear()
