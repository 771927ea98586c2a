"""An exchange for a model without a cluster, where one rank holds every expert."""

from __future__ import annotations

from torch import Tensor

from membership.base.errors import CoverageLost
from workers.exchange.combine import ascending
from workers.exchange.local import compute_here
from workers.exchange.model_side import ExpertBank


class LocalExchange:
    """`dispatch_combine` by this process alone."""

    def __init__(self, bank: ExpertBank) -> None:
        self._bank = bank

    def stays(self) -> bool:
        """There is no other rank."""
        return True

    def dispatch_combine(self, layer: int, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """[T, H] -> [T, H]: the weighted sum of each row's experts. CoverageLost if one is not here."""
        ids, weights = ascending(topk_ids, topk_weights)
        flat = ids.reshape(-1).tolist()
        for expert in set(flat):
            if not self._bank.holds(layer, expert):
                raise CoverageLost(f"expert {expert} of MoE layer {layer} is not on this rank")
        return compute_here(self._bank, layer, hidden, flat, weights)
