"""A placement as arrays, and what can be counted of it in all layers at once: slots, load, replicas. Pure.

Few of a large model's (layer, rank, expert) triples are held, so the held ones are counted, not all. Sums run in one
order on every machine: no linear algebra library decides a tie.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from membership.store.records import Placement

Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


Name = TypeVar("Name", str, "Domain")
Key = TypeVar("Key")


class Domain(NamedTuple):
    """What a rank ends with: its machine, and the zone that this is in ("": none is known)."""

    zone: str
    machine: str


Places = Mapping[int, str] | Mapping[int, Domain]
"""rank -> its machine, or its failure domain."""


class Held(NamedTuple):
    """The layer, row and expert of each replica: arrays of equal lengths."""

    layer: Ints
    row: Ints
    expert: Ints


class Tally(NamedTuple):
    """The counts. Code that changes the placement keeps them current."""

    size: Ints  # [layer, row]: experts held
    load: Floats  # [layer, row]
    total: Ints  # [layer, expert]: replicas
    within: tuple[Ints, ...]  # for each level of failure domains [layer, domain, expert]: replicas there


def held_by(moe_layers: int, experts: int, order: Sequence[int], current: Placement | Held) -> Bools:
    """Return [layer, row, expert]: whether the rank in that row holds the expert now."""
    holds = np.zeros((moe_layers, len(order), experts), dtype=np.bool_)
    holds[current if isinstance(current, Held) else held_in(order, current)] = True
    return holds


def held_in(order: Sequence[int], current: Placement) -> Held:
    """Return the replicas of a placement, rank by rank."""
    by_row = [current.get(rank, ()) for rank in order]
    sizes = list(map(len, chain.from_iterable(by_row)))
    layers = [layer for held in by_row for layer in range(len(held))]
    rows = [row for row, held in enumerate(by_row) for _ in held]
    experts = np.fromiter(chain.from_iterable(chain.from_iterable(by_row)), dtype=np.int64, count=sum(sizes))
    return Held(np.repeat(layers, sizes).astype(np.int64), np.repeat(rows, sizes).astype(np.int64), experts)


def held(holds: Bools) -> Held:
    """Return the replicas in the order of layers, rows and experts."""
    _, rows, experts = holds.shape
    layer_row, expert = np.divmod(np.flatnonzero(holds), experts)
    return Held(*np.divmod(layer_row, rows), expert)


def placement_of(holds: Bools, order: Sequence[int]) -> Placement:
    """Return [layer, row, expert] as a placement of the ranks in `order`."""
    layers, rows, _ = holds.shape
    found = held(holds)
    line = found.row * layers + found.layer
    experts = found.expert[np.argsort(line, kind="stable")].tolist()
    ends = np.cumsum(np.bincount(line, minlength=rows * layers)).tolist()
    lines = [tuple(experts[start:end]) for start, end in zip([0, *ends], ends, strict=False)]
    return {rank: tuple(lines[row * layers : (row + 1) * layers]) for row, rank in enumerate(order)}


def settled(domains: Mapping[Key, Domain]) -> dict[Key, Domain]:
    """Return them with one zone for each machine, the last of those that its agents name; all without, if one has none.

    A machine of unknown zone may be in any of the others'. As a zone of its own it would move experts for nothing, as
    while agents learn their zones one by one.
    """
    zones: dict[str, str] = {}
    for each in domains.values():
        zones[each.machine] = max(each.zone, zones.get(each.machine, ""))
    sure = all(zones.values())
    return {key: Domain(zones[each.machine] if sure else "", each.machine) for key, each in domains.items()}


def domains_of(order: Sequence[int], nodes: Places) -> list[Domain]:
    """Return the failure domain of each rank in `order`, `settled`."""
    found = {rank: nodes.get(rank, "") for rank in order}
    domains = settled({rank: at if isinstance(at, Domain) else Domain("", at) for rank, at in found.items()})
    return [domains[rank] for rank in order]


def levels_of(order: Sequence[int], nodes: Places) -> tuple[Ints, ...]:
    """Return for each rank in `order` the numbers of its zone, if there are several (all known), and of its machine.

    From the widest level to the narrowest. Numbers are from 0, in order of the names. A zone of one machine each says
    nothing that the machines do not.
    """
    domains = domains_of(order, nodes)
    zones, machines = _numbers([each.zone for each in domains]), _numbers(domains)
    return (zones, machines) if 0 < zones.max(initial=0) < machines.max(initial=0) else (machines,)


def _numbers(names: Sequence[Name]) -> Ints:
    number = {name: at for at, name in enumerate(sorted(set(names)))}
    return np.array([number[name] for name in names], dtype=np.int64)


def within(found: Held, layers: int, experts: int, level: Ints) -> Ints:
    """Return [layer, domain, expert]: the number of replicas there. `level` [row]: each rank's domain."""
    return counts((layers, int(level.max(initial=0)) + 1, experts), found.layer, level[found.row], found.expert)


def tally(found: Held, share: Floats, levels: tuple[Ints, ...]) -> Tally:
    """Count a placement. `share` [layer, expert]: load of one replica; `levels`: [row] each."""
    layers, experts = share.shape
    layer, row, expert = found
    return Tally(
        size=counts((layers, levels[0].size), layer, row),
        load=sums((layers, levels[0].size), share[layer, expert], layer, row),
        total=replicas_of(found, layers, experts),
        within=tuple(within(found, layers, experts, level) for level in levels),
    )


def replicas_of(found: Held, layers: int, experts: int) -> Ints:
    """Return [layer, expert]: the number of replicas."""
    return counts((layers, experts), found.layer, found.expert)


def counts(shape: tuple[int, ...], *at: Ints) -> Ints:
    """Return how often each place occurs in `at`, one array per dimension."""
    return np.bincount(np.ravel_multi_index(at, shape), minlength=int(np.prod(shape))).reshape(shape)


def sums(shape: tuple[int, ...], values: Floats, *at: Ints) -> Floats:
    """Return the sum of the values at each place."""
    found = np.bincount(np.ravel_multi_index(at, shape), values, minlength=int(np.prod(shape)))
    return found.astype(np.float64).reshape(shape)  # of no values, bincount makes integers
