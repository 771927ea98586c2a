"""The two products of routed experts on a GPU: one launch for all experts of a call, in tiles of a fixed size."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import NamedTuple

import structlog
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional
from triton.runtime.errors import OutOfResources

from membership.base.enums import Exactness
from membership.base.errors import ModelError
from workers.model.backend import Activation
from workers.model.calibrations import Calibrations
from workers.model.cuda.kernels import grouped_product
from workers.model.expert_source import ExpertWeights
from workers.model.row_tiles import CANDIDATES, REFERENCE, calibrate_product

log = structlog.get_logger(__name__)

KINDS = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
FEW = 32  # rows; groups of so many are computed in wide tiles
MORE = 65  # rows; groups of so many in high ones
MANY = 1 << 30  # rows that no group has
TRIED = 4  # rows in the look at an activation
TOLERANCE = 1e-5  # of fp32


@dataclass(frozen=True)
class Tile:
    """What a program computes at a time. The order in which an element is summed does not depend on it."""

    rows: int
    columns: int
    piece_bytes: int  # of a row of the left side per product
    warps: int
    stages: int


NARROW = Tile(16, 32, 256, 2, 4)  # measured on an H200: 0.72 of the time of 64 columns, 4 warps and 3 stages
# On an H200, us a layer of 64 experts with 2,048 and 4,096 rows of top-8: 1,062 and 2,096, 390 and 708, 277 and 477.
WIDE = Tile(64, 128, 128, 4, 3)  # each number is read by a quarter of the programs
HIGH = replace(WIDE, rows=128, warps=8)


class Picked(NamedTuple):
    """Row i of a product is made of row order[i] // shared_by of what is given."""

    order: Tensor
    shared_by: int


class ExpertKernels:
    """Both products of a call's experts and the activation between them. What is launched does not depend on how many
    rows there are: room for those of a long prompt costs a decode step nothing.
    """

    def __init__(self, activation: Activation, *, wide: bool) -> None:
        """`wide`: whether larger tiles may be used."""
        self.wide = wide
        self._activation = activation
        self._gated: bool | None = None

    def few(self, rows: int, groups: int) -> int:
        """From how many rows on a group of a call is computed in wide tiles, if `rows` are for `groups` in all."""
        return FEW if self.wide and 2 * rows >= FEW * groups else MANY

    def look(self, up: Tensor) -> bool:
        """At the activation, for experts with this `gate_up`: whether it is silu times the other half, which is done
        within the product. Before anything is recorded.
        """
        if self._gated is None:
            sample = torch.randn(TRIED, up.shape[1], generator=torch.Generator().manual_seed(0)).to(up.device)
            first, second = sample.chunk(2, dim=1)
            expected = functional.silu(first) * second
            self._gated = torch.allclose(self._activation(sample), expected, TOLERANCE, TOLERANCE)
        return self._gated

    def run(
        self,
        rows: Tensor,
        up: tuple[Tensor, Tensor],
        down: tuple[Tensor, Tensor],
        ends: Tensor,
        picked: Picked | None = None,
        few: int = MANY,
    ) -> Tensor:
        """Of `up` and `down` one expert's matrix each, as which all are laid out, and the addresses of all. The rest as
        for `multiply`.
        """
        if self.look(up[0]):
            middle = multiply(rows, *up, ends, picked, gated=True, few=few)
        else:
            middle = self._activation(multiply(rows, *up, ends, picked, few=few))
        return multiply(middle, *down, ends, few=few)


