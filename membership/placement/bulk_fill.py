"""Experts dealt out to ranks like cards, in all layers at once: how a placement begins where little is there to keep.

Pure. `membership/placement/plan.py` decides what each layer keeps, and places one by one what cannot be dealt.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_NEARBY = 4  # seats
_TIES = 1e-6  # part of the mean load by which ties are broken, so that ranks do not share the same experts everywhere


def replica_counts(slots: int, weights: NDArray[np.float64], now: NDArray[np.int64], rows: int) -> NDArray[np.int64]:
    """Return [layer, expert]: how many replicas each gets, the whole part for all and the rest by load per replica.

    `now` has what there is: among equals, a replica that exists already costs nothing.
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
    """Give ranks what is missing, in place: the heaviest first, in each round one to every rank that has room.

    Those with most room and least load come first, but for what it takes that an expert's replicas, which follow each
    other, come to different hosts. Left out is what a rank has already, and what would stay on a single host.
    """
    layers, rows, _ = holds.shape
    missing = replicas - holds.sum(axis=1)
    order = np.argsort(-share, axis=1, kind="stable")
    counts = np.take_along_axis(missing, order, axis=1)
    total = counts.sum(axis=1)
    deck = np.zeros((layers, int(total.max(initial=0)) + rows), dtype=np.int64)
    for cards, experts, many in zip(deck, order, counts, strict=True):
        cards[: many.sum()] = np.repeat(experts, many)
    load: NDArray[np.float64] = np.einsum("lre,le->lr", holds, share)
    room = capacity - holds.sum(axis=2)
    on_host = np.zeros((layers, int(hosts.max()) + 1, share.shape[1]), dtype=np.int64)
    for of_rank, host in zip(np.moveaxis(holds, 1, 0), hosts.tolist(), strict=True):
        on_host[:, host] += of_rank
    ties = np.random.default_rng(0)
    noise = _TIES * share.mean() * replicas.mean()
    dealt, seat, each = np.zeros(layers, dtype=np.int64), np.arange(rows), np.arange(layers)[:, None]
    while (number := np.minimum(total - dealt, (room > 0).sum(axis=1))).any():
        who = np.lexsort((load + noise * ties.random(load.shape), -room))
        card = np.take_along_axis(deck, dealt[:, None] + seat, axis=1)
        if hosts.max():
            _part(who, card, number, hosts)
        given = (seat < number[:, None]) & ~holds[each, who, card]
        if hosts.max():
            again = np.pad((card[:, 1:] == card[:, :-1]) & (hosts[who[:, 1:]] == hosts[who[:, :-1]]), ((0, 0), (1, 0)))
            alone = (on_host > 0).sum(axis=1) == 1
            given &= ~again & ~((on_host[each, hosts[who], card] > 0) & alone[each, card])
        layer, at = np.nonzero(given)
        row, expert = who[layer, at], card[layer, at]
        holds[layer, row, expert] = True
        if hosts.max():
            np.add.at(on_host, (layer, hosts[row], expert), 1)
        load[layer, row] += share[layer, expert]
        room[layer, row] -= 1
        dealt += number


def _part(who: NDArray[np.int64], card: NDArray[np.int64], number: NDArray[np.int64], hosts: NDArray[np.int64]) -> None:
    """Have ranks change seats with others nearby where two replicas that follow each other come to one host."""
    for step in range(1, _NEARBY):
        for first in range(1, _NEARBY + 1):
            at = np.arange(first, who.shape[1] - step, _NEARBY)  # so far apart that no two exchanges touch
            one, other = who[:, at], who[:, at + step]
            clash = (card[:, at] == card[:, at - 1]) & (hosts[one] == hosts[who[:, at - 1]])
            clash &= (hosts[other] != hosts[one]) & (at + step < number[:, None])
            who[:, at], who[:, at + step] = np.where(clash, other, one), np.where(clash, one, other)
