"""How a rank computes rows whose experts it holds all: no peers, no messages."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from workers.exchange.combine import combine
from workers.exchange.model_side import ExpertBank
from workers.exchange.router import FEW, Ints


def compute_here(bank: ExpertBank, layer: int, hidden: Tensor, experts: list[int], weights: Tensor) -> Tensor:
    """Sort the rows by expert, run each expert on its rows, put the outputs back in token order and sum.

    `experts` has those of the first row, ascending, then those of the second, and so on; `weights` [T, K] likewise.
    """
    tokens, k = weights.shape
    plan = _few(bank, experts, k) if len(experts) <= FEW else _many(bank, experts, k)
    if tokens == 1:
        rows = hidden.expand(len(plan.gather), -1)
    else:
        rows = hidden.index_select(0, torch.as_tensor(plan.gather, device=hidden.device))
    out = bank.compute_many(layer, plan.experts, plan.sizes, rows)
    if tokens > 1 or len(plan.gather) > k:
        out = out.index_select(0, torch.as_tensor(plan.places, device=hidden.device))
    return combine(out.view(tokens, k, -1), weights, hidden.dtype)


class _Plan(NamedTuple):
    """Each expert's tokens one after the other, filled up with token 0, and the place of each pair's output."""

    experts: list[int]
    sizes: list[int]
    gather: list[int] | Ints
    places: list[int] | Ints


def _few(bank: ExpertBank, wanted: list[int], k: int) -> _Plan:
    pairs_of: dict[int, list[int]] = {}
    for pair, expert in enumerate(wanted):
        pairs_of.setdefault(expert, []).append(pair)
    experts, sizes = sorted(pairs_of), []
    gather: list[int] = []
    places = [0] * len(wanted)
    for expert in experts:
        pairs = pairs_of[expert]
        base, size = len(gather), bank.padded(len(pairs))
        gather += [pair // k for pair in pairs]
        gather += [0] * (size - len(pairs))
        for place, pair in enumerate(pairs, base):
            places[pair] = place
        sizes.append(size)
    return _Plan(experts, sizes, gather, places)


def _many(bank: ExpertBank, wanted: list[int], k: int) -> _Plan:
    flat = np.array(wanted)
    order = flat.argsort(kind="stable")
    count_of = np.bincount(flat)
    present = count_of.nonzero()[0]
    counts = count_of[present]
    sizes = [bank.padded(count) for count in counts.tolist()]
    added = np.subtract(sizes, counts)
    place = np.arange(len(order)) + (added.cumsum() - added).repeat(counts)
    gather, places = np.zeros(sum(sizes), dtype=np.int64), np.empty_like(order)
    gather[place] = order // k
    places[order] = place
    return _Plan(present.tolist(), sizes, gather, places)
