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
from workers.model.cpu.compute_threads import ComputeThreads, product_work
from workers.model.expert_source import ExpertWeights
from workers.model.packing import is_packed, product, repacked
from workers.model.row_tiles import RowTiles, calibrate_product

FEW_ROWS = 16  # of an expert; above, what lies between its two products had better stay in the cache


class CpuExpertProducts:
    """Satisfies `ExpertProducts`."""

    def __init__(
        self, activation: Activation, exactness: Exactness, calibrations: Calibrations, threads: ComputeThreads
    ) -> None:
        self._activation = activation
        self._threads = threads
        self._exact = exactness == Exactness.INVARIANT
        self._calibrations = calibrations
        self._tiles: RowTiles | None = None  # known once the first expert is here; never in stock mode
        self._calibrating = threading.Lock()

    def calibrate(self, weights: ExpertWeights) -> None:
        """Find the agreeing row counts once; all experts of a model have the same shape."""
        with self._calibrating:
            if self._tiles is None and self._exact:
                shapes = f"{tuple(weights.gate_up.shape)} {tuple(weights.down.shape)}"
                shapes += " packed" * is_packed(weights.gate_up) + " packed" * is_packed(weights.down)
                try:
                    self._tiles = RowTiles(self._calibrations.of(shapes, partial(_agreeing_sizes, weights)))
                finally:
                    self._calibrations.keep()

    def padded(self, rows: int) -> int:
        """The next row count whose results agree."""
        return self._tiles.padded(rows) if self._tiles is not None else rows

    def compute(self, experts: Sequence[ExpertWeights], sizes: Sequence[int], rows: Tensor) -> Tensor:
        """See `ExpertProducts`. With few rows the activation runs once over all of them, not once per expert."""
        most = self._tiles.sizes[-1] if self._tiles is not None else rows.shape[0]
        if len(experts) == 1 and sizes[0] <= most:
            return self._chain(rows, experts[0])
        out = torch.empty_like(rows, memory_format=torch.contiguous_format)
        groups = zip(experts, rows.split_with_sizes(sizes), out.split_with_sizes(sizes), strict=True)
        pieces = [
            (weights, group[first : first + most], into[first : first + most])
            for weights, group, into in groups
            for first in range(0, group.shape[0], most)
        ]
        each = rows.shape[0] // len(pieces)
        work = product_work(each, experts[0].gate_up.numel() + experts[0].down.numel())
        if self._threads.helps(work) or each > FEW_ROWS:
            self._threads.map(lambda piece: self._chain(piece[1], piece[0], piece[2]), pieces, work)
            return out
        both = rows.new_empty(rows.shape[0], experts[0].gate_up.numel() // rows.shape[1])
        ups = both.split_with_sizes([group.shape[0] for _, group, _ in pieces])
        for (weights, group, _), up in zip(pieces, ups, strict=True):
            product(group, weights.gate_up, up)
        acted = self._activation(both).split_with_sizes([group.shape[0] for _, group, _ in pieces])
        for (weights, _, into), inner in zip(pieces, acted, strict=True):
            product(inner, weights.down, into)
        return out

    def _chain(self, rows: Tensor, weights: ExpertWeights, out: Tensor | None = None) -> Tensor:
        return product(self._activation(product(rows, weights.gate_up)), weights.down, out)


def _agreeing_sizes(weights: ExpertWeights) -> list[int]:
    up, down = (
        calibrate_product(product, matrix, "experts", repacked)
        if is_packed(matrix)
        else calibrate_product(product, matrix.t(), "experts", Tensor.t)
        for matrix in (weights.gate_up, weights.down)
    )
    return [size for size in up.sizes if size in down.sizes]
