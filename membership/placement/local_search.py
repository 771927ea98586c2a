"""Local search: moves that lower the load of each layer's busiest rank. Pure.

All layers are searched at once, because numpy's cost is per call.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from membership.placement.tally import Bools, Floats, Ints, counts, held, replicas_of, within

EVEN = 1.05  # a layer is balanced if its busiest rank has at most this times the mean load
PARTNERS = 8  # number of least busy ranks tried as partners of an exchange
WORTH = 0.99  # accept a move only if the new peak load is at most this part of the old peak

Kind = TypeVar("Kind", bound=np.generic)


class Swap(NamedTuple):
    """Slot changes: in `layer`, slot `slot` of rank `row` changes from expert `old` to `new`. Equal lengths."""

    layer: Ints
    row: Ints
    slot: Ints
    old: Ints
    new: Ints


class _Options(NamedTuple):
    """The best move of one kind per layer. `cost`: the highest load among the ranks it touches, afterwards."""

    cost: Floats
    swaps: tuple[Swap, ...]


class LocalSearch:
    """A search in progress. `slots` [layer, row, slot]: the expert held (-1: no such slot); slot counts never change.

    `floor`: the minimum number of replicas of an expert. `exchanges`: whether moves of two experts are allowed.
    """

    def __init__(self, holds: Bools, weights: Floats, levels: tuple[Ints, ...], floor: int, *, exchanges: bool) -> None:
        self.holds, self.weights, self.levels = holds.copy(), weights, levels
        self.floor, self.exchanges = max(floor, 1), exchanges
        layer, row, expert = found = held(holds)
        self.replicas = replicas_of(found, len(holds), holds.shape[2])
        size = counts(holds.shape[:2], layer, row)
        first = np.cumsum(size.ravel()) - size.ravel()
        self.slots = np.full((*size.shape, int(size.max(initial=1))), -1, dtype=np.int64)
        self.slots[layer, row, np.arange(layer.size) - first[layer * size.shape[1] + row]] = expert
        self.within = tuple(within(found, len(holds), holds.shape[2], level) for level in levels)
        self.spread = tuple((has > 0).sum(axis=1) for has in self.within)  # [layer, expert]: in how many domains it is
        self.load = self._loads(np.arange(len(holds)))

    def steps(self) -> Iterator[Swap]:
        """Apply and yield moves, at most one per layer in each, until no layer improves."""
        at = np.arange(len(self.load))
        while (at := at[self.load[at].max(axis=1) > EVEN * self.load[at].mean(axis=1)]).size:
            peak = self.load[at].max(axis=1)
            share = self.weights[at] / np.maximum(self.replicas[at], 1)
            options = [(1, self._extra_replica(at, share))] + ([(2, self._exchange(at, share))] * self.exchanges)
            gains = np.array([np.where(o.cost <= WORTH * peak, (peak - o.cost) / moves, 0) for moves, o in options])
            best = gains.argmax(axis=0)
            better = gains.max(axis=0, initial=0) > 0
            chosen = [_only(swap, better & (best == k)) for k, (_, o) in enumerate(options) for swap in o.swaps]
            at = at[better]
            if not at.size:
                return
            swap = Swap(*map(np.concatenate, zip(*chosen, strict=True)))
            self._apply(swap, at)
            yield swap

    def _loads(self, at: Ints) -> Floats:
        share = self.weights[at] / np.maximum(self.replicas[at], 1)
        loads: Floats = np.where(self.slots[at] >= 0, _of(share, self.slots[at]), 0.0).sum(axis=2)
        return loads

    def _apply(self, swap: Swap, at: Ints) -> None:
        layer, row, slot, old, new = swap
        self.slots[layer, row, slot] = new
        for expert, more in ((old, -1), (new, 1)):
            self.holds[layer, row, expert] = more > 0
            np.add.at(self.replicas, (layer, expert), more)
            for has, of, spread in zip(self.within, self.levels, self.spread, strict=True):
                np.add.at(has, (layer, of[row], expert), more)
                spread[layer, expert] = (has[layer, :, expert] > 0).sum(axis=1)
        self.load[at] = self._loads(at)

    def _exchange(self, at: Ints, share: Floats) -> _Options:
        """The busiest rank swaps an expert for a lighter one, so that the higher load of the two is lowest."""
        load, each = self.load[at], np.arange(at.size)
        busy = load.argmax(axis=1)
        others = np.argsort(load, axis=1, kind="stable")[:, :PARTNERS]
        gives, takes = self.slots[at, busy], self.slots[at[:, None], others]
        to, row = others[:, :, None], busy[:, None, None]
        offered = np.broadcast_to(gives[:, None, :], (*others.shape, gives.shape[1]))
        may_give = self._may_go(at, offered, row, to) & (others != busy[:, None])[:, :, None]
        may_take = self._may_go(at, takes, to, row)
        moved = _of(share, gives)[:, None, :, None] - _of(share, takes)[:, :, None, :]
        theirs = np.take_along_axis(load, others, axis=1)[:, :, None, None] + moved
        higher = np.maximum(load[each, busy][:, None, None, None] - moved, theirs)  # of the two, afterwards
        higher = np.where(may_give[:, :, :, None] & may_take[:, :, None, :], higher, np.inf).reshape(at.size, -1)
        best = higher.argmin(axis=1)
        partner, give, take = np.unravel_index(best, (others.shape[1], gives.shape[1], takes.shape[2]))
        other, given, taken = others[each, partner], gives[each, give], takes[each, partner, take]
        there, back = Swap(at, other, take, taken, given), Swap(at, busy, give, given, taken)
        return _Options(higher[each, best], (there, back))

    def _may_go(self, at: Ints, expert: Ints, row: Ints, to: Ints) -> Bools:
        """Whether `row` may give `expert` to `to`: it must stay in as many zones and machines, or in two."""
        layer = at[:, None, None]
        may = (expert >= 0) & ~self.holds[layer, to, expert]
        for has, of, spread_of in zip(self.within, self.levels, self.spread, strict=True):
            if has.shape[1] > 1:
                spread = _of(spread_of[at], expert)
                left, new = has[layer, of[row], expert] == 1, has[layer, of[to], expert] == 0
                may &= (of[row] == of[to]) | (spread - left + new >= np.minimum(spread, 2))
        return may

    def _extra_replica(self, at: Ints, share: Floats) -> _Options:
        """The busiest rank's hottest expert gets one more replica, in the slot of a replica that can be spared."""
        load, slots, each = self.load[at], self.slots[at], np.arange(at.size)
        busy, replicas = load.argmax(axis=1), self.replicas[at]
        mine = slots[each, busy]
        hot = mine[each, np.where(mine >= 0, _of(share, mine), -1.0).argmax(axis=1)]
        spare = replicas > self.floor
        spare[each, hot] = False
        may = (
            (slots >= 0)
            & _of(spare, slots)
            & ~self.holds[at[:, None], np.arange(load.shape[1]), hot[:, None]][..., None]
        )
        for has, of, spread in zip(self.within, self.levels, self.spread, strict=True):
            if has.shape[1] > 1:  # the expert would be left in one domain
                there = has[at[:, None, None], of[:, None], slots] == 1
                may &= ~(there & (_of(spread[at], slots) == 2))
        grown = self.weights[at] / np.maximum(replicas - 1, 1)  # share of an expert with one replica less
        top = np.zeros_like(share)  # load of its busiest holder
        np.maximum.at(top, (each[:, None, None], slots), np.where(slots >= 0, load[:, :, None], 0.0))
        less = self.weights[at, hot] / (replicas[each, hot] + 1)
        peak = load[each, busy] - share[each, hot] + less
        cost = np.maximum(load[:, :, None] - _of(share, slots) + less[:, None, None], _of(top + grown - share, slots))
        cost = np.where(may, np.maximum(cost, peak[:, None, None]), np.inf).reshape(at.size, -1)
        best = cost.argmin(axis=1)
        row, slot = np.unravel_index(best, slots.shape[1:])
        return _Options(cost[each, best], (Swap(at, row, slot, slots[each, row, slot], hot),))


def _of(values: NDArray[Kind], experts: Ints) -> NDArray[Kind]:
    """Return each expert's value in its layer; undefined for -1."""
    found: NDArray[Kind] = np.take_along_axis(values, experts.reshape(len(experts), -1), axis=1)
    return found.reshape(experts.shape)


def _only(swap: Swap, which: Bools) -> Swap:
    return Swap(*(each[which] for each in swap))
