"""The two products of routed experts on a GPU: one launch for all experts of a call, in tiles of a fixed size."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

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
TRIED = 4  # rows in the look at an activation
TOLERANCE = 1e-5  # of fp32


class ExpertKernels:
    """Both products of a call's experts and the activation between them. What is launched does not depend on how many
    rows there are: room for those of a long prompt costs a decode step nothing.
    """

    def __init__(self, activation: Activation) -> None:
        self._activation = activation
        self._gated: bool | None = None  # whether it is silu times the other half, which is done within the product

    def look(self, up: Tensor) -> None:
        """At the activation, for experts with this `gate_up`. Before anything is recorded."""
        if self._gated is None:
            sample = torch.randn(TRIED, up.shape[1], generator=torch.Generator().manual_seed(0)).to(up.device)
            first, second = sample.chunk(2, dim=1)
            expected = functional.silu(first) * second
            self._gated = torch.allclose(self._activation(sample), expected, TOLERANCE, TOLERANCE)

    def run(
        self,
        rows: Tensor,
        up: tuple[Tensor, Tensor],
        down: tuple[Tensor, Tensor],
        ends: Tensor,
        order: Tensor | None = None,
        shared_by: int = 0,
    ) -> Tensor:
        """Of `up` and `down` one expert's matrix each, as which all are laid out, and the addresses of all. The rest as
        for `multiply`.
        """
        self.look(up[0])
        if self._gated:
            middle = multiply(rows, *up, ends, order, shared_by, gated=True)
        else:
            middle = self._activation(multiply(rows, *up, ends, order, shared_by))
        return multiply(middle, *down, ends)


class CudaExpertProducts:
    """Satisfies `ExpertProducts`: exact by the kernel's fixed tiles, and checked once on the device that computes."""

    def __init__(self, activation: Activation, exactness: Exactness, calibrations: Calibrations) -> None:
        self._kernels = ExpertKernels(activation)
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
        return self._kernels.run(rows, (up[0], up_at), (down[0], down_at), ends)


def multiply(
    rows: Tensor,
    matrix: Tensor,
    addresses: Tensor,
    ends: Tensor,
    order: Tensor | None = None,
    shared_by: int = 0,
    *,
    gated: bool = False,
) -> Tensor:
    """rows [R, K], addresses [groups] of matrices [K, N] laid out as `matrix`, ends [groups + 1] -> [R, N].

    With `order` [R]: rows [R // shared_by, K], and row i of the product is made of row order[i] // shared_by.
    `gated`: [R, N / 2], silu of the product's first half times the second.
    """
    inner, width = matrix.shape
    columns = COLUMNS
    if gated:  # a program has as many columns in all: as much to read, and as many programs
        width, columns = width // 2, COLUMNS // 2
    out = rows.new_empty(len(rows) if order is None else len(order), width)
    grouped_product[(triton.cdiv(width, columns), len(addresses))](
        rows.contiguous(), ends if order is None else order, addresses, ends, out, inner, width, *matrix.stride(),
        GATED=gated, SHARED_BY=shared_by, KIND=KINDS[rows.dtype], ROWS=ROWS, COLUMNS=columns,
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
