"""Which deaths a placement survives, and the redundancy needed to survive any one. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import msgspec
import numpy as np

from membership.placement.plan import max_ranks_allowed, plan
from membership.placement.tally import Places, domains_of, held_by
from membership.store.records import Placement


class Survivability(msgspec.Struct, frozen=True, kw_only=True):
    """The fewest replicas of any expert now and after a death, and the vital ranks, hosts and zones (if there are two).

    A host is what is named as machine by the agents on it.
    """

    min_replicas: int  # while all ranks live
    after_rank_loss: int  # after the worst death of one rank
    after_host_loss: int | None  # after the worst death of one host; None: all ranks are on one host
    vital_ranks: tuple[int, ...] = ()  # the death of any of them leaves an expert without a replica
    vital_hosts: tuple[str, ...] = ()
    after_zone_loss: int | None = None  # after the worst loss of one zone; None: there are no two
    vital_zones: tuple[str, ...] = ()


def survivability(placement: Placement, nodes: Places, moe_layers: int, experts: int) -> Survivability:
    """Return which deaths the placement survives. `nodes`: where ranks are."""
    order = sorted(placement)
    holds = held_by(moe_layers, experts, order, placement)
    total = holds.sum(axis=1)
    by_rank = {rank: int((total - holds[:, row]).min(initial=experts)) for row, rank in enumerate(order)}

    def after_each(names: list[str]) -> dict[str, int]:
        there = {name: np.array([each == name for each in names]) for name in sorted(set(names))}
        left = {name: total - holds[:, rows].sum(axis=1) for name, rows in there.items()}
        return {name: int(each.min(initial=experts)) for name, each in left.items()} if len(left) > 1 else {}

    domains = domains_of(order, nodes)
    by_host, by_zone = after_each([each.machine for each in domains]), after_each([each.zone for each in domains])
    return Survivability(
        min_replicas=int(total.min(initial=experts)),
        after_rank_loss=min(by_rank.values(), default=0),
        after_host_loss=min(by_host.values()) if by_host else None,
        vital_ranks=tuple(rank for rank, left in by_rank.items() if not left),
        vital_hosts=tuple(host for host, left in by_host.items() if not left),
        after_zone_loss=min(by_zone.values(), default=None),
        vital_zones=tuple(zone for zone, left in by_zone.items() if not left),
    )


class Sole(NamedTuple):
    """How many (layer, expert) pairs have their last replicas there, by rank and by machine: what its end uncovers."""

    ranks: dict[int, int]
    machines: dict[str, int]


def sole_holders(placement: Placement, nodes: Places, moe_layers: int, experts: int) -> Sole:
    """Count them among these ranks, which are those that live. `nodes`: where they are."""
    order = sorted(nodes)
    holds = held_by(moe_layers, experts, order, placement)
    total = holds.sum(axis=1)

    def only(rows: list[int]) -> int:
        there = holds[:, rows].sum(axis=1)
        return int(((there == total) & (there > 0)).sum())

    rows_of: dict[str, list[int]] = {}
    for row, domain in enumerate(domains_of(order, nodes)):
        rows_of.setdefault(domain.machine, []).append(row)
    ranks = {rank: only([row]) for row, rank in enumerate(order)}
    return Sole(ranks, {machine: only(rows) for machine, rows in rows_of.items()})


def needed_redundancy(nodes: Places, experts: int, *, hosts: bool = False) -> float | None:
    """Return the smallest whole redundancy that survives the death of any one rank (or host); None if none does."""
    if len(set(domains_of(sorted(nodes), nodes)) if hosts else nodes) < 2:
        return None
    for redundancy in range(2, len(nodes) + 1):
        if len(nodes) <= max_ranks_allowed(experts, redundancy):
            placement = plan(1, experts, nodes, redundancy, nodes=nodes)
            found = survivability(placement, nodes, 1, experts)
            if not (found.vital_hosts if hosts else found.vital_ranks):
                return float(redundancy)
    return None


def needed_slots(nodes: Places, moe_layers: int, experts: int, *, hosts: bool = False) -> int | None:
    """Return that redundancy as the number of slots over all ranks and layers."""
    redundancy = needed_redundancy(nodes, experts, hosts=hosts)
    return None if redundancy is None else int(redundancy) * experts * moe_layers


def describe_survivability(found: Survivability) -> str:
    """The same in words."""
    if found.vital_ranks:
        line = f"the death of rank {_either(found.vital_ranks)} leaves experts without a replica"
    else:
        line = f"any one rank may die (every expert keeps {found.after_rank_loss} or more replicas)"
    line += _about_hosts(found)
    if found.after_zone_loss is None:
        return line
    if found.vital_zones:
        return line + f"; the loss of zone {_either(found.vital_zones)} leaves experts without a replica"
    return line + f"; any one zone may be lost ({found.after_zone_loss} or more)"


def _about_hosts(found: Survivability) -> str:
    if found.after_host_loss is None:
        return "; all ranks are on one host"
    if found.vital_hosts and found.vital_ranks:
        return f"; so does that of host {_either(found.vital_hosts)}"
    if found.vital_hosts:
        return f"; the death of host {_either(found.vital_hosts)} leaves experts without a replica"
    return f"; any one host may die ({found.after_host_loss} or more)"


def _either(names: Iterable[object]) -> str:
    return " or ".join(map(str, names))
