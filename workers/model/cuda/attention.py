"""Attention over the block-table KV cache on a GPU, prefill and decode alike.

A token's cells are cut into splits of a fixed size; each split is summed by one program and the splits are merged in
ascending order (flash decoding, Dao et al. 2023, with splits that do not depend on the batch). So a token's result
depends on its sequence alone. A program of a prompt's step computes several tokens, which read the same keys, where
each has the bits then that it has alone (`attention_check.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import triton
from torch import Tensor
from torch.nn import functional

from membership.base.errors import ModelError
from workers.model.attention_plan import StepPlan
from workers.model.cuda.kernels import attend, merge
from workers.model.cuda.kv_cache import CudaKVCache

SPLIT = 256  # cells per program
CELLS = 64  # cells per product
NARROWEST = 16  # what a matrix unit takes
HIGHEST = ((256, 128), (512, 64))  # of a tile for several tokens: bytes of a head up to which it has so many rows
ALL = 1 << 30  # a window that hides nothing
PARTIAL_BYTES = 256 << 20  # of what splits give before they are merged; a long prompt's rows are computed in turns
TURN = 16  # rows, or a multiple: where a turn begins is as aligned as where the first does, so none is compiled anew


@dataclass(frozen=True)
class Layout:
    """What all layers of one step share."""

    plan: StepPlan
    cells: Tensor  # [T] where each row's key goes
    sequences: Tensor  # [T] the row of `tables` of each row
    positions: Tensor  # [T] in its sequence
    tables: Tensor  # [sequence, pages] of blocks
    splits: int
    shared: bool = False  # tokens stand beside others of their sequence

    @classmethod
    def of(cls, plan: StepPlan, device: torch.device) -> Layout:
        """Of one step; all its numbers go to the GPU in one copy that the host does not wait for."""
        counts = np.diff([-1, *plan.last])
        tables = np.zeros((len(plan.tables), max(map(len, plan.tables))), dtype=np.int64)
        for row, blocks in zip(tables, plan.tables, strict=True):
            row[: len(blocks)] = blocks
        sequences = np.repeat(np.arange(len(counts)), counts)
        numbers = torch.from_numpy(np.concatenate((plan.cells, sequences, tables.reshape(-1))))
        if device.type == "cuda":
            numbers = numbers.pin_memory()
        cells, rows, pages = numbers.to(device, non_blocking=True).split_with_sizes([plan.rows, plan.rows, tables.size])
        longest = int(max(plan.starts + counts))
        splits, shared = triton.cdiv(longest, SPLIT), plan.rows >= 2 * len(counts)
        return cls(plan, cells, rows, plan.positions[0], pages.view(tables.shape), splits, shared)


class Look(NamedTuple):
    """How tokens look at what stands before them."""

    scaling: float  # of scores
    window: int  # of the last tokens


def tokens_at_once(group: int, head_bytes: int) -> int:
    """How many tokens a program may compute, for so many query heads per key/value head of so many bytes."""
    rows = next((rows for most, rows in HIGHEST if head_bytes <= most), 0)
    return max(rows // _power(group), 1)


def add_splits(
    layout: Layout,
    part: slice,
    queries: Tensor,
    cells: tuple[Tensor, Tensor],
    look: Look,
    tokens: int,
    into: tuple[Tensor, Tensor],
) -> None:
    """The splits of these rows of `queries` [T, Hq, D], so many `tokens` per program: of `cells` (keys and values
    [block, offset, Hkv, width]) the sums and their sizes `into` [T, Hq, splits, Dv] and [T, Hq, splits].
    """
    keys, values = cells
    group = queries.shape[1] // keys.shape[2]
    (page, heads, width), value_width = keys.shape[1:], values.shape[3]
    room, count = _power(group), part.stop - part.start
    attend[(triton.cdiv(count, tokens), heads, layout.splits)](
        queries[part], keys, values, layout.tables, layout.sequences[part], layout.positions[part],
        *into, look.scaling, count, layout.splits, layout.tables.shape[1], look.window,
        PAGE=page, HEADS=heads, GROUP=group, WIDTH=width, VALUE_WIDTH=value_width, SPLIT=SPLIT, TOKENS=tokens,
        ROOM=room if tokens > 1 else max(NARROWEST, room), CELLS=CELLS, WIDE=_wide(width),
        VALUE_WIDE=_wide(value_width), num_warps=8 if tokens > 1 else 4,
        num_stages=3, enable_fp_fusion=False,
    )  # fmt: skip


def _power(count: int) -> int:
    return 1 << (count - 1).bit_length()


def _wide(width: int) -> int:
    return max(NARROWEST, _power(width))


class CudaAttention:
    """All attention layers of a model. Satisfies `Attention`."""

    tiled = False

    def __init__(self, cache: CudaKVCache, device: torch.device, tokens: int = 1) -> None:
        """`tokens`: of a prompt, per program."""
        self.plan: StepPlan | None = None
        self.tokens = tokens
        self.cache = cache
        self._device = device
        self._layout: Layout | None = None

    @contextmanager
    def holding(self, layout: Layout) -> Iterator[None]:
        """Steps with the plan of `layout` use it as it is."""
        self._layout = layout
        try:
            yield
        finally:
            self._layout = None

    def forward(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None
    ) -> Tensor:
        """One layer: query [1, Hq, T, D], key [1, Hkv, T, D], value [1, Hkv, T, Dv] -> [1, T, Hq, Dv]. ModelError."""
        plan = self.plan
        if plan is None:
            raise ModelError("attention was called outside of a step")
        if self._layout is None or self._layout.plan is not plan:
            self._layout = Layout.of(plan, self._device)
        layout, rows = self._layout, plan.rows
        queries, keys, values = (part[0].transpose(0, 1)[:rows] for part in (query, key, value))  # [T, heads, width]
        cache = self.cache.layers[layer]
        cache.write(layout.cells, keys, values)
        out = self._attend(layout, queries.contiguous(), cache.keys, cache.values, Look(scaling, window or ALL))
        return functional.pad(out, (0, 0, 0, 0, 0, plan.padded - rows))[None]

    def _attend(self, layout: Layout, queries: Tensor, keys: Tensor, values: Tensor, look: Look) -> Tensor:
        """[T, Hq, D] queries over a layer's cache [block, offset, Hkv, width] -> [T, Hq, Dv]."""
        rows, query_heads, _ = queries.shape
        value_width, splits = values.shape[3], layout.splits
        most = PARTIAL_BYTES // (query_heads * splits * value_width * torch.float32.itemsize)
        most = max(most // TURN, 1) * TURN
        partial = torch.empty(min(rows, most), query_heads, splits, value_width, device=queries.device)
        sizes = torch.empty(min(rows, most), query_heads, splits, device=queries.device)
        out = torch.empty(rows, query_heads, value_width, dtype=queries.dtype, device=queries.device)
        queries = queries.to(keys.dtype)
        tokens = self.tokens if layout.shared else 1
        for first in range(0, rows, most):
            part = slice(first, min(first + most, rows))
            add_splits(layout, part, queries, (keys, values), look, tokens, (partial, sizes))
            merge[((part.stop - first) * query_heads,)](
                partial, sizes, out[part], splits, VALUE_WIDTH=value_width, VALUE_WIDE=_wide(value_width)
            )
        return out
