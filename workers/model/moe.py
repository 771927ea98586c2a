"""The MoE layers of a model: where their rows go, how many each expert got, and what an expert's activation is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from membership.base.errors import ModelError
from workers.model.backend import Activation, LocalExperts


class Dispatcher(Protocol):
    """The part of an exchange that a model layer uses."""

    def dispatch_combine(self, layer: int, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """Each row's weighted sum of its experts' outputs, whichever ranks hold them: [T, H] -> [T, H].

        `topk_ids` and `topk_weights` are [T, k]. CoverageLost and PeerTimeout as the exchange raises them.
        """

    def stays(self) -> bool:
        """Whether no rows need to travel in this step: every rank holds all experts, and no peer has asked."""


def activation_of(module: nn.Module) -> Activation:
    """How this family turns [R, 2I] into [R, I]; the usual gate is done with one copy less than transformers does."""
    from transformers.integrations.moe import _default_apply_gate

    gate = cast("Any", module)._apply_gate
    if getattr(gate, "__func__", None) is not _default_apply_gate:
        return cast("Activation", gate)
    act = cast("Activation", cast("Any", module).act_fn.forward)

    def gated(both: Tensor) -> Tensor:
        half = both.shape[-1] // 2
        return act(both[..., :half]).mul_(both[..., half:])

    return gated


class MoeLayers:
    """Sends the rows of a model's MoE layers to an exchange, and counts the load of each expert."""

    def __init__(self, layers: int, experts: int) -> None:
        self.exchange: Dispatcher | None = None
        self.local: LocalExperts | None = None
        self.shared: LocalExperts | None = None  # those of all ranks of a step that they run together
        self.on_device: LocalExperts | None = None  # see `MoeBoundary`
        self.leave: Callable[[int, Tensor, Tensor, Tensor], Tensor] | None = None  # see `MoeBoundary`
        self.rows = 0  # rows of the current step that are real; the rest is padding and goes nowhere
        self._routed: list[list[Tensor]] = [[] for _ in range(layers)]
        self._shape = (layers, experts)

    def begin(self, rows: int, *, together: bool = False) -> None:
        """A step of that many real rows follows. `together`: over `shared`. ModelError if there is none."""
        self.rows = rows
        if together and self.shared is None:
            raise ModelError("a step of all ranks together, but this rank does not reach the others' GPUs")
        stays = self.exchange is not None and self.exchange.stays()
        experts = self.shared if together else self.local if stays else None
        self.on_device = experts if experts is not None and experts.begin(rows) else None

    def check(self) -> None:
        """Once the step's results are there: CalledOff if they mean nothing."""
        if self.on_device is not None:
            self.on_device.check()

    def take_load(self) -> np.ndarray:
        """Rows routed to each (MoE layer, expert) since the last call: uint32 [layers, experts]."""
        load = np.zeros(self._shape, dtype=np.uint32)
        for experts in (self.local, self.shared):
            if experts is not None:
                load += experts.take_load()
        for layer, routed in enumerate(self._routed):
            if routed:
                ids = torch.cat(routed).cpu().numpy()
                load[layer] += np.bincount(ids, minlength=self._shape[1]).astype(np.uint32)
                routed.clear()
        return load

    def forward(self, layer: int, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """The routed part of one MoE layer: hidden [T, H], ids and weights [T, k] -> [T, H].

        ModelError before an exchange is attached.
        """
        if self.on_device is not None:
            return self.on_device.compute(layer, hidden, ids, weights)
        if self.leave is not None:
            return self.leave(layer, hidden, ids, weights)
        rows = self.rows
        padding = hidden.shape[0] - rows
        if padding:
            hidden, ids, weights = hidden[:rows], ids[:rows], weights[:rows]
        out = self.compute(layer, hidden, ids, weights)
        return functional.pad(out, (0, 0, 0, padding)) if padding else out

    def compute(self, layer: int, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """The same for rows that are all real."""
        if self.exchange is None:
            raise ModelError("no exchange is attached to the model")
        self._routed[layer].append(ids.reshape(-1))
        return self.exchange.dispatch_combine(layer, hidden, ids, weights)
