"""An exchange for a single rank that holds every expert: no peers, no messages. For tests, benchmarks and one rank."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from membership.base.errors import CoverageLost
from workers.exchange.base import ExpertBank, StepContext
from workers.exchange.combine import ascending, combine
from workers.exchange.router import FEW, Ints


class LocalExchange:
    """Runs all experts here."""

    def __init__(self, bank: ExpertBank) -> None:
        self._bank = bank
        self.device = torch.device("cpu")
        self.retried_rows = 0
        self.retried_at = 0.0
        self.suspects: set[int] = set()

    def handle(self) -> bytes:
        """Nobody can reach it."""
        return b""

    def connect(
        self, peers: Mapping[int, tuple[int, bytes]], timeout_s: float, given_up: Callable[[], bool] = lambda: False
    ) -> None:
        """There are no peers."""

    def stir(self) -> None:
        """Nobody waits."""

    def begin_step(self, ctx: StepContext) -> None:
        """All steps are alike."""

    def serve(self) -> int:
        """Nobody asks."""
        return 0

    def pending(self) -> bool:
        """Nobody asks."""
        return False

    def disconnect(self, peers: Iterable[tuple[int, int]]) -> None:
        """There are no peers."""

    def close(self) -> None:
        """Nothing is open."""

    def dispatch_combine(self, layer: int, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """[T, H] -> [T, H]: the weighted sum of each row's experts. CoverageLost if one is not here."""
        ids, weights = ascending(topk_ids, topk_weights)
        flat = ids.reshape(-1).tolist()
        for expert in set(flat):
            if not self._bank.holds(layer, expert):
                raise CoverageLost(f"expert {expert} of MoE layer {layer} is not on this rank")
        return compute_here(self._bank, layer, hidden, flat, weights)


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
    """Each expert's tokens one after the other, filled up with token 0, and where each pair's output comes to lie."""

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
