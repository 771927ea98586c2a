"""Dense products of a long piece of a prompt in one launch each, where torch's would be one per tile of rows.

torch's library chooses its method by the number of rows, so that only some numbers give the same bits, at most 128
(`row_tiles.py`). A kernel of fixed tiles does not know how many there are; whether it sums as torch's call of 16 rows
does is asked at load.
"""

from __future__ import annotations

from functools import partial

import structlog
import triton
from torch import Tensor, nn
from torch.nn import functional
from triton.runtime.errors import OutOfResources

from workers.model.calibrations import Calibrations
from workers.model.cpu.linear import VECTOR, Forward
from workers.model.cuda.expert_products import HIGH, KINDS
from workers.model.cuda.kernels import dense_product
from workers.model.cuda.router import with_product
from workers.model.row_tiles import CANDIDATES, REFERENCE, calibrate_product

log = structlog.get_logger(__name__)


def at_once(module: nn.Module, name: str, calibrations: Calibrations) -> Forward | None:
    """See `AtOnce`: for a projection without a bias, and a fused router."""
    weight = module.get_parameter("weight")
    if weight.dtype not in KINDS or len(weight) < VECTOR or module._parameters.get("bias") is not None:
        return None
    forward = partial(_projected, module) if type(module) is nn.Linear else with_product(module, product)
    if forward is None:
        return None
    what = f"dense {tuple(weight.shape)} of {weight.dtype} on the GPU"
    return forward if calibrations.of(what, partial(_agreeing, weight, name)) == CANDIDATES else None


def product(rows: Tensor, weight: Tensor) -> Tensor:
    """rows [T, K], weight [N, K] -> [T, N]: a row's bits depend on nothing but that row."""
    (count, inner), width = rows.shape, len(weight)
    out = rows.new_empty(count, width)
    piece = HIGH.piece_bytes // rows.element_size()
    dense_product[(triton.cdiv(width, HIGH.columns), triton.cdiv(count, HIGH.rows))](
        rows.contiguous(), weight, out, count, inner, width, weight.stride(1), weight.stride(0),
        EVEN=inner % piece == width % HIGH.columns == 0, ROWS=HIGH.rows, COLUMNS=HIGH.columns, PIECE=piece,
        num_warps=HIGH.warps, num_stages=HIGH.stages,
    )  # fmt: skip
    return out


def _projected(module: nn.Module, hidden: Tensor) -> Tensor:
    weight = module.get_parameter("weight")
    return product(hidden.reshape(-1, weight.shape[1]), weight).view(*hidden.shape[:-1], -1)


def _agreeing(weight: Tensor, name: str) -> tuple[int, ...]:
    """Row counts with the bits of torch's 16; none where this GPU cannot launch such tiles."""

    def either(rows: Tensor, matrix: Tensor) -> Tensor:
        return functional.linear(rows, matrix) if len(rows) == REFERENCE else product(rows, matrix)

    try:
        product(weight.new_zeros(1, weight.shape[1]), weight)
    except OutOfResources as error:  # a GPU with less shared memory
        log.warning("dense_tiles_do_not_fit", product=name, error=str(error))
        return ()
    agreeing = calibrate_product(either, weight, name).sizes
    if agreeing != CANDIDATES:
        log.warning("dense_tiles_round_otherwise", product=name, rows=agreeing)
    return agreeing