class CudaExpertProducts:
    """Satisfies `ExpertProducts`: exact by the kernel's fixed tiles, and checked once on the device that computes."""

    def __init__(self, activation: Activation, exactness: Exactness, calibrations: Calibrations) -> None:
        self._exact = exactness == Exactness.INVARIANT
        self._checked = False
        self.kernels = ExpertKernels(activation, wide=False)
        self._calibrations = calibrations
        self._checking = threading.Lock()

    def calibrate(self, weights: ExpertWeights) -> None:
        """Check, with the first expert, that a row's bits are the same in groups of all sizes. ModelError if not; if it
        is for larger tiles alone, or if this GPU has too little shared memory for them, they are not used.
        """
        with self._checking:
            if self._checked:
                return
            products = (weights.gate_up, self.kernels.look(weights.gate_up)), (weights.down, False)
            wide = all(_fits(matrix, gated=gated) for matrix, gated in products)
            if self._exact:
                for matrix, gated in products:
                    wide = self._same_bits(matrix, gated=gated, wide=wide) and wide
                self._calibrations.keep()
            self._checked, self.kernels.wide = True, wide

    def _same_bits(self, matrix: Tensor, *, gated: bool, wide: bool) -> bool:
        """Whether larger tiles give them, too, if they are asked for. ModelError if already small ones do not."""
        what = f"experts {tuple(matrix.shape)}{', gated' * gated} on the GPU"
        if self._calibrations.of(what, partial(_agreeing, matrix, MANY, gated)) != CANDIDATES:
            hint = "--exactness stock serves without the guarantee"
            raise ModelError("experts: a row's result depends on its batch on this GPU", hint=hint)
        if not wide:
            return False
        same = self._calibrations.of(f"{what}, wide", partial(_agreeing, matrix, REFERENCE + 1, gated)) == CANDIDATES
        if not same:
            log.warning("wide_tiles_round_otherwise", product=what)
        return same

    def padded(self, rows: int) -> int:
        """As many as there are: the kernel masks the rest of its tile."""
        return rows

    def compute(self, experts: Sequence[ExpertWeights], sizes: Sequence[int], rows: Tensor) -> Tensor:
        """See `ExpertProducts`."""
        up, down = ([getattr(w, name) for w in experts] for name in ("gate_up", "down"))
        ends, up_at, down_at = _on_device(
            [0, *accumulate(sizes)], addresses_of(up), addresses_of(down), device=rows.device
        )
        few = self.kernels.few(len(rows), len(sizes))
        return self.kernels.run(rows, (up[0], up_at), (down[0], down_at), ends, few=few)


def multiply(
    rows: Tensor,
    matrix: Tensor,
    addresses: Tensor,
    ends: Tensor,
    picked: Picked | None = None,
    *,
    gated: bool = False,
    few: int = MANY,
) -> Tensor:
    """rows [R, K], addresses [groups] of matrices [K, N] laid out as `matrix`, ends [groups + 1] -> [R, N].

    With `picked` of R rows: rows [R // shared_by, K]. `gated`: [R, N / 2], silu of the product's first half times the
    second. `few`: groups of as many rows are computed in wide tiles, those of MORE in high ones.
    """
    inner, read = matrix.shape
    width = read // 2 if gated else read
    order, shared_by = picked or Picked(ends, 0)
    out = rows.new_empty(len(order) if picked else len(rows), width)
    rows = rows.contiguous()
    more = max(few, MORE) if few < MANY else MANY
    for tile, least, below in ((NARROW, 0, few), (WIDE, few, more), (HIGH, more, MANY)):
        if least >= below:
            continue
        piece = tile.piece_bytes // rows.element_size()
        grouped_product[(triton.cdiv(read, tile.columns), len(addresses))](
            rows, order, addresses, ends, out, inner, width, *matrix.stride(), least, below,
            shared_by, EVEN=inner % piece == read % tile.columns == 0, GATED=gated, KIND=KINDS[rows.dtype],
            ROWS=tile.rows, COLUMNS=tile.columns, PIECE=piece, num_warps=tile.warps, num_stages=tile.stages,
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


def _fits(matrix: Tensor, *, gated: bool) -> bool:
    """Whether this GPU can launch the larger tiles. They are compiled here, not in the midst of serving."""
    try:
        for rows in (FEW, MORE):
            ends, addresses = _on_device([0, rows], addresses_of([matrix]), device=matrix.device)
            multiply(matrix.new_zeros(rows, len(matrix)), matrix, addresses, ends, gated=gated, few=FEW)
    except OutOfResources as error:
        log.warning("wide_tiles_do_not_fit", product=tuple(matrix.shape), error=str(error))
        return False
    return True


def _agreeing(matrix: Tensor, few: int, gated: bool) -> Sequence[int]:
    """Row counts with the bits of 16 rows in small tiles. The kernel is the same for rows that are picked."""

    def product(rows: Tensor, weight: Tensor) -> Tensor:
        ends, addresses = _on_device([0, len(rows)], addresses_of([weight.t()]), device=rows.device)
        cut = MANY if len(rows) == REFERENCE else few
        return multiply(rows, weight.t(), addresses, ends, gated=gated, few=cut)

    return calibrate_product(product, matrix.t(), "experts", _with_open_gates if gated else _as_made).sizes


def _as_made(made: Tensor) -> Tensor:
    return made


def _with_open_gates(made: Tensor) -> Tensor:
    """Sums of the first half are not zero any more: else the others would be multiplied by next to nothing."""
    half, width = len(made) // 2, made.shape[1]
    made[:half] = made[:half].roll(1, 1) * width**-0.5
    return made
