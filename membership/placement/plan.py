"""The placement of experts on ranks: coverage first, then balance, then fewest moves. Pure and deterministic.

Each layer has `redundancy` slots per expert, at most one per rank. An expert gets the whole part of the redundancy as
replicas on distinct ranks, on two or more hosts where there is room; the remaining slots go to the hottest experts.
Ranks have equal numbers of slots (within one, per layer and in total) and keep what they hold as far as possible: a
rank that joins takes its share, and little else moves. After a loss, `repair` places orphaned experts only; redundancy
and balance come back later (`membership/planning/rebalance.py`).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from membership.base.errors import PlanRefused
from membership.placement.bulk_fill import bulk_fill, replica_counts
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
    return int(experts * redundancy + _ROUNDING)


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
    nodes: Mapping[int, str] | None = None,
) -> Placement:
    """Return the placement on `ranks`. `current`: what live ranks hold; a rank that is not in it holds nothing.

    `loads` [layer][expert]: measured load; None: equal. `nodes`: rank -> host; None: all on one host. PlanRefused if
    the experts cannot be placed.
    """
    reason = refusal(experts, redundancy, len(ranks))
    if reason:
        raise PlanRefused(reason)
    order = sorted(ranks)
    holds = held_by(moe_layers, experts, order, current or {})
    hosts = host_numbers(order, nodes or {})
    slots = min(max_ranks_allowed(experts, redundancy), experts * len(order))
    odd = _OddSlots(slots, holds.sum(axis=2))
    weights = np.ones((moe_layers, experts)) if loads is None else np.asarray(loads, dtype=np.float64)
    replicas = replica_counts(slots, weights, holds.sum(axis=1), len(order))
    planned = [
        _Layer(holds[layer], replicas[layer], weights[layer], odd.capacity(layer), layer, hosts)
        for layer in range(moe_layers)
    ]
    if loads is None and not holds.any() and hosts.max() == 0:  # all layers are the same problem
        planned[0].place()
        for layer in range(1, moe_layers):
            holds[layer] = np.roll(holds[0], layer * (slots % len(order) or 1), axis=0)
        return placement_of(holds, order)
    for each in planned:
        each.drop()
    if slots * moe_layers - holds.sum() > MANY:
        bulk_fill(holds, replicas, weights / replicas, np.array([each.capacity for each in planned]), hosts)
    for each in planned:
        each.place()
    return placement_of(holds, order)


def repair(moe_layers: int, experts: int, current: Placement) -> Placement:
    """Return what live ranks hold plus each orphaned expert on the rank that holds least: the smallest full cover."""
    order = sorted(current)
    holds = held_by(moe_layers, experts, order, current)
    total = holds.sum(axis=(0, 2))
    for layer, expert in np.argwhere(~holds.any(axis=1)).tolist():
        row = int(np.lexsort((total, holds[layer].sum(axis=1)))[0])
        holds[layer, row, expert] = True
        total[row] += 1
    return placement_of(holds, order)


def placement_of(holds: NDArray[np.bool_], order: Sequence[int]) -> Placement:
    """Return [layer, row, expert] as a placement of the ranks in `order`."""
    by_row = holds.swapaxes(0, 1)
    experts = np.nonzero(by_row)[2].tolist()
    ends = np.cumsum(by_row.sum(axis=2)).tolist()
    held = [tuple(experts[start:end]) for start, end in zip([0, *ends], ends, strict=False)]
    layers = len(holds)
    return {rank: tuple(held[row * layers : (row + 1) * layers]) for row, rank in enumerate(order)}


def host_numbers(order: Sequence[int], nodes: Mapping[int, str]) -> NDArray[np.int64]:
    """Return for each rank in `order` the number of its host, from 0 in order of the hosts' names."""
    names = sorted({nodes.get(rank, "") for rank in order})
    return np.array([names.index(nodes.get(rank, "")) for rank in order], dtype=np.int64)


def held_by(moe_layers: int, experts: int, order: Sequence[int], current: Placement) -> NDArray[np.bool_]:
    """Return [layer, row, expert]: whether the rank in that row holds the expert now."""
    holds = np.zeros((moe_layers, len(order), experts), dtype=np.bool_)
    for row, rank in enumerate(order):
        for layer, mine in enumerate(current.get(rank, ())):
            holds[layer, row, list(mine)] = True
    return holds


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


