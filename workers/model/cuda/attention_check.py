"""Asks, at load, whether several tokens per program give each the bits that it has alone, on the GPU that computes.

They should: a row's products do not know how many rows there are, and its cells come in the same order. But a compiler
may lay out larger tiles otherwise, and matrix units may sum larger products in another order.
"""

from __future__ import annotations

import torch

from workers.model.attention_plan import plan_step
from workers.model.backend import AttentionSpec
from workers.model.cuda import attention
from workers.model.cuda.attention import ALL, Layout, Look, add_splits
from workers.protocol.messages import SeqChunk

HEADS = 2  # of keys and values


def agree(spec: AttentionSpec, tokens: int, device: torch.device) -> bool:
    """Whether `tokens` at once have the same sums, before any is rounded, as each alone. Of two sequences, of which one
    has much behind it already, with rows that fill no tile, with a window, too, and with a key that is no number, which
    is nothing to rows that do not see it.
    """
    pick, size, split = torch.Generator().manual_seed(0), spec.block_size, attention.SPLIT
    starts, count = (0, 2 * split + split // 3), 3 * tokens // 2 + 5
    pages = [-(-(start + count) // size) for start in starts]
    blocks = torch.randperm(sum(pages), generator=pick).tolist()
    tables = blocks[: pages[0]], blocks[pages[0] :]
    chunks = [SeqChunk(seq, starts[seq], [0] * count, table) for seq, table in enumerate(tables)]
    layout = Layout.of(plan_step(chunks, size, 2 * count, device, tiled=False), device)

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=pick).to(device, spec.dtype)

    queries = some(2 * count, HEADS * spec.group, spec.key_width)
    cells = some(len(blocks), size, HEADS, spec.key_width), some(len(blocks), size, HEADS, spec.value_width)
    cells[0][tables[0][(count - 1) // size], (count - 1) % size, 0] = torch.nan

    def sums(at_once: int, window: int) -> tuple[torch.Tensor, torch.Tensor]:
        sizes = torch.zeros(*queries.shape[:2], layout.splits, device=device)
        partial = torch.zeros(*sizes.shape, spec.value_width, device=device)
        look = Look(spec.key_width**-0.5, window)
        add_splits(layout, slice(0, 2 * count), queries, cells, look, at_once, (partial, sizes))
        return partial, sizes

    return all(
        torch.allclose(one, several, rtol=0.0, atol=0.0, equal_nan=True)
        for window in (ALL, split // 2 + 3)
        for one, several in zip(sums(1, window), sums(tokens, window), strict=True)
    )
