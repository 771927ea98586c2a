"""Attention over the block-table KV cache, for prefill and decode tokens of many sequences in one packed step.

Each tile of queries is multiplied with the keys of its own sequence, softmaxed in one piece over a padded context, and
multiplied with the values in slices of 128 in ascending order, all in fp32. Padding adds exact zeros only, so a
token's result does not depend on its batch mates or on how its prompt was cut, as long as the matrix products do not
look at the number of rows: that is checked at load (`check_tiles`).
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from membership.base.errors import ModelError
from workers.model.attention_plan import TILE_POSITIONS, StepPlan, Tiles
from workers.model.kv import Context, KVCache, LayerCache

SLICE = 128  # cells per accumulated product with the values
REFERENCE_ROWS = 16
MIRROR_BYTES = 256 << 20  # most memory for keeping the gathered contexts of all layers from one decode step to the next


class AttentionHook:
    """Connects a model's attention modules with the cache and with the plan of the current step."""

    def __init__(self, modules: list[nn.Module], cache: KVCache) -> None:
        self.plan: StepPlan | None = None
        self.cache = cache
        self.min_rows = 1  # fewest query rows per product, raised in invariant mode
        for module in modules:
            cast("Any", module).elastic_attention = self
            cast("Any", module).elastic_window = getattr(module, "sliding_window", None)

    def forward(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None
    ) -> Tensor:
        """Attention of one layer: query [1, Hq, T, D], key [1, Hkv, T, D], value [1, Hkv, T, Dv] -> [1, T, Hq, Dv]."""
        plan = self.plan
        if plan is None:
            raise ModelError("attention was called outside of a step")
        cache = self.cache.layers[layer]
        heads, rows = key.shape[1], plan.rows
        new_keys, new_values = key[0].transpose(0, 1)[:rows], value[0].transpose(0, 1)[:rows]  # [T, Hkv, D]
        cache.write(plan.cache_cells(heads, self.cache.blocks * self.cache.block_size), new_keys, new_values)
        queries = query[0].transpose(0, 1)  # [T, Hq, D]
        if plan.plain:
            context = self._mirrored(plan, cache, new_keys, new_values)
            out = self._attend(plan.tiles[0], queries[:rows], context, heads, scaling, window)
        else:
            cache.mirror = None
            out = queries.new_empty(rows, queries.shape[1], value.shape[-1], dtype=torch.float32)
            for tiles in plan.tiles:
                picked = queries.index_select(0, tiles.tokens)
                context = cache.gather(tiles.rows(heads, self.cache.blocks), tiles.length)
                found = self._attend(tiles, picked, context, heads, scaling, window)
                out.index_copy_(0, tiles.targets, found.index_select(0, tiles.real))
        if plan.padded != rows:
            out = functional.pad(out, (0, 0, 0, 0, 0, plan.padded - rows))
        return out.to(query.dtype)[None]

    def _mirrored(self, plan: StepPlan, cache: LayerCache, keys: Tensor, values: Tensor) -> Context:
        """The contexts of a plain step: those of the step before with the new tokens appended, where that is known."""
        heads, tiles = keys.shape[1], plan.tiles[0]
        if plan.follows and cache.mirror is not None:
            cache.mirror.append(plan.mirror_cells(heads), keys, values)
            return cache.mirror
        context = cache.gather(tiles.rows(heads, self.cache.blocks), tiles.length)
        fits = context.nbytes * len(self.cache.layers) <= MIRROR_BYTES
        cache.mirror = context if fits else None
        return context

    def _attend(
        self, tiles: Tiles, queries: Tensor, context: Context, heads: int, scaling: float, window: int | None
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
        probs = self._scores(picked, context.keys, tiles.mask(window), scaling, count, heads, group)
        mixed = mix(probs, context.values)
        mixed = mixed[:, : positions * group].view(count, heads, positions, group, -1)
        return mixed.transpose(1, 2).reshape(count * positions, query_heads, -1)

    @staticmethod
    def _scores(
        queries: Tensor, keys: Tensor, mask: Tensor, scaling: float, count: int, heads: int, group: int
    ) -> Tensor:
        """Attention weights [count * heads, rows, length]."""
        scores = torch.bmm(queries * scaling, keys.transpose(1, 2))
        rows, length = scores.shape[1:]
        positions = mask.shape[2]
        shaped = scores.view(count, heads, rows, length)
        if positions == 1:
            shaped.add_(mask)  # all rows stand at one position; padding too
        else:
            shaped.view(count, heads, positions, group, length).add_(mask.unsqueeze(3))
        return torch.softmax(scores, dim=-1)


def mix(probs: Tensor, values: Tensor) -> Tensor:
    """probs [B, R, L] times values [B, L, D], summed slice after slice so that trailing zeros change nothing."""
    length = probs.shape[-1]
    total = torch.bmm(probs[..., :SLICE], values[:, :SLICE])
    for start in range(SLICE, length, SLICE):
        total.baddbmm_(probs[..., start : start + SLICE], values[:, start : start + SLICE])
    return total


def check_tiles(group: int, width: int, value_width: int, longest: int) -> int:
    """The fewest query rows per tile (for `group` query heads per KV head) that agree with 16-row products here.

    Raises ModelError if results depend on padding, on batch size, or (for the larger tiles) on rows at all.
    """
    generator = torch.Generator().manual_seed(0)

    def weights(rows: int, length: int, batch: int = 3) -> Tensor:
        q = queries[:rows].expand(batch, rows, width).contiguous()
        scores = torch.bmm(q, keys[None, :length].expand(batch, -1, -1).transpose(1, 2))
        scores[:, :, longest_real:] = float("-inf")
        probs = torch.softmax(scores, dim=-1)
        return mix(probs, values[None, :length].expand(batch, -1, -1).contiguous())[batch - 1]

    total = max(TILE_POSITIONS) * group + REFERENCE_ROWS
    queries = torch.randn(total, width, generator=generator) * width**-0.5
    padded = -(-longest // SLICE) * SLICE
    keys = torch.randn(padded, width, generator=generator)
    values = torch.randn(padded, value_width, generator=generator)
    longest_real = min(100, longest)
    reference = weights(REFERENCE_ROWS, SLICE)
    lengths = sorted({SLICE + 64, 2 * SLICE, 3 * SLICE, padded // 2 // 64 * 64, padded} - {0})
    fine = all(torch.equal(weights(REFERENCE_ROWS, n)[:REFERENCE_ROWS], reference) for n in lengths if n <= padded)
    fine = fine and torch.equal(weights(REFERENCE_ROWS, SLICE, batch=17), reference)
    for size in TILE_POSITIONS[1:]:
        rows = max(size * group, REFERENCE_ROWS)
        fine = fine and torch.equal(weights(rows, SLICE)[:REFERENCE_ROWS], reference)
    if not fine:
        hint = "--exactness stock serves without the guarantee"
        raise ModelError("attention results depend on the batch on this machine", hint=hint)
    small = [r for r in (4, 8, 12) if r < REFERENCE_ROWS and torch.equal(weights(r, SLICE), reference[:r])]
    exact = [r for r in small if all(s in small for s in range(r, REFERENCE_ROWS, 4))]
    return min(exact, default=REFERENCE_ROWS)
