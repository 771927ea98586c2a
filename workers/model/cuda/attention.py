"""Attention over the block-table KV cache on a GPU: each token of a step by itself, prefill and decode alike.

A token's cells are cut into splits of a fixed size; each split is summed by one program and the splits are merged in
ascending order (flash decoding, Dao et al. 2023, with splits that do not depend on the batch). So a token's result
depends on its sequence alone. The price: a prompt's tokens read the same keys again, out of the cache of the GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

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
        return cls(plan, cells, rows, plan.positions[0], pages.view(tables.shape), triton.cdiv(longest, SPLIT))


class CudaAttention:
    """All attention layers of a model. Satisfies `Attention`."""

    tiled = False

    def __init__(self, cache: CudaKVCache, device: torch.device) -> None:
        self.plan: StepPlan | None = None
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
        out = self._attend(layout, queries.contiguous(), cache.keys, cache.values, scaling, window or ALL)
        return functional.pad(out, (0, 0, 0, 0, 0, plan.padded - rows))[None]

    @staticmethod
    def _attend(layout: Layout, queries: Tensor, keys: Tensor, values: Tensor, scaling: float, window: int) -> Tensor:
        """[T, Hq, D] queries over a layer's cache [block, offset, Hkv, width] -> [T, Hq, Dv]."""
        rows, query_heads, width = queries.shape
        page, heads, value_width = values.shape[1:]
        group, splits = query_heads // heads, layout.splits
        wide, value_wide = (max(NARROWEST, triton.next_power_of_2(w)) for w in (width, value_width))
        most = PARTIAL_BYTES // (query_heads * splits * value_width * torch.float32.itemsize)
        most = max(most // TURN, 1) * TURN
        partial = torch.empty(min(rows, most), query_heads, splits, value_width, device=queries.device)
        sizes = torch.empty(min(rows, most), query_heads, splits, device=queries.device)
        out = torch.empty(rows, query_heads, value_width, dtype=queries.dtype, device=queries.device)
        queries = queries.to(keys.dtype)
        for first in range(0, rows, most):
            part = slice(first, min(first + most, rows))
            count = part.stop - first
            attend[(count, heads, splits)](
                queries[part], keys, values, layout.tables, layout.sequences[part], layout.positions[part],
                partial, sizes, scaling, splits, layout.tables.shape[1], window,
                PAGE=page, HEADS=heads, GROUP=group, WIDTH=width, VALUE_WIDTH=value_width,
                SPLIT=SPLIT, ROWS=max(NARROWEST, triton.next_power_of_2(group)), CELLS=CELLS,
                WIDE=wide, VALUE_WIDE=value_wide,
            )  # fmt: skip
            merge[(count * query_heads,)](
                partial, sizes, out[part], splits, VALUE_WIDTH=value_width, VALUE_WIDE=value_wide
            )
        return out
