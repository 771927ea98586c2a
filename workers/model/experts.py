"""The experts that this rank holds, and the hook through which the model's MoE layers reach everybody's experts.

Experts come and go one by one while the rank serves: a background thread loads, the step thread computes. Entries are
replaced whole, so no lock is held while computing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from functools import partial
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from membership.base.errors import ModelError
from workers.model.calibrations import Calibrations
from workers.model.linear import RowTiles, calibrate_product
from workers.model.load import ExpertSource, ExpertWeights


class Dispatcher(Protocol):
    """The part of an exchange that a model layer uses."""

    def dispatch_combine(self, layer: int, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """Each row's weighted sum of its experts' outputs, whoever holds them."""


class LocalExpertBank:
    """Experts by (MoE layer, logical id). `invariant` makes each row's bits independent of how many rows come along."""

    def __init__(self, *, invariant: bool) -> None:
        self._source: ExpertSource | None = None
        self._activation: Callable[[Tensor], Tensor] = functional.silu
        self.invariant = invariant
        self.bytes_mapped = 0  # from the host's weight store, in all
        self._held: dict[tuple[int, int], ExpertWeights] = {}
        self._calibrations = Calibrations()
        self._tiles: RowTiles | None = None  # known once the first expert is here; never in stock mode
        self._calibrating = threading.Lock()

    def open(
        self,
        source: ExpertSource,
        activation: Callable[[Tensor], Tensor],
        calibrations: Calibrations | None = None,
    ) -> None:
        """Say where experts come from, and how [R, 2I] becomes [R, I] between an expert's two products."""
        self._source = source
        self._activation = activation
        self._calibrations = calibrations or self._calibrations

    def holds(self, layer: int, expert: int) -> bool:
        """Whether `compute` would work."""
        return (layer, expert) in self._held

    def held(self) -> frozenset[tuple[int, int]]:
        """All (layer, expert) here."""
        return frozenset(self._held)

    def padded(self, rows: int) -> int:
        """How many rows `compute_many` wants for an expert that has `rows`; the added ones may hold anything."""
        return self._tiles.padded(rows) if self._tiles is not None else rows

    def compute(self, layer: int, expert: int, rows: Tensor) -> Tensor:
        """The unweighted outputs [R, H] of one expert for rows [R, H]."""
        count = rows.shape[0]
        padded = self.padded(count)
        if padded != count:
            rows = functional.pad(rows, (0, 0, 0, padded - count))
        out = self.compute_many(layer, [expert], [padded], rows)
        return out if padded == count else out[:count]

    def compute_many(self, layer: int, experts: Sequence[int], sizes: Sequence[int], rows: Tensor) -> Tensor:
        """Outputs of several experts at once: the first `sizes[0]` rows are for `experts[0]`, and so on.

        Each size must be as `padded` gave it. The activation runs once over all rows, not once per expert.
        """
        held = [self._weights(layer, expert) for expert in experts]
        if len(held) == 1 and (self._tiles is None or sizes[0] <= self._tiles.sizes[-1]):
            return torch.mm(self._activation(torch.mm(rows, held[0].gate_up)), held[0].down)
        both = rows.new_empty(rows.shape[0], held[0].gate_up.shape[1])
        self._products(rows, [w.gate_up for w in held], sizes, both)
        out = rows.new_empty(rows.shape[0], held[0].down.shape[1])
        self._products(self._activation(both), [w.down for w in held], sizes, out)
        return out

    def _weights(self, layer: int, expert: int) -> ExpertWeights:
        weights = self._held.get((layer, expert))
        if weights is None:
            raise ModelError(f"expert {expert} of MoE layer {layer} is not on this rank")
        return weights

    def _products(self, rows: Tensor, weights: Sequence[Tensor], sizes: Sequence[int], out: Tensor) -> None:
        """Multiply each group of rows with its matrix, in pieces of at most the largest agreeing row count."""
        most = self._tiles.sizes[-1] if self._tiles is not None else rows.shape[0]
        groups = zip(weights, sizes, rows.split_with_sizes(sizes), out.split_with_sizes(sizes), strict=True)
        for weight, size, group, into in groups:
            if size <= most:
                torch.mm(group, weight, out=into)
                continue
            for first in range(0, size, most):
                torch.mm(group[first : first + most], weight, out=into[first : first + most])

    def load(self, layer: int, expert: int) -> int:
        """Get an expert if it is not here yet; the bytes read for it. May run in any thread."""
        return self.load_all([(layer, expert)])

    def load_all(
        self,
        wanted: Iterable[tuple[int, int]],
        stop: Callable[[], bool] = lambda: False,
        before_read: Callable[[], object] = lambda: None,
    ) -> int:
        """Get what is missing of `wanted`, in order, until `stop` says to give up; the bytes read from the checkpoint.

        What the host's weight store had is not read: it adds to `bytes_mapped`.
        """
        missing = [key for key in dict.fromkeys(wanted) if key not in self._held]
        if missing and self._source is None:
            raise ModelError("experts were asked for before the model was loaded")
        read = 0
        if not missing or self._source is None or stop():
            return read
        with closing(self._source.load_many(missing, before_read)) as coming:
            for key, weights in coming:
                self._calibrate(weights)
                self._held[key] = weights
                if weights.mapped:
                    self.bytes_mapped += weights.nbytes
                else:
                    read += weights.nbytes
                if stop():
                    break
        return read

    def drop(self, keep: frozenset[tuple[int, int]]) -> int:
        """Forget every expert that is not in `keep`; how many."""
        gone = [key for key in self._held if key not in keep]
        for key in gone:
            del self._held[key]
        return len(gone)

    def _calibrate(self, weights: ExpertWeights) -> None:
        """Find the agreeing row counts once; all experts of a model have the same shape."""
        with self._calibrating:
            if self._tiles is None and self.invariant:
                shapes = f"{tuple(weights.gate_up.shape)} {tuple(weights.down.shape)}"
                self._tiles = RowTiles(self._calibrations.of(shapes, partial(_expert_sizes, weights)))
                self._calibrations.keep()