class _Layer:
    """One layer being planned. `holds` [row, expert] is changed in place from current to planned."""

    def __init__(
        self,
        holds: NDArray[np.bool_],
        replicas: NDArray[np.int64],
        weights: NDArray[np.float64],
        capacity: NDArray[np.int64],
        shift: int,
        hosts: NDArray[np.int64],
    ) -> None:
        self.holds = holds
        self.rows, self.experts = holds.shape
        self.shift = shift
        self.replicas = replicas
        self.share = weights / replicas  # load of one replica
        self.capacity = capacity
        self.hosts = hosts
        rows_of = hosts[None, :] == np.arange(int(hosts.max()) + 1)[:, None]
        self.rows_of = rows_of.astype(np.float64)  # [host, row]
        self.meets = np.zeros((self.rows, self.rows), dtype=np.int64)  # replicas placed together: spread them evenly

        self._recount()

    def _recount(self) -> None:
        """Count sizes, loads and replicas per host."""
        self.size = self.holds.sum(axis=1)
        held = self.holds.astype(np.float64)  # numpy multiplies float matrices fastest
        self.load: NDArray[np.float64] = held @ self.share
        self.on_host = (self.rows_of @ held).astype(np.int64)  # replicas on each host

    def drop(self) -> None:
        """Drop surplus replicas."""
        for expert in np.flatnonzero(self.holds.sum(axis=0) > self.replicas).tolist():
            self._drop_surplus(expert)
        for row in np.flatnonzero(self.size > self.capacity).tolist():
            self._shrink(row)

    def place(self) -> None:
        """Place missing replicas."""
        self._recount()
        missing = self.replicas - self.holds.sum(axis=0)
        for expert in np.argsort(-self.share, kind="stable").tolist():
            for _ in range(missing[expert]):
                self._place(expert)
        if len(self.on_host) > 1:
            for expert in np.flatnonzero((self.on_host > 0).sum(axis=0) < np.minimum(self.replicas, 2)).tolist():
                self._spread(expert)

    def _drop_surplus(self, expert: int) -> None:
        """Drop an expert from its fullest holders until it has its planned number of replicas."""
        holders = np.flatnonzero(self.holds[:, expert])
        for _ in range(holders.size - int(self.replicas[expert])):
            alone = self.on_host[self.hosts[holders], expert] == 1
            row = int(holders[np.lexsort((self.capacity[holders] - self.size[holders], alone))[0]])
            self._set(row, expert, False)
            holders = holders[holders != row]

    def _shrink(self, row: int) -> None:
        """Drop a rank's experts above its capacity: those with the most replicas left."""
        excess = int(self.size[row] - self.capacity[row])
        mine = np.flatnonzero(self.holds[row])
        left = self.holds[:, mine].sum(axis=0) - self.replicas[mine]
        alone = self.on_host[self.hosts[row], mine] == 1
        for expert in mine[np.lexsort((mine, alone, -left))][:excess].tolist():
            self._set(row, expert, False)

    def _place(self, expert: int) -> None:
        """Add a replica: preferably on a host without one, then on the rank with most room, least load, and fewest
        experts in common with the other holders."""
        lacks = ~self.holds[:, expert]
        room = self.capacity - self.size
        able = np.flatnonzero(lacks & (room > 0))
        if able.size == 0:
            self._swap_in(expert, np.flatnonzero(lacks), int(np.argmax(room)))
            return
        shared = self.meets[able][:, self.holds[:, expert]].sum(axis=1)
        turn = (able - expert - self.shift) % self.rows
        same_host = self.on_host[self.hosts[able], expert] > 0
        best = able[np.lexsort((turn, shared, self.load[able], -room[able], same_host))[0]]
        self._give(int(best), expert)

    def _swap_in(self, expert: int, lacking: NDArray[np.int64], roomy: int) -> None:
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
        if (self.on_host[:, expert] > 0).sum() > 1:
            return  # another expert's exchange did it
        for start in np.flatnonzero(self.holds[:, expert])[::-1].tolist():
            if self._exchange_round(start, expert):
                return

    def _exchange_round(self, start: int, expert: int) -> bool:
        """Move the expert to another host by the shortest cycle of exchanges; False if there is none.

        The expert goes from `start` to a rank on another host, which hands an expert on, and so on back to `start`. No
        expert in the cycle ends on fewer than two hosts (or fewer than it had).
        """
        away = np.flatnonzero(self.hosts != self.hosts[start])
        came: dict[int, tuple[int, int]] = {int(row): (-1, expert) for row in away}  # row -> (from, what it takes)
        queue = list(came)
        for row in queue:
            chain = {came[row][1]}
            back = row
            while came[back][0] >= 0:
                back = came[back][0]
                chain.add(came[back][1])
            for to in [start, *(r for r in range(self.rows) if r not in came)]:
                handed = next((e for e in self._may_go(row, to) if e not in chain), None)
                if handed is None or to in came:
                    continue
                came[to] = (row, handed)
                if to == start:
                    self._follow(came, start, expert)
                    return True
                queue.append(to)
        return False

    def _may_go(self, row: int, to: int) -> list[int]:
        """Experts that `row` may hand to `to`, least loaded first."""
        able = np.flatnonzero(self.holds[row] & ~self.holds[to])
        if self.hosts[row] != self.hosts[to]:
            had = (self.on_host[:, able] > 0).sum(axis=0)
            after = had - (self.on_host[self.hosts[row], able] == 1) + (self.on_host[self.hosts[to], able] == 0)
            able = able[after >= np.minimum(had, 2)]
        return [int(e) for e in able[np.argsort(self.share[able], kind="stable")]]

    def _follow(self, came: dict[int, tuple[int, int]], start: int, expert: int) -> None:
        """Apply the cycle of exchanges that ends at `start`."""
        steps: list[tuple[int, int, int]] = []  # (from, to, expert)
        to = start
        while came[to][0] >= 0:
            row, handed = came[to]
            steps.append((row, to, handed))
            to = row
        for row, into, handed in [*steps, (start, to, expert)]:
            self._set(row, handed, False)
            self._give(into, handed)

    def _give(self, row: int, expert: int) -> None:
        others = self.holds[:, expert]
        self.meets[row, others] += 1
        self.meets[others, row] += 1
        self._set(row, expert, True)

    def _set(self, row: int, expert: int, value: bool) -> None:
        self.holds[row, expert] = value
        self.size[row] += 1 if value else -1
        self.on_host[self.hosts[row], expert] += 1 if value else -1
        self.load[row] += self.share[expert] if value else -self.share[expert]


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
