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
        self, layer: int, holds: Bools, replicas: Ints, share: Floats, capacity: Ints, hosts: Ints, now: Tally
    ) -> None:
        self.layer = layer
        self.holds = holds[layer]
        self.rows, self.experts = self.holds.shape
        self.replicas = replicas[layer]
        self.share = share[layer]
        self.capacity = capacity[layer]
        self.hosts = hosts
        self.meets = np.zeros((self.rows, self.rows), dtype=np.int32)  # replicas placed together: spread them evenly
        self.size, self.load, self.total, self.on_host = (each[layer] for each in now)
        self._closed: set[int] = set()  # hosts that no expert may come to from another

    def place(self) -> None:
        """Place missing replicas."""
        missing = self.replicas - self.total
        if missing.any():
            for expert in np.argsort(-self.share, kind="stable").tolist():
                for _ in range(missing[expert]):
                    self._place(expert)
        if len(self.on_host) > 1:
            for expert in np.flatnonzero((self.on_host > 0).sum(axis=0) < np.minimum(self.replicas, 2)).tolist():
                self._spread(expert)

    def _place(self, expert: int) -> None:
        """Add a replica: preferably on a host without one, then on the rank with most room, least load, and fewest
        experts in common with the other holders."""
        held = self.holds[:, expert]
        room = self.capacity - self.size
        able = np.flatnonzero(~held & (room > 0))
        if able.size == 0:
            self._swap_in(expert, np.flatnonzero(~held), int(np.argmax(room)))
            return
        if len(self.on_host) > 1 and (apart := self.on_host[self.hosts[able], expert] == 0).any():
            able = able[apart]
        for of_rank in (-room, self.load):
            value = of_rank[able]
            able = able[value == value.min()]
        if able.size > 1:
            shared = self.meets[able[:, None], np.flatnonzero(held)].sum(axis=1)
            able = able[shared == shared.min()]
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

    def _spread(self, expert: int) -> None:
        """Move one replica of an expert that is on a single host to another host, from any holder that can."""
        there = np.flatnonzero(self.on_host[:, expert])
        host = int(there[0])
        if there.size > 1 or host in self._closed:
            return  # another expert's exchange did it, or there is none
        may_come = self._may_come(host)
        if not may_come.any():
            self._closed.add(host)
            return
        for start in np.flatnonzero(self.holds[:, expert])[::-1].tolist():
            cycle = shortest_cycle(self.holds, self.share, self.hosts, may_come, (start, expert))
            for row, to, handed in cycle:
                self._set(row, handed, False)
                self._give(to, handed)
            if cycle:
                return

    def _may_come(self, host: int) -> Bools:
        """[other host, expert]: whether a replica may leave that one for `host`.

        The expert must stay on two hosts, or on as many as it was.
        """
        hosts_of = (self.on_host > 0).sum(axis=0)
        last_there = self.on_host == 1
        known_here = self.on_host[host] > 0
        may: Bools = (self.on_host > 0) & ~(last_there & known_here & (hosts_of == 2))
        may[host] = False
        return may

    def _give(self, row: int, expert: int) -> None:
        others = np.flatnonzero(self.holds[:, expert])
        self.meets[row, others] += 1
        self.meets[others, row] += 1
        self._set(row, expert, True)

    def _set(self, row: int, expert: int, value: bool) -> None:
        change = 1 if value else -1
        self.holds[row, expert] = value
        self.size[row] += change
        self.total[expert] += change
        self.on_host[self.hosts[row], expert] += change
        self.load[row] += change * self.share[expert]
        self._closed.clear()
