"""Which rank computes which (row, expert) pair: pure, the same for every transport.

A rank prefers itself, then ranks of its own host: rows between hosts cost several times as much. Within each of these,
holders are ordered by rendezvous hashing: load spreads over replicas, the same choice is made each time, and the loss
of a rank moves only the pairs that it would have answered.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from membership.base.errors import CoverageLost
from membership.store.records import Placement

Ints = npt.NDArray[np.int64]
Refused = tuple[int, int]  # (rank, expert): the rank cannot answer for the expert in this call

_NO_RANK = -1
_least, _most = np.minimum.reduce, np.maximum.reduce  # without the turns that `min` and `max` take to get there
FEW = 24
"""Number of pairs up to which plain Python is faster than numpy, whose calls cost a microsecond each."""
_SELF, _NEAR = np.uint64(2**64 - 1), np.uint64(2**63)
_GOLDEN, _MIX1, _MIX2 = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


@dataclass(frozen=True)
class Parcel:
    """What one rank is asked: each row once, and per pair which of them; the first `counts[0]` pairs are of
    `experts[0]` and so on, ascending. A pair's number is `row * top_k + k`: its place in the result.
    """

    rank: int
    pairs: Ints
    rows: Ints
    row_of: Ints
    experts: list[int]
    counts: list[int]


class Router:
    """One rank's choices under one placement."""

    def __init__(self, me: int, placement: Placement, near: Collection[int] = ()) -> None:
        """`near`: ranks of the same host."""
        self._me = me
        self._ranks = np.array(sorted(placement), dtype=np.int64)
        self._near = np.isin(self._ranks, list(near))
        layers = max((len(held) for held in placement.values()), default=0)
        experts = 1 + max((e for held in placement.values() for layer in held for e in layer), default=-1)
        held = np.zeros((layers, experts, len(self._ranks)), dtype=bool)
        for column, rank in enumerate(self._ranks.tolist()):
            for layer, of_layer in enumerate(placement[rank]):
                held[layer, list(of_layer), column] = True
        self._held = held
        self._tables: dict[tuple[int, int], Ints] = {}
        self.everywhere = bool(held.size and held.all())  # each rank holds all experts: no rows travel
        self._mine = [frozenset(of_layer) for of_layer in placement.get(me, ())]

    def all_mine(self, layer: int, experts: list[int]) -> bool:
        """Whether this rank holds all of them."""
        return 0 <= layer < len(self._mine) and self._mine[layer].issuperset(experts)

    def owners(self, layer: int, excluded: int, refused: frozenset[Refused] = frozenset()) -> Ints:
        """For each expert the rank that answers for it (-1: none) without the ranks of the bit set `excluded`."""
        if refused:
            return self._choose(layer, excluded, refused)
        table = self._tables.get((layer, excluded))
        if table is None:
            table = self._tables[layer, excluded] = self._choose(layer, excluded, ())
        return table

    def _choose(self, layer: int, excluded: int, refused: Iterable[Refused]) -> Ints:
        if not 0 <= layer < len(self._held):
            raise CoverageLost(f"layer {layer} is not in the placement")
        usable = self._held[layer] & np.array([not excluded >> r & 1 for r in self._ranks.tolist()], dtype=bool)
        for rank, expert in refused:
            usable[expert, self._ranks == rank] = False
        if not usable.size:
            return np.full(len(usable), _NO_RANK)
        preference = np.where(usable, self._preference(layer, len(usable)), np.uint64(0))
        return np.where(usable.any(axis=1), self._ranks[preference.argmax(axis=1)], _NO_RANK)

    def _preference(self, layer: int, experts: int) -> npt.NDArray[np.uint64]:
        """[experts, ranks]: a hash of (layer, source, expert, rank) >= 1; this rank comes first, its host next."""
        seed = np.uint64((layer << 40 | self._me << 20) & (2**64 - 1))
        x = np.arange(experts, dtype=np.uint64)[:, None] * _GOLDEN + self._ranks.astype(np.uint64)[None, :] + seed
        x = (x ^ (x >> np.uint64(30))) * _MIX1
        x = (x ^ (x >> np.uint64(27))) * _MIX2
        x = (x ^ (x >> np.uint64(31))) >> np.uint64(1) | np.uint64(1)
        x = np.where(self._near[None, :], x | _NEAR, x)  # a hash alone is below
        return np.where(self._ranks[None, :] == self._me, _SELF, x)

    def parcels(
        self,
        layer: int,
        experts: Ints,
        top_k: int,
        excluded: int,
        refused: frozenset[Refused] = frozenset(),
        pairs: Ints | None = None,
    ) -> list[Parcel]:
        """What each rank is asked: for all pairs of `experts` (flat [T * top_k]), or again for `pairs` of them."""
        wanted = experts if pairs is None else experts[pairs]
        numbers = np.arange(len(wanted)) if pairs is None else pairs
        table = self.owners(layer, excluded, refused)
        if len(wanted) <= FEW:
            return _few(layer, wanted.tolist(), numbers.tolist(), top_k, table)
        return _many(layer, wanted, numbers, top_k, table, len(experts) // top_k)


def split(parcel: Parcel, most_pairs: int, top_k: int) -> list[Parcel]:
    """The same in parcels of at most `most_pairs` pairs."""
    if len(parcel.pairs) <= most_pairs:
        return [parcel]
    ends = np.cumsum(parcel.counts).tolist()
    whole = list(zip(parcel.experts, [0, *ends], ends, strict=False))
    parts = []
    for first in range(0, len(parcel.pairs), most_pairs):
        last = min(first + most_pairs, len(parcel.pairs))
        inside = [(expert, max(a, first), min(b, last)) for expert, a, b in whole if a < last and b > first]
        pairs = parcel.pairs[first:last]
        parts.append(_pack(parcel.rank, inside, pairs, top_k, int(_most(pairs)) // top_k + 1))
    return parts


def _few(layer: int, wanted: list[int], numbers: list[int], top_k: int, table: Ints) -> list[Parcel]:
    asked: dict[int, list[tuple[int, int]]] = {}
    for expert, pair in zip(wanted, numbers, strict=True):
        owner = table.item(expert) if 0 <= expert < len(table) else _NO_RANK
        if owner == _NO_RANK:
            raise _lost(layer, [e for e in wanted if not 0 <= e < len(table) or table[e] == _NO_RANK])
        asked.setdefault(owner, []).append((expert, pair))
    parcels = []
    for rank, pairs in asked.items():
        pairs.sort()
        rows = sorted({pair // top_k for _, pair in pairs})
        row_of = [rows.index(pair // top_k) for _, pair in pairs]
        counts: dict[int, int] = {}
        for expert, _ in pairs:
            counts[expert] = counts.get(expert, 0) + 1
        arrays = np.array([pair for _, pair in pairs]), np.array(rows), np.array(row_of)
        parcels.append(Parcel(rank, *arrays, list(counts), list(counts.values())))
    return parcels


def _many(layer: int, wanted: Ints, numbers: Ints, top_k: int, table: Ints, tokens: int) -> list[Parcel]:
    """In as few calls of numpy as can be: each costs a microsecond or more, at each layer."""
    if not 0 <= _least(wanted) <= _most(wanted) < len(table):
        raise _lost(layer, [e for e in wanted.tolist() if not 0 <= e < len(table) or table[e] == _NO_RANK])
    owners = table.take(wanted)
    if _least(owners) == _NO_RANK:
        raise _lost(layer, wanted[owners == _NO_RANK].tolist())
    keys = owners * len(table) + wanted
    order = keys.argsort(kind="stable")
    keys, numbers = keys.take(order), numbers.take(order)
    ends = [*((keys[1:] != keys[:-1]).nonzero()[0] + 1).tolist(), len(keys)]
    segments: dict[int, list[tuple[int, int, int]]] = {}  # rank -> (expert, first pair, end)
    start = 0
    for end in ends:
        rank, expert = divmod(keys.item(start), len(table))
        segments.setdefault(rank, []).append((expert, start, end))
        start = end
    return [_pack(rank, found, numbers[found[0][1] : found[-1][2]], top_k, tokens) for rank, found in segments.items()]


def _pack(rank: int, segments: list[tuple[int, int, int]], pairs: Ints, top_k: int, tokens: int) -> Parcel:
    rows = pairs // top_k
    seen = np.zeros(tokens, dtype=bool)
    seen[rows] = True
    places = seen.cumsum()  # behind each row: how many rows there are up to it
    if places.item(-1) == tokens:  # each row travels, so it is its own place
        asked, row_of = np.arange(tokens), rows
    else:
        asked, row_of = seen.nonzero()[0], places.take(rows) - 1
    counts = [end - start for _, start, end in segments]
    return Parcel(rank, pairs, asked, row_of, [expert for expert, _, _ in segments], counts)


def _lost(layer: int, experts: list[int]) -> CoverageLost:
    return CoverageLost(f"layer {layer}: no live rank holds experts {sorted(set(experts))}")
