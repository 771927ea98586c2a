"""Compiles Triton kernels of experts' products for GPUs that need not be there; prints how they read memory, as JSON.

A program of its own, as Triton's interpreter is chosen when it is imported.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from workers.model.cuda.expert_products import HIGH, NARROW, WIDE, Tile
from workers.model.cuda.kernels import dense_product, grouped_product

NUMBERS = ["count", "inner", "width", "inner_stride", "width_stride", "least", "below", "shared_by"]
POINTERS = {
    "rows": "*bf16", "order": "*i32", "matrices": "*i64", "matrix": "*bf16", "ends": "*i32", "out": "*bf16",
}  # fmt: skip
ALIGNED = [*POINTERS, "inner", "width", "width_stride"]  # as torch's memory is, and the sizes of all models


def compiled(kernel: Any, tile: Tile, architecture: int, **more: Any) -> str:
    """The PTX for bf16 matrices whose columns lie one behind the other, as those of all models do."""
    constants = dict(
        inner_stride=1, EVEN=True, ROWS=tile.rows, COLUMNS=tile.columns, PIECE=tile.piece_bytes // 2, **more
    )
    names = kernel.arg_names
    kinds = POINTERS | dict.fromkeys(NUMBERS, "i32") | dict.fromkeys(constants, "constexpr")
    source = ASTSource(
        fn=kernel,
        signature={name: kinds[name] for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in ALIGNED if name in names},
    )
    options = dict(num_warps=tile.warps, num_stages=tile.stages)
    return str(triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options).asm["ptx"])


def reads(ptx: str) -> list[int]:
    """How often it reads two bytes at a time, and how often ahead into shared memory."""
    return [ptx.count("ld.global.b16"), ptx.count("cp.async.cg.shared.global")]


def main() -> None:
    """One JSON object: per kernel how often it reads two bytes at a time, and how often ahead into shared memory."""
    found = {}
    for name, tile, architecture, gated in (
        ("narrow, 8.0", NARROW, 80, True), ("narrow, 9.0", NARROW, 90, False), ("wide, 9.0", WIDE, 90, True),
        ("high, 9.0", HIGH, 90, True),
    ):  # fmt: skip
        found[name] = reads(compiled(grouped_product, tile, architecture, GATED=gated, KIND=tl.bfloat16))
    found["dense, 9.0"] = reads(compiled(dense_product, HIGH, 90))
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
