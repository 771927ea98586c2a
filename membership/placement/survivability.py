"""Which deaths a placement survives, and the redundancy needed to survive any one. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import msgspec
import numpy as np

from membership.placement.plan import max_ranks_allowed, plan
from membership.placement.tally import held_by
from membership.store.records import Placement


class Survivability(msgspec.Struct, frozen=True, kw_only=True):
    """The fewest replicas of any expert now and after a death, and the vital ranks and hosts (if there are two)."""

    min_replicas: int  # while all ranks live
    after_rank_loss: int  # after the worst death of one rank
    after_host_loss: int | None  # after the worst death of one host; None: all ranks are on one host
    vital_ranks: tuple[int, ...] = ()  # the death of any of them leaves an expert without a replica
    vital_hosts: tuple[str, ...] = ()


def survivability(placement: Placement, nodes: Mapping[int, str], moe_layers: int, experts: int) -> Survivability:
    """Return which deaths the placement survives. `nodes`: rank -> host."""
    order = sorted(placement)
    holds = held_by(moe_layers, experts, order, placement)
    total = holds.sum(axis=1)
    by_rank = {rank: int((total - holds[:, row]).min(initial=experts)) for row, rank in enumerate(order)}
    hosts = sorted({nodes.get(rank, "") for rank in order})
    by_host: dict[str, int] = {}
    for host in hosts if len(hosts) > 1 else []:
        there = np.array([nodes.get(rank, "") == host for rank in order])
        by_host[host] = int((total - holds[:, there].sum(axis=1)).min(initial=experts))
    return Survivability(
        min_replicas=int(total.min(initial=experts)),
        after_rank_loss=min(by_rank.values(), default=0),
        after_host_loss=min(by_host.values()) if by_host else None,
        vital_ranks=tuple(rank for rank, left in by_rank.items() if not left),
        vital_hosts=tuple(host for host, left in by_host.items() if not left),
    )


def needed_redundancy(nodes: Mapping[int, str], experts: int, *, hosts: bool = False) -> float | None:
    """Return the smallest whole redundancy that survives the death of any one rank (or host); None if none does."""
    if len(set(nodes.values()) if hosts else nodes) < 2:
        return None
    for redundancy in range(2, len(nodes) + 1):
        if len(nodes) <= max_ranks_allowed(experts, redundancy):
            placement = plan(1, experts, nodes, redundancy, nodes=nodes)
            found = survivability(placement, nodes, 1, experts)
            if not (found.vital_hosts if hosts else found.vital_ranks):
                return float(redundancy)
    return None


def needed_slots(nodes: Mapping[int, str], moe_layers: int, experts: int, *, hosts: bool = False) -> int | None:
    """Return that redundancy as the number of slots over all ranks and layers."""
    redundancy = needed_redundancy(nodes, experts, hosts=hosts)
    return None if redundancy is None else int(redundancy) * experts * moe_layers


def describe_survivability(found: Survivability) -> str:
    """The same in words."""
    if found.vital_ranks:
        line = f"the death of rank {_either(found.vital_ranks)} leaves experts without a replica"
    else:
        line = f"any one rank may die (every expert keeps {found.after_rank_loss} or more replicas)"
    if found.after_host_loss is None:
        return line + "; all ranks are on one host"
    if found.vital_hosts and found.vital_ranks:
        return line + f"; so does that of host {_either(found.vital_hosts)}"
    if found.vital_hosts:
        return line + f"; the death of host {_either(found.vital_hosts)} leaves experts without a replica"
    return line + f"; any one host may die ({found.after_host_loss} or more)"


def _either(names: Iterable[object]) -> str:
    return " or ".join(map(str, names))
