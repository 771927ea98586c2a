"""Attention over the block-table KV cache, for prefill and decode tokens of many sequences in one packed step.

Each tile of queries is multiplied with the keys of its own sequence. The softmax is over the whole padded context at
once; the product with the values is summed in slices of 128 cells, ascending. All of it is in fp32. Padding adds exact
zeros only, so a token's result does not depend on its batch mates or on how its prompt was cut, provided that the
matrix products do not depend on the number of rows: `attention_check.py` verifies that at load.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from membership.base.errors import ModelError
from workers.model.attention_plan import Band, StepPlan, Tiles
from workers.model.cpu.compute_threads import ComputeThreads
from workers.model.cpu.kv_cache import Context, CpuKVCache, LayerCache, storable

OfPart = Callable[[slice, int], Context]
"""The first so many cells of some contexts, (tile, head)."""
SLICE = 128  # cells per accumulated product with the values
CACHED = 128 * 1024  # attention weights that are computed at once, so that they stay in a core's cache
KEPT_AT_ONCE = 32 << 20  # contexts that one step begins to keep: its first pages are slow, and clients wait for it


class CpuAttention:
    """All attention layers of a model. Satisfies `Attention`."""

    tiled = True

    def __init__(self, cache: CpuKVCache, threads: ComputeThreads) -> None:
        self.plan: StepPlan | None = None
        self.cache = cache
        self._threads = threads
        self.min_rows = 1  # fewest query rows per product; more where exactness needs it

    def forward(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None
    ) -> Tensor:
        """One layer: query [1, Hq, T, D], key [1, Hkv, T, D], value [1, Hkv, T, Dv] -> [1, T, Hq, Dv]. ModelError."""
        plan = self.plan
        if plan is None:
            raise ModelError("attention was called outside of a step")
        cache = self.cache.layers[layer]
        heads, rows = key.shape[1], plan.rows
        new_keys, new_values = storable(key[0].transpose(0, 1)[:rows], value[0].transpose(0, 1)[:rows])  # [T, Hkv, D]
        layout = self.cache.layout(new_keys, new_values)
        key_cells, value_cells = (
            plan.cache_cells(heads, layout.rows_per_block, count)
            for count in (layout.keys_per_row, layout.values_per_row)
        )
        cache.write(key_cells, value_cells, new_keys, new_values)
        queries = query[0].transpose(0, 1)  # [T, Hq, D]
        if plan.plain:
            context = self._mirrored(plan, layer, new_keys, new_values, layout.rows_per_block)
            out = self._attend(plan.tiles[0], queries[:rows], context.part, heads, scaling, window)
        else:
            cache.mirror = None
            out = queries.new_empty(rows, queries.shape[1], value.shape[-1], dtype=torch.float32)
            for tiles in plan.tiles:
                picked = queries.index_select(0, tiles.tokens)
                of_part = partial(_picked, cache, tiles.rows(heads, layout.rows_per_block), tiles)
                found = self._attend(tiles, picked, of_part, heads, scaling, window)
                out.index_copy_(0, tiles.targets, found.index_select(0, tiles.real))
        if plan.padded != rows:
            out = functional.pad(out, (0, 0, 0, 0, 0, plan.padded - rows))
        return out.to(query.dtype)[None]

    def _mirrored(self, plan: StepPlan, layer: int, keys: Tensor, values: Tensor, rows_per_block: int) -> Context:
        """The contexts of a plain step: those of the step before plus the new tokens, where these were kept.

        Nothing is kept of a step with other sequences than before, which is the first one after a death: it may be the
        only one. Those that follow it begin with a few layers each.
        """
        cache, heads, tiles = self.cache.layers[layer], keys.shape[1], plan.tiles[0]
        if plan.followed and cache.mirror is not None:
            cache.mirror.append(plan.mirror_cells(heads), keys, values)
            return cache.mirror
        cache.mirror = None
        rows = tiles.rows(heads, rows_per_block)
        context_bytes = len(rows) * tiles.block_size * (keys.shape[-1] + values.shape[-1]) * torch.float32.itemsize
        if layer < plan.followed * max(1, KEPT_AT_ONCE // context_bytes):
            kept = cache.keep(rows, tiles.length)
            if kept is not None:
                return kept
        return cache.gather(rows, tiles.length)

    def _attend(
        self, tiles: Tiles, queries: Tensor, context: OfPart, heads: int, scaling: float, window: int | None
    ) -> Tensor:
        """Results [count * positions, Hq, Dv] of equal tiles for queries [count * positions, Hq, D]."""
        count, positions = tiles.count, tiles.positions
        query_heads, width = queries.shape[1:]
        group = query_heads // heads
        picked = queries.float().view(count, positions, heads, group, width).transpose(1, 2)
        picked = picked.reshape(count * heads, positions * group, width)
        short = self.min_rows - positions * group
        if short > 0:
            picked = functional.pad(picked, (0, 0, 0, short))

        def attend(part: range) -> Tensor:
            own, first, end = slice(part.start, part.stop), part.start // heads, (part.stop - 1) // heads + 1
            keys, values = context(own, tiles.seen(first, end))
            view = end - first, -1, positions, group, keys.shape[1]
            return mix(_probs(picked[own], keys, tiles.mask(window, first, end), scaling, view), values)

        numbers = picked.shape[1] * tiles.length
        work = 2 * numbers * width  # of each; values are about as wide as keys
        some = parts(count, heads, numbers, self._threads.sharing(count * heads * work))
        found = self._threads.map(attend, some, len(some[0]) * work)
        mixed = found[0] if len(found) == 1 else torch.cat(found)
        mixed = mixed[:, : positions * group].view(count, heads, positions, group, -1)
        return mixed.transpose(1, 2).reshape(count * positions, query_heads, -1)


def _picked(cache: LayerCache, rows: Tensor, tiles: Tiles, own: slice, seen: int) -> Context:
    """The first `seen` cells of some contexts of a prompt's tiles, whose (tile, head) are the `rows` of the cache: in
    the thread that wants them, and in its core's cache then.
    """
    blocks = rows.view(-1, tiles.length // tiles.block_size)
    return cache.pick(blocks[own, : seen // tiles.block_size].reshape(-1), seen)


def parts(tiles: int, heads: int, numbers: int, threads: int = 1) -> list[range]:
    """All (tile, head), each with so many numbers, in parts that fit in the cache: whole tiles, or heads of one.

    There are as many as threads at least, of about one size: a decode step's would fit in one.
    """
    most = max(1, min(CACHED // numbers, -(-tiles * heads // threads)))
    size = most // heads * heads or most
    within = tiles * heads if most >= heads else heads
    starts = range(0, tiles * heads, within)
    return [range(a + b, a + min(b + size, within)) for a in starts for b in range(0, within, size)]


def _probs(
    queries: Tensor, keys: Tensor, mask: list[Band], scaling: float, view: tuple[int, int, int, int, int]
) -> Tensor:
    """Attention weights [(tile, head), rows, length]; `view`: tiles, heads, positions, group and length. Rows beyond
    positions * group mean nothing.
    """
    scores = torch.bmm(queries * scaling, keys.transpose(1, 2))
    real = scores[:, : view[2] * view[3]].view(view)
    for band in mask:
        band.apply(real)
    return torch.softmax(scores, dim=-1)


def mix(probs: Tensor, values: Tensor) -> Tensor:
    """probs [B, R, L] times values [B, L, D], summed slice after slice so that trailing zeros change nothing."""
    length = probs.shape[-1]
    total = torch.bmm(probs[..., :SLICE], values[:, :SLICE])
    for start in range(SLICE, length, SLICE):
        total.baddbmm_(probs[..., start : start + SLICE], values[:, start : start + SLICE])
    return total
