"""A rank's experts without a checkpoint: random ones, which a test may replace."""

from __future__ import annotations

import torch
from torch import Tensor

from membership.base.enums import Exactness
from workers.model.backend import Backend
from workers.model.calibrations import Calibrations
from workers.model.expert_bank import LocalExpertBank
from workers.model.expert_source import ExpertWeights

INNER = 16


class FilledBank(LocalExpertBank):
    """Holds all experts of all layers, on the backend's device."""

    def __init__(self, backend: Backend, layers: int, experts: int, hidden: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(9)
        self._products = backend.expert_products(gated, Exactness.STOCK, Calibrations())
        for layer in range(layers):
            for expert in range(experts):
                up, down = (
                    (torch.randn(*of, generator=generator) * 0.1).to(backend.device).t()
                    for of in ((2 * INNER, hidden), (hidden, INNER))
                )
                self.put(layer, expert, ExpertWeights(up, down))

    def put(self, layer: int, expert: int, weights: ExpertWeights) -> None:
        """As when it has been loaded."""
        self._held[layer, expert] = weights
        self.version += 1


def gated(both: Tensor) -> Tensor:
    """[R, 2I] -> [R, I]"""
    return torch.nn.functional.silu(both[:, :INNER]) * both[:, INNER:]
