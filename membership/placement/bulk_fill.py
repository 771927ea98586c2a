"""Bulk fill: place many missing replicas in all layers at once, round by round. Pure.

Used when little can be kept (a new cluster). `plan.py` decides what each layer keeps, and places one by one what this
cannot.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_NEARBY = 4  # positions in the order of ranks
_TIES = 1e-6  # random part of the mean load that breaks ties, so that ranks do not share the same experts in all layers


def replica_counts(slots: int, weights: NDArray[np.float64], now: NDArray[np.int64], rows: int) -> NDArray[np.int64]:
    """Return [layer, expert]: the number of replicas. Each expert gets the whole part, the hottest ones the rest.

    `now` [layer, expert] counts present replicas: among equals, one that exists already is preferred.
    """
    layers, experts = weights.shape
    whole, rest = divmod(slots, experts)
    replicas = np.full((layers, experts), whole, dtype=np.int64)
    each = np.arange(layers)
    for _ in range(rest):
        hot = np.where(replicas < rows, weights / replicas, -1.0)
        best = hot >= hot.max(axis=1, keepdims=True)
        kept = best & (now > replicas)
        replicas[each, np.where(kept.any(axis=1, keepdims=True), kept, best).argmax(axis=1)] += 1
    return replicas


def bulk_fill(
    holds: NDArray[np.bool_],
    replicas: NDArray[np.int64],
    share: NDArray[np.float64],
    capacity: NDArray[np.int64],
    hosts: NDArray[np.int64],
) -> None:
    """Add missing replicas to `holds` in place, heaviest first: in each round, one to each rank that has room.

    `holds` [layer, row, expert], `replicas` and `share` [layer, expert], `capacity` [layer, row], `hosts` [row]. Ranks
    are ordered by room, then load, with swaps so that replicas of one expert go to different hosts (zones or machines).
    A replica is skipped if its rank holds the expert already or the expert would stay on a single host.
    """
    layers, rows, _ = holds.shape
    missing = replicas - holds.sum(axis=1)
    order = np.argsort(-share, axis=1, kind="stable")
    counts = np.take_along_axis(missing, order, axis=1)
    total = counts.sum(axis=1)
    queue = np.zeros((layers, int(total.max(initial=0)) + rows), dtype=np.int64)
    for line, experts, numbers in zip(queue, order, counts, strict=True):
        line[: numbers.sum()] = np.repeat(experts, numbers)
    load: NDArray[np.float64] = np.einsum("lre,le->lr", holds, share)
    room = capacity - holds.sum(axis=2)
    on_host = np.zeros((layers, int(hosts.max()) + 1, share.shape[1]), dtype=np.int64)
    for of_rank, host in zip(np.moveaxis(holds, 1, 0), hosts.tolist(), strict=True):
        on_host[:, host] += of_rank
    ties = np.random.default_rng(0)
    noise = _TIES * share.mean() * replicas.mean()
    filled, place, each = np.zeros(layers, dtype=np.int64), np.arange(rows), np.arange(layers)[:, None]
    while (number := np.minimum(total - filled, (room > 0).sum(axis=1))).any():
        row_at = np.lexsort((load + noise * ties.random(load.shape), -room))
        expert_at = np.take_along_axis(queue, filled[:, None] + place, axis=1)
        if hosts.max():
            _spread_hosts(row_at, expert_at, number, hosts)
        given = (place < number[:, None]) & ~holds[each, row_at, expert_at]
        if hosts.max():
            again = np.pad(
                (expert_at[:, 1:] == expert_at[:, :-1]) & (hosts[row_at[:, 1:]] == hosts[row_at[:, :-1]]),
                ((0, 0), (1, 0)),
            )
            alone = (on_host > 0).sum(axis=1) == 1
            given &= ~again & ~((on_host[each, hosts[row_at], expert_at] > 0) & alone[each, expert_at])
        layer, at = np.nonzero(given)
        row, expert = row_at[layer, at], expert_at[layer, at]
        holds[layer, row, expert] = True
        if hosts.max():
            np.add.at(on_host, (layer, hosts[row], expert), 1)
        load[layer, row] += share[layer, expert]
        room[layer, row] -= 1
        filled += number


def _spread_hosts(
    row_at: NDArray[np.int64], expert_at: NDArray[np.int64], number: NDArray[np.int64], hosts: NDArray[np.int64]
) -> None:
    """Swap the order of nearby ranks where two consecutive replicas of an expert would go to one host."""
    for step in range(1, _NEARBY):
        for first in range(1, _NEARBY + 1):
            at = np.arange(first, row_at.shape[1] - step, _NEARBY)  # far enough apart that swaps do not overlap
            one, other = row_at[:, at], row_at[:, at + step]
            clash = (expert_at[:, at] == expert_at[:, at - 1]) & (hosts[one] == hosts[row_at[:, at - 1]])
            clash &= (hosts[other] != hosts[one]) & (at + step < number[:, None])
            row_at[:, at], row_at[:, at + step] = np.where(clash, other, one), np.where(clash, one, other)
