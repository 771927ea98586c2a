"""The two products of routed experts on a GPU: one launch for all experts of a call, in tiles of a fixed size."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from membership.base.enums import Exactness
from membership.base.errors import ModelError
from workers.model.backend import Activation
from workers.model.calibrations import Calibrations
from workers.model.cuda.kernels import grouped_product
from workers.model.expert_source import ExpertWeights
from workers.model.row_tiles import CANDIDATES, calibrate_product

KINDS = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
ROWS, COLUMNS = 16, 32
PIECE_BYTES = 256  # of a row of the left side per product
WARPS, STAGES = 2, 4  # measured with COLUMNS on an H200: 0.72 of the time that 64 columns, 4 warps and 3 stages take


class CudaExpertProducts:
    """Satisfies `ExpertProducts`: exact by the kernel's fixed tiles, and checked once on the device that computes."""

    def __init__(self, activation: Activation, exactness: Exactness, calibrations: Calibrations) -> None:
        self._activation = activation
        self._unchecked = exactness == Exactness.INVARIANT
        self._calibrations = calibrations
        self._checking = threading.Lock()

    def calibrate(self, weights: ExpertWeights) -> None:
        """Check, with the first expert, that a row's bits are the same in groups of all sizes. ModelError if not."""
        with self._checking:
            if not self._unchecked:
                return
            for matrix in (weights.gate_up, weights.down):
                what = f"experts {tuple(matrix.shape)} on the GPU"
                sizes = self._calibrations.of(what, lambda matrix=matrix: _agreeing(matrix))  # type: ignore[misc]
                if sizes != CANDIDATES:
                    hint = "--exactness stock serves without the guarantee"
                    raise ModelError("experts: a row's result depends on its batch on this GPU", hint=hint)
            self._calibrations.keep()
            self._unchecked = False

    def padded(self, rows: int) -> int:
        """As many as there are: the kernel masks the rest of its tile."""
        return rows

    def compute(self, experts: Sequence[ExpertWeights], sizes: Sequence[int], rows: Tensor) -> Tensor:
        """See `ExpertProducts`."""
        up, down = ([getattr(w, name) for w in experts] for name in ("gate_up", "down"))
        ends, up_at, down_at = _on_device(
            [0, *accumulate(sizes)], addresses_of(up), addresses_of(down), device=rows.device
        )
        both = multiply(rows, up[0], up_at, ends)
        return multiply(self._activation(both), down[0], down_at, ends)


def multiply(
    rows: Tensor, matrix: Tensor, addresses: Tensor, ends: Tensor, order: Tensor | None = None, shared_by: int = 0
) -> Tensor:
    """rows [R, K], addresses [groups] of matrices [K, N] laid out as `matrix`, ends [groups + 1] -> [R, N].

    With `order` [R]: rows [R // shared_by, K], and row i of the product is made of row order[i] // shared_by.
    """
    inner, width = matrix.shape
    out = rows.new_empty(len(rows) if order is None else len(order), width)
    grouped_product[(triton.cdiv(width, COLUMNS), len(addresses))](
        rows.contiguous(), ends if order is None else order, addresses, ends, out, inner, width, *matrix.stride(),
        SHARED_BY=shared_by, KIND=KINDS[rows.dtype], ROWS=ROWS, COLUMNS=COLUMNS,
        PIECE=PIECE_BYTES // rows.element_size(), num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip
    return out


def addresses_of(matrices: Sequence[Tensor]) -> list[int]:
    """ModelError if the matrices are laid out differently."""
    strides = matrices[0].stride()
    if any(matrix.stride() != strides for matrix in matrices):
        raise ModelError("the experts of a call are laid out differently in memory")
    return [matrix.data_ptr() for matrix in matrices]


def _on_device(*lists: list[int], device: torch.device) -> tuple[Tensor, ...]:
    """All lists in one copy that the host does not wait for: with several ranks on a GPU each wait is a time slice."""
    numbers = torch.tensor([number for part in lists for number in part], pin_memory=device.type == "cuda")
    return numbers.to(device, non_blocking=True).split_with_sizes([len(part) for part in lists])


def _agreeing(matrix: Tensor) -> Sequence[int]:
    def product(rows: Tensor, weight: Tensor) -> Tensor:
        ends, addresses = _on_device([0, len(rows)], addresses_of([weight.t()]), device=rows.device)
        return multiply(rows, weight.t(), addresses, ends)

    return calibrate_product(product, matrix.t(), "experts").sizes
