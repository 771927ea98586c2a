"""The two products of routed experts. In invariant mode each row's bits are independent of the rows beside it."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from membership.base.enums import Exactness
from workers.model.backend import Activation
from workers.model.calibrations import Calibrations
from workers.model.expert_source import ExpertWeights
from workers.model.row_tiles import RowTiles, calibrate_product


class CpuExpertProducts:
    """Satisfies `ExpertProducts`."""

    def __init__(self, activation: Activation, exactness: Exactness, calibrations: Calibrations) -> None:
        self._activation = activation
        self._exact = exactness == Exactness.INVARIANT
        self._calibrations = calibrations
        self._tiles: RowTiles | None = None  # known once the first expert is here; never in stock mode
        self._calibrating = threading.Lock()

    def calibrate(self, weights: ExpertWeights) -> None:
        """Find the agreeing row counts once; all experts of a model have the same shape."""
        with self._calibrating:
            if self._tiles is None and self._exact:
                shapes = f"{tuple(weights.gate_up.shape)} {tuple(weights.down.shape)}"
                try:
                    self._tiles = RowTiles(self._calibrations.of(shapes, partial(_agreeing_sizes, weights)))
                finally:
                    self._calibrations.keep()

    def padded(self, rows: int) -> int:
        """The next row count whose results agree."""
        return self._tiles.padded(rows) if self._tiles is not None else rows

    def compute(self, experts: Sequence[ExpertWeights], sizes: Sequence[int], rows: Tensor) -> Tensor:
        """See `ExpertProducts`. The activation runs once over all rows, not once per expert."""
        if len(experts) == 1 and (self._tiles is None or sizes[0] <= self._tiles.sizes[-1]):
            return torch.mm(self._activation(torch.mm(rows, experts[0].gate_up)), experts[0].down)
        both = rows.new_empty(rows.shape[0], experts[0].gate_up.shape[1])
        self._multiply(rows, [w.gate_up for w in experts], sizes, both)
        out = rows.new_empty(rows.shape[0], experts[0].down.shape[1])
        self._multiply(self._activation(both), [w.down for w in experts], sizes, out)
        return out

    def _multiply(self, rows: Tensor, weights: Sequence[Tensor], sizes: Sequence[int], out: Tensor) -> None:
        """Multiply each group of rows with its matrix, in pieces of at most the largest agreeing row count."""
        most = self._tiles.sizes[-1] if self._tiles is not None else rows.shape[0]
        groups = zip(weights, sizes, rows.split_with_sizes(sizes), out.split_with_sizes(sizes), strict=True)
        for weight, size, group, into in groups:
            if size <= most:
                torch.mm(group, weight, out=into)
                continue
            for first in range(0, size, most):
                torch.mm(group[first : first + most], weight, out=into[first : first + most])


def _agreeing_sizes(weights: ExpertWeights) -> list[int]:
    up = calibrate_product(_product, weights.gate_up.t(), "experts")
    down = calibrate_product(_product, weights.down.t(), "experts")
    return [size for size in up.sizes if size in down.sizes]


def _product(rows: Tensor, weight: Tensor) -> Tensor:
    return torch.mm(rows, weight.t())