def _expert_sizes(weights: ExpertWeights) -> list[int]:
    up = calibrate_product(_product, weights.gate_up.t(), "experts")
    down = calibrate_product(_product, weights.down.t(), "experts")
    return [size for size in up.sizes if size in down.sizes]


def _product(rows: Tensor, weight: Tensor) -> Tensor:
    return torch.mm(rows, weight.t())


def activation_of(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """How this family turns [R, 2I] into [R, I]; the usual gate is done with one copy less than transformers does."""
    from transformers.integrations.moe import _default_apply_gate

    gate = cast("Any", module)._apply_gate
    if getattr(gate, "__func__", None) is not _default_apply_gate:
        return cast("Callable[[Tensor], Tensor]", gate)
    act = cast("Callable[[Tensor], Tensor]", cast("Any", module).act_fn.forward)

    def gated(both: Tensor) -> Tensor:
        half = both.shape[-1] // 2
        return act(both[..., :half]).mul_(both[..., half:])

    return gated


class MoeHook:
    """Connects a model's expert modules with an exchange, and counts the load of each expert."""

    def __init__(self, modules: list[nn.Module], experts: int) -> None:
        self.exchange: Dispatcher | None = None
        self.rows = 0  # rows of the current step that are real; the rest is padding and goes nowhere
        self._routed: list[tuple[int, Tensor]] = []
        self._shape = (len(modules), experts)
        for layer, module in enumerate(modules):
            cast("Any", module).elastic_layer = layer
            cast("Any", module).elastic_experts = self

    def take_load(self) -> np.ndarray:
        """Rows routed to each (MoE layer, expert) since the last call."""
        load = np.zeros(self._shape, dtype=np.uint32)
        for layer, ids in self._routed:
            load[layer] += np.bincount(ids.reshape(-1).cpu().numpy(), minlength=self._shape[1]).astype(np.uint32)
        self._routed.clear()
        return load

    def forward(self, layer: int, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """The routed part of one MoE layer."""
        if self.exchange is None:
            raise ModelError("no exchange is attached to the model")
        rows = self.rows
        padding = hidden.shape[0] - rows
        if padding:
            hidden, ids, weights = hidden[:rows], ids[:rows], weights[:rows]
        self._routed.append((layer, ids))
        out = self.exchange.dispatch_combine(layer, hidden, ids, weights)
        return functional.pad(out, (0, 0, 0, padding)) if padding else out
