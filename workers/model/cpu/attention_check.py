"""Checks, at load, that a device's batched products let attention be exact, and with how few rows per product."""

from __future__ import annotations

import torch
from torch import Tensor

from membership.base.errors import ModelError
from workers.model.attention_plan import TILE_POSITIONS
from workers.model.backend import AttentionSpec
from workers.model.cpu.attention import SLICE, mix

REFERENCE_ROWS = 16
BATCHES = (1, 2, 17, 64)  # entries of one product: a library may choose its kernel by their number


def fewest_exact_rows(spec: AttentionSpec, device: torch.device) -> int:
    """The fewest query rows per product that give the bits of a product of 16 rows on the device that computes.

    Raises ModelError if results depend on padding, on batch size, or (for the larger tiles) on the number of rows.
    """
    generator = torch.Generator().manual_seed(0)
    longest = -(-spec.longest // SLICE) * SLICE
    real = min(100, spec.longest)  # cells that are not masked
    total = max(TILE_POSITIONS) * spec.group + REFERENCE_ROWS
    queries = torch.randn(total, spec.key_width, generator=generator).to(device) * spec.key_width**-0.5
    keys = torch.randn(longest, spec.key_width, generator=generator).to(device)
    values = torch.randn(longest, spec.value_width, generator=generator).to(device)

    def attend(rows: int, length: int, batch: int = 3) -> Tensor:
        """Attention of the first `rows` queries, as the last of `batch` equal entries, over `length` cells."""
        q = queries[:rows].expand(batch, rows, -1).contiguous()
        scores = torch.bmm(q, keys[None, :length].expand(batch, -1, -1).transpose(1, 2))
        scores[:, :, real:] = float("-inf")
        probs = torch.softmax(scores, dim=-1)
        return mix(probs, values[None, :length].expand(batch, -1, -1).contiguous())[batch - 1]

    reference = attend(REFERENCE_ROWS, SLICE)
    lengths = sorted({SLICE + 64, 2 * SLICE, 3 * SLICE, longest // 2 // 64 * 64, longest} - {0})
    tiles = [max(size * spec.group, REFERENCE_ROWS) for size in TILE_POSITIONS[1:]]
    agree = (
        all(torch.equal(attend(REFERENCE_ROWS, length), reference) for length in lengths if length <= longest)
        and all(torch.equal(attend(REFERENCE_ROWS, SLICE, batch), reference) for batch in BATCHES)
        and all(torch.equal(attend(rows, SLICE, n)[:REFERENCE_ROWS], reference) for rows in tiles for n in BATCHES)
    )
    if not agree:
        hint = "--exactness stock serves without the guarantee"
        raise ModelError("attention results depend on the batch on this machine", hint=hint)
    fewest = REFERENCE_ROWS
    for rows in (12, 8, 4):
        if not torch.equal(attend(rows, SLICE), reference[:rows]):
            break
        fewest = rows
    return fewest
